"""Meshes, and how parameters and batches are sharded over them.

A mesh has three axes. The batch is sharded over `data` and `fsdp`. The weights are sharded over
`fsdp` too, and each layer gathers its own before it computes. `tensor` shards the computation
inside a layer. The axes have the type Explicit: an array's sharding is a part of its type,
``float32[8@fsdp,16@tensor]``, and JAX raises an error where an operation leaves it open.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import Params, PyTree, partition_spec

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # shard the first axis of a batch

# (regular expression, spec): the first expression found in a parameter's name, such as
# "layers/attention/q/kernel", gives its spec.
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh with the axes `data`, `fsdp` and `tensor`; set it with `jax.set_mesh`.

    Args:
      data: the size of the axis. One of the three may be -1, for all remaining devices.
      fsdp: the size of the axis, or -1.
      tensor: the size of the axis, or -1.
      devices: the devices to use, in order; by default all.

    Raises:
      ValueError: the product of the sizes exceeds the number of devices, or, with a -1, does not
        divide it.

    Example:
      >>> import jax, lomo_jax.sharding
      >>> mesh = lomo_jax.sharding.make_mesh(data=1, fsdp=-1)
      >>> mesh.axis_names
      ('data', 'fsdp', 'tensor')
      >>> mesh.size == len(jax.devices())
      True
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(len(devices), data, fsdp, tensor)
    devices = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """Returns a mesh like `make_mesh` does, but without devices, for plans."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)


def mesh_shape(devices: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes of `make_mesh` on this number of devices.

    Args:
      devices: the number of devices.
      data: see `make_mesh`.
      fsdp: see `make_mesh`.
      tensor: see `make_mesh`.

    Raises:
      ValueError: see `make_mesh`.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(
            f"mesh: {asked}; a size must be 1 or more, or -1 for all remaining devices"
        )
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh: {asked}; only one size can be -1")
    product = math.prod(size for size in sizes.values() if size != -1)
    if product > devices or (open_axes and devices % product):
        takes = f"a multiple of {product}" if open_axes else f"{product}"
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(
            f"mesh: {asked} takes {takes} devices and there are {devices}; the product of the "
            f"sizes could be {fits}"
        )
    sizes.update(dict.fromkeys(open_axes, devices // product))
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def shardings(rules: Rules, params: Params, mesh: Mesh | AbstractMesh) -> PyTree:
    """Returns the sharding of each parameter.

    Args:
      rules: pairs of a regular expression and a spec; the first one that matches counts.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      mesh: has the axes that the rules name.

    Returns:
      Pytree of `jax.sharding.NamedSharding`, as for `jax.device_put`.

    Raises:
      ValueError: no rule matches a parameter, or an axis cannot be sharded evenly.

    Example:
      >>> import jax.numpy as jnp, lomo_jax.sharding
      >>> from jax.sharding import PartitionSpec as P
      >>> params = {"layers": {"kernel": jnp.ones((2, 8, 8))}, "scale": jnp.ones(8)}
      >>> rules = (("kernel$", P(None, "fsdp", "tensor")), ("", P()))
      >>> mesh = lomo_jax.sharding.make_mesh(data=1, fsdp=1)
      >>> found = lomo_jax.sharding.shardings(rules, params, mesh)
      >>> found["layers"]["kernel"].spec == P(None, "fsdp", "tensor")
      True
    """
    names, (leaves, treedef) = arrays.names(params), jax.tree.flatten(params)
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise ValueError(
                f"no partition rule matches the parameter {name}: add ('', P()) at the end"
            )
        check_divisible(f"parameter {name}", leaf.shape, spec, mesh)
        found.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(treedef, found)


def with_shardings(tree: PyTree, shardings: PyTree) -> PyTree:
    """Returns a pytree of `jax.ShapeDtypeStruct`, with the shapes of `tree` and these shardings."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def check_divisible(
    what: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    """Raises ValueError if an axis of `shape` cannot be sharded evenly over its devices."""
    if len(spec) > len(shape):
        raise ValueError(f"{what} has shape {list(shape)}, fewer axes than {spec}")
    for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            by = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
            fits = ", ".join(str(n) for n in range(1, parts + 1) if size % n == 0)
            raise ValueError(
                f"{what} has shape {list(shape)}: {size}, its axis {axis}, is not a multiple of "
                f"{by}; {' * '.join(names)} could be {fits}"
            )


def gather(x: jax.Array, axis: str = "fsdp") -> jax.Array:
    """Gathers an array over one mesh axis, to compute with it.

    Its cotangent is reduced and scattered, and so sharded like `x`.

    Args:
      x: an array that may be sharded over `axis`.
      axis: an axis of the current mesh.
    """
    spec = partition_spec(x)
    gathered = PartitionSpec(*(_without(names, axis) for names in spec))
    return x if gathered == spec else reshard(x, gathered)


def shard_batch(tree: PyTree) -> PyTree:
    """Shards the first axis of every array over `BATCH`, under a mesh with the axes `AXES`."""
    if not is_explicit():
        return tree
    return jax.tree.map(lambda x: reshard(x, PartitionSpec(BATCH, *partition_spec(x)[1:])), tree)


def replicate(x: jax.Array) -> jax.Array:
    """Replicates an array on every device."""
    return reshard(x, PartitionSpec()) if is_explicit() else x


def batch_shards() -> int:
    """Returns the number of shards of a batch's first axis under the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in BATCH) if is_explicit() else 1


def unsharded_last_axis(x: jax.Array) -> PartitionSpec | None:
    """Returns the `out_sharding` of a product that sums over the last axis of `x`."""
    return PartitionSpec(*partition_spec(x)[:-1], None) if is_explicit() else None


def is_explicit() -> bool:
    """Returns whether `jax.set_mesh` has set a mesh with Explicit axes `AXES`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(types.get(name) == AxisType.Explicit for name in AXES)


def _without(names: Any, axis: str) -> Any:
    if isinstance(names, tuple):
        rest = tuple(name for name in names if name != axis)
        return rest if len(rest) > 1 else rest[0] if rest else None
    return None if names == axis else names
