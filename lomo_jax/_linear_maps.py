"""The linear maps of an nnx model, found by name and replaced in place."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flax import nnx

from lomo_jax.errors import UserError, did_you_mean

ALL = "all"  # as targets: every linear map but these
_NOT_IN_ALL = ("output", "head", "lm_head", "router")

Path = tuple[Any, ...]


def linear_maps(model: nnx.Module) -> dict[Path, nnx.Linear]:
    """Returns the linear maps of a model by their path."""
    return {
        path: module for path, module in nnx.iter_modules(model) if isinstance(module, nnx.Linear)
    }


def find(model: nnx.Module, targets: Sequence[str] | str) -> list[tuple[Path, nnx.Linear]]:
    """Returns the paths and the linear maps that `targets` names.

    Args:
      model: Any nnx model.
      targets: Names of attributes, or `ALL`.

    Raises:
      UserError: The model has no such linear map.
    """
    linears = linear_maps(model)
    names = {path: _name(path) for path in linears}
    if targets == ALL:
        chosen = set(names.values()) - set(_NOT_IN_ALL)
    else:
        chosen = {targets} if isinstance(targets, str) else set(targets)
    known = sorted(set(names.values()))
    for name in sorted(chosen) or ["to adapt"]:
        if name not in known:
            raise UserError(
                f"the model has no linear map {name}"
                + (did_you_mean(name, known) or f"; it has {', '.join(known) or 'none'}")
            )
    return [(path, linear) for path, linear in linears.items() if names[path] in chosen]


def _name(path: Path) -> str:
    """Returns the name of the attribute that holds a module, or holds the list of it."""
    return next((part for part in reversed(path) if isinstance(part, str)), "")


def replace(model: nnx.Module, path: Path, new: nnx.Module) -> None:
    """Puts a module in the place of the one at `path`."""
    parent: Any = model
    *parents, last = path
    for part in parents:
        parent = getattr(parent, part) if isinstance(part, str) else parent[part]
    if isinstance(last, str):
        setattr(parent, last, new)
    else:
        parent[last] = new


def copy_attributes(source: nnx.Module, target: nnx.Module) -> None:
    """Gives one module the attributes of another."""
    for name, value in vars(source).items():
        if not name.startswith("_pytree"):
            setattr(target, name, value)
