"""Helpers for arrays and parameters: names, dtypes, shardings, memory kinds."""

from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, NamedSharding, PartitionSpec

PyTree: TypeAlias = Any
Params: TypeAlias = Any  # a pytree of arrays, or of jax.ShapeDtypeStruct where only shapes count


def names(params: Params) -> list[str]:
    """Names each leaf, such as `layers/attention/query`. No two names are the same.

    A name is `jax.tree_util.keystr(path, simple=True, separator="/")`. A tree that is one array has
    the name `params`.
    """
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    simple = [jax.tree_util.keystr(p, simple=True, separator="/") or "params" for p in paths]
    if len(set(simple)) < len(simple):  # a key contains a slash, or a tree has the keys 0 and "0"
        return [jax.tree_util.keystr(path) for path in paths]
    return simple


def trainable_flags(params: Params, trainable: PyTree) -> list[bool]:
    """Returns for each leaf of the parameters whether it is trained.

    Args:
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      trainable: a predicate on `names`, a pytree of bool that is a prefix of `params`, or None for
        all. Only floating-point leaves are ever trained.

    Raises:
      TypeError: a parameter is not an array.
      ValueError: `trainable` does not fit `params`, or selects no floating-point parameter.
    """
    labels = names(params)
    leaves = jax.tree.leaves(params)
    for name, leaf in zip(labels, leaves, strict=True):
        if not hasattr(leaf, "dtype"):
            raise TypeError(f"parameter {name} is {leaf!r}, not an array: wrap it in jnp.asarray")
    if trainable is None:
        chosen = [True] * len(leaves)
    elif callable(trainable):
        chosen = [trainable(name) for name in labels]
    else:
        try:
            chosen = jax.tree.leaves(jax.tree.broadcast(trainable, params))
        except ValueError as error:
            raise ValueError(
                f"trainable has the structure {jax.tree.structure(trainable)}, which is neither "
                f"that of params nor a prefix of it, {jax.tree.structure(params)}"
            ) from error
    for name, choice in zip(labels, chosen, strict=True):
        if not isinstance(choice, bool | np.bool_):
            raise ValueError(
                f"trainable must be True or False for each parameter, got {choice!r} for {name}"
            )
    result = [
        bool(choice) and jnp.issubdtype(leaf.dtype, jnp.inexact)
        for choice, leaf in zip(chosen, leaves, strict=True)
    ]
    if not any(result):
        first = f" (the first is {labels[0]!r})" if labels else ""
        raise ValueError(
            f"none of the {len(labels)} parameters{first} is floating-point and trainable"
        )
    return result


def widen(x: jax.Array) -> jax.Array:
    """Casts to float32, or leaves a wider dtype as it is."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def add(a: jax.Array, b: jax.Array) -> jax.Array:
    """Returns the sum in the dtype of `a`."""
    return a + b.astype(a.dtype)


def explicit_sharding(x: Any, spec: PartitionSpec | None = None) -> NamedSharding | None:
    """Returns the sharding of an array under a mesh with Explicit axes; None under other meshes.

    Args:
      x: an array, traced or not.
      spec: returned in place of the array's own, on the same mesh.
    """
    found = jax.typeof(x).sharding
    if AxisType.Explicit not in found.mesh.axis_types:
        return None
    return found if spec is None else NamedSharding(found.mesh, spec)


def partition_spec(x: Any) -> PartitionSpec:
    """Returns the mesh axes that shard each axis of an array, from its type."""
    return jax.typeof(x).sharding.spec


def reshard_like(x: jax.Array, like: jax.Array) -> jax.Array:
    """Shards an array like another one, if their types include shardings."""
    spec = partition_spec(like)
    return x if partition_spec(x) == spec else jax.sharding.reshard(x, spec)


def is_on_host(x: Any) -> bool:
    """Returns whether an array, traced or not, is in host memory."""
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host


def to_host(tree: PyTree) -> PyTree:
    """Moves every array to host memory."""
    move = lambda x: x if is_on_host(x) else jax.device_put(x, jax.memory.Space.Host)  # noqa: E731
    return jax.tree.map(move, tree)


def to_device(tree: PyTree) -> PyTree:
    """Moves every array to device memory."""
    move = lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x  # noqa: E731
    return jax.tree.map(move, tree)


def match_memory(tree: PyTree, like: PyTree) -> PyTree:
    """Moves every array to the memory, host or device, of its counterpart in `like`."""
    return jax.tree.map(lambda x, y: to_host(x) if is_on_host(y) else to_device(x), tree, like)


def read_layer(stack: jax.Array, i: Any, axis: int = 0) -> jax.Array:
    """Returns layer i of a stack, on the device."""
    return to_device(jax.lax.dynamic_index_in_dim(stack, i, axis, keepdims=False))
