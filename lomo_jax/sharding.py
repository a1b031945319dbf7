"""Where the parts of a model and of a batch live among several devices.

A mesh has three axes. `data` and `fsdp` divide the batch; `fsdp` also divides the weights, which a
layer gathers when it is its turn; `tensor` divides the products inside a layer. The axes are of the
type Explicit: how an array is divided is a part of its type, `float32[8@fsdp,16@tensor]`, and JAX
says so where an operation leaves it open.
"""

import math
import re
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec, reshard

from lomo_jax.fused import explicit, parameters

AXES = ("data", "fsdp", "tensor")
BATCH = ("data", "fsdp")  # what divides the first axis of a batch

# How parameters are divided: the first regular expression that is found in a parameter's name,
# such as "layers/attention/q/kernel", tells.
Rules = Sequence[tuple[str, PartitionSpec]]


def make_mesh(
    data: int = 1,
    fsdp: int = -1,
    tensor: int = 1,
    *,
    devices: Sequence[Any] | None = None,
) -> Mesh:
    """Returns a mesh of the axes `data`, `fsdp` and `tensor`, to be set with `jax.set_mesh`.

    Args:
      data: devices along the axis, 1 or more; -1, for one axis at most, for those that are left.
      fsdp: likewise.
      tensor: likewise.
      devices: to choose from, in order; all that there are by default.

    Raises:
      ValueError: there are fewer devices than that, or -1 cannot be filled.
    """
    devices = jax.devices() if devices is None else devices
    sizes = mesh_shape(len(devices), data, fsdp, tensor)
    devices = devices[: math.prod(sizes)]
    return jax.make_mesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3, devices=devices)


def abstract_mesh(sizes: tuple[int, int, int]) -> AbstractMesh:
    """Returns a mesh like that of `make_mesh`, without devices: to plan with."""
    return AbstractMesh(sizes, AXES, axis_types=(AxisType.Explicit,) * 3)


def mesh_shape(devices: int, data: int, fsdp: int, tensor: int) -> tuple[int, int, int]:
    """Returns the sizes of the axes of `make_mesh`, -1 filled in.

    Raises:
      ValueError: there are fewer devices than that, or -1 cannot be filled.
    """
    sizes = {"data": data, "fsdp": fsdp, "tensor": tensor}
    asked = " ".join(f"{name}={size}" for name, size in sizes.items())
    if any(size < 1 and size != -1 for size in sizes.values()):
        raise ValueError(f"mesh: {asked}; a size is 1 or more, or -1 for the devices that are left")
    open_axes = [name for name, size in sizes.items() if size == -1]
    if len(open_axes) > 1:
        raise ValueError(f"mesh: {asked}; only one size can be -1")
    given = math.prod(size for size in sizes.values() if size != -1)
    if given > devices or (open_axes and devices % given):
        takes = f"a multiple of {given}" if open_axes else f"{given}"
        fits = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ValueError(
            f"mesh: {asked} takes {takes} devices and there are {devices}; the product of the "
            f"sizes could be {fits}"
        )
    sizes.update(dict.fromkeys(open_axes, devices // given))
    return sizes["data"], sizes["fsdp"], sizes["tensor"]


def shardings(rules: Rules, params: Any, mesh: Mesh | AbstractMesh) -> Any:
    """Says how each parameter is divided.

    Args:
      rules: in the order in which they are tried.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      mesh: of any axes that the rules know.

    Returns:
      Pytree of `jax.sharding.NamedSharding`, as for `jax.device_put`.

    Raises:
      ValueError: no rule fits a parameter, or one of its axes cannot be divided.
    """
    names, (leaves, treedef) = parameters.names(params), jax.tree.flatten(params)
    found = []
    for name, leaf in zip(names, leaves, strict=True):
        spec = next((spec for pattern, spec in rules if re.search(pattern, name)), None)
        if spec is None:
            raise ValueError(
                f"no partition rule fits the parameter {name}: add ('', P()) at the end"
            )
        check_divides(f"parameter {name}", leaf.shape, spec, mesh)
        found.append(NamedSharding(mesh, spec))
    return jax.tree.unflatten(treedef, found)


def struct(tree: Any, shardings: Any) -> Any:
    """Returns the shapes and dtypes of a pytree of arrays or shapes, divided as `shardings` say."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), tree, shardings
    )


def check_divides(
    what: str, shape: Sequence[int], spec: PartitionSpec, mesh: Mesh | AbstractMesh
) -> None:
    """Raises ValueError if an axis of `shape` does not divide evenly among its devices."""
    if len(spec) > len(shape):
        raise ValueError(f"{what} has shape {list(shape)}, too few axes for {spec}")
    for axis, (size, names) in enumerate(zip(shape, spec, strict=False)):
        names = () if names is None else names if isinstance(names, tuple) else (names,)
        parts = math.prod(mesh.shape[name] for name in names)
        if size % parts:
            by = " * ".join(f"{name}={mesh.shape[name]}" for name in names)
            fits = ", ".join(str(n) for n in range(1, parts + 1) if size % n == 0)
            raise ValueError(
                f"{what} has shape {list(shape)}: {size}, its axis {axis}, is not divided by "
                f"{by}; {' * '.join(names)} could be {fits}"
            )


def gather(x: jax.Array, axis: str = "fsdp") -> jax.Array:
    """Returns the array no longer divided over `axis`, to compute with.

    Its cotangent is divided as `x` is: it is reduced and scattered in one go.
    """
    spec = explicit.spec(x)
    whole = PartitionSpec(*(_without(names, axis) for names in spec))
    return x if whole == spec else reshard(x, whole)


def divide_batch(tree: Any) -> Any:
    """Divides the first axis of every array over `BATCH`, if there is a mesh of `AXES`."""
    if not is_explicit():
        return tree
    return jax.tree.map(lambda x: reshard(x, PartitionSpec(BATCH, *explicit.spec(x)[1:])), tree)


def replicate(x: jax.Array) -> jax.Array:
    """Puts the whole of an array on every device."""
    return reshard(x, PartitionSpec()) if is_explicit() else x


def batch_parts() -> int:
    """The number of parts that the rows of a batch are divided into under the current mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    return math.prod(mesh.shape[name] for name in BATCH) if is_explicit() else 1


def last_axis_whole(x: jax.Array) -> PartitionSpec | None:
    """The `out_sharding` of a product that sums over the last axis of `x`."""
    return PartitionSpec(*explicit.spec(x)[:-1], None) if is_explicit() else None


def is_explicit() -> bool:
    """Whether a mesh of `AXES`, of the type Explicit, has been set with `jax.set_mesh`."""
    mesh = jax.sharding.get_abstract_mesh()
    types = dict(zip(mesh.axis_names, mesh.axis_types, strict=True))
    return all(types.get(name) == AxisType.Explicit for name in AXES)


def _without(names: Any, axis: str) -> Any:
    if isinstance(names, tuple):
        rest = tuple(name for name in names if name != axis)
        return rest if len(rest) > 1 else rest[0] if rest else None
    return None if names == axis else names
