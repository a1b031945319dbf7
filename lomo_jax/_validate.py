"""Argument checks shared by the update rules and the steps."""

import math
import numbers
from collections.abc import Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import optax


def number(
    name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False
) -> None:
    """Raises ValueError unless `value` is a real number in [low, high), or in (low, high).

    A scalar JAX array is not checked, since it may be traced: `optax.inject_hyperparams` turns
    every number into one.
    """
    if isinstance(value, numbers.Real) and not isinstance(value, bool):
        x = float(value)
        if math.isfinite(x) and (low < x if open_low else low <= x) and x < high:
            return
    elif getattr(value, "shape", None) == ():
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g})"
    raise ValueError(f"{name} must be a number in {interval}, got {value!r}")


def optional_number(name: str, value: object, **limits) -> None:
    """Calls `number` unless `value` is None."""
    if value is not None:
        number(name, value, **limits)


def schedule(name: str, value: Any) -> optax.Schedule:
    """Returns a schedule; a number must be at least 0 and becomes a constant schedule."""
    if callable(value):
        return cast(optax.Schedule, value)
    number(name, value, low=0.0)
    return optax.constant_schedule(value)


def params(value: optax.Params | None) -> optax.Params:
    """Returns the parameters; raises ValueError for None."""
    if value is None:
        raise ValueError("params are needed: call update(updates, state, params)")
    return value


def real(rule: str, tree: Any) -> None:
    """Raises ValueError if an array in a tree is complex."""
    for keys, x in jax.tree.leaves_with_path(tree):
        dtype = getattr(x, "dtype", type(x))
        if jnp.issubdtype(dtype, jnp.complexfloating):
            raise ValueError(
                f"{rule} is not defined for complex parameters and {jax.tree_util.keystr(keys)} is "
                f"{dtype}: make its real and its imaginary part a parameter each"
            )


def integer(name: str, value: object, *, low: int) -> None:
    """Raises ValueError unless `value` is an integer and at least `low`."""
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value < low:
        raise ValueError(f"{name} must be a whole number, {low} or more, got {value!r}")


def choice(name: str, value: object, choices: Sequence[str]) -> None:
    """Raises ValueError unless `value` is one of `choices`."""
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}")
