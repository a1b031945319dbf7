"""The leaves of a tree of parameters: their names, and which of them are trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def names(params: Any) -> list[str]:
    """A name for each leaf, such as `layers/attention/query`; no two are the same.

    It is `jax.tree_util.keystr(path, simple=True, separator="/")`, and `params` for a tree that is
    one array.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    simple = [jax.tree_util.keystr(p, simple=True, separator="/") or "params" for p in paths]
    if len(set(simple)) < len(simple):  # a key that holds a slash, or 0 beside "0"
        return [jax.tree_util.keystr(path) for path in paths]
    return simple


def trainable(params: Any, which: Any) -> list[bool]:
    """Says of each leaf whether it is trained.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      which: a predicate on `names`, a pytree of bool with the structure of `params` or of a part of
        it from the root, or None for all. What is not of floating point is never trained.

    Raises:
      TypeError: a parameter is not an array.
      ValueError: `which` does not fit, or nothing is left to train.
    """
    labels = names(params)
    leaves = jax.tree.leaves(params)
    for name, leaf in zip(labels, leaves, strict=True):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"parameter {name} is {leaf!r}, not an array: wrap it in jnp.asarray")
    if which is None:
        chosen = [True] * len(leaves)
    elif callable(which):
        chosen = [which(name) for name in labels]
    else:
        try:
            chosen = jax.tree.leaves(jax.tree.broadcast(which, params))
        except ValueError as error:
            raise ValueError(
                f"trainable has the structure {jax.tree.structure(which)}, which is not that of "
                f"params nor a prefix of it, {jax.tree.structure(params)}"
            ) from error
    for name, choice in zip(labels, chosen, strict=True):
        if not isinstance(choice, bool | np.bool_):
            raise ValueError(
                f"trainable must be True or False for each parameter, not {choice!r} for {name}"
            )
    result = [
        bool(choice) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        for choice, leaf in zip(chosen, leaves, strict=True)
    ]
    if not any(result):
        some = f" (the first is {labels[0]!r})" if labels else ""
        raise ValueError(f"no floating-point parameter is trainable, of {len(labels)}{some}")
    return result
