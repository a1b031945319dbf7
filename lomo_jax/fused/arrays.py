"""Helpers for arrays and parameters: names, dtypes, shardings, memory kinds."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

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


class Place(NamedTuple):
    """Where a stack has its layers: layer i is ``[start + i * size, start + (i + 1) * size)``.

    A layer has the axis only if its size is not 1.
    """

    axis: int = 0
    start: int = 0
    size: int = 1


class Position(NamedTuple):
    """Where a layer of an array is, or a layer of a layer of it."""

    starts: list[Any]  # along each axis
    sizes: list[int]
    dropped: list[int]  # axes that the layer does not have

    @classmethod
    def of(
        cls, shape: Sequence[int], places: Sequence[Place], indices: Sequence[Any]
    ) -> "Position":
        """Returns the position of layer ``indices[-1]`` of layer ... of layer ``indices[0]``.

        Args:
          shape: of the array.
          places: the places of its layers, of the layers of a layer, and so on.
          indices: for each place the index of a layer.
        """
        axes, starts, sizes = list(range(len(shape))), [0] * len(shape), list(shape)
        for place, i in zip(places, indices, strict=True):
            axis = axes[place.axis]
            step = i if place.size == 1 else i * place.size
            first = starts[axis] + place.start
            starts[axis] = step if isinstance(first, int) and not first else first + step
            sizes[axis] = place.size
            if place.size == 1:
                axes.remove(axis)
        return cls(starts, sizes, [axis for axis in range(len(shape)) if axis not in axes])


def read_layer(x: jax.Array, places: Sequence[Place], indices: Sequence[Any]) -> jax.Array:
    """Returns a layer of an array, on the device; see `Position.of`."""
    starts, sizes, dropped = Position.of(x.shape, places, indices)
    if len(dropped) == len(places) == 1:
        return to_device(
            jax.lax.dynamic_index_in_dim(x, starts[dropped[0]], dropped[0], keepdims=False)
        )
    return to_device(jax.lax.squeeze(jax.lax.dynamic_slice(x, starts, sizes), dropped))


def write_layer(
    x: jax.Array, layer: jax.Array, places: Sequence[Place], indices: Sequence[Any]
) -> jax.Array:
    """Replaces a layer of an array; `layer` is in the same memory."""
    starts, _, dropped = Position.of(x.shape, places, indices)
    if len(dropped) == len(places) == 1:
        return jax.lax.dynamic_update_index_in_dim(x, layer, starts[dropped[0]], dropped[0])
    return jax.lax.dynamic_update_slice(x, jax.lax.expand_dims(layer, dropped), starts)


def layer_axes(ndim: int, places: Sequence[Place]) -> tuple[int, ...] | None:
    """Returns the axes along which layers are counted, the outermost first.

    Args:
      ndim: of the array.
      places: of its layers, of the layers of a layer, and so on.

    Returns:
      The axes of the array that a layer does not have; None if `places` end at a group of layers.
    """
    axes, dropped = list(range(ndim)), []
    groups = set()
    for place in places:
        groups.add(axes[place.axis])
        if place.size == 1:
            dropped.append(axes.pop(place.axis))
    return tuple(dropped) if groups == set(dropped) else None


@dataclasses.dataclass(frozen=True)
class Part:
    """A layer of an array that is not read yet."""

    array: jax.Array
    places: tuple[Place, ...]
    indices: tuple[Any, ...]

    def layer(self, place: Place, i: Any) -> "Part":
        return Part(self.array, (*self.places, place), (*self.indices, i))

    def read(self) -> jax.Array:
        return read_layer(self.array, self.places, self.indices)
