"""How arrays are divided over the Explicit axes of a mesh, which is a part of their types."""

from typing import Any

import jax
from jax.sharding import AxisType, NamedSharding, PartitionSpec


def sharding(x: Any, spec: PartitionSpec | None = None) -> NamedSharding | None:
    """That of an array, traced or not, or with `spec` another one; None without Explicit axes."""
    found = jax.typeof(x).sharding
    if AxisType.Explicit not in found.mesh.axis_types:
        return None
    return found if spec is None else NamedSharding(found.mesh, spec)


def spec(x: Any) -> PartitionSpec:
    """How an array is divided, axis by axis; None for an axis that is not."""
    return jax.typeof(x).sharding.spec


def divided_as(x: jax.Array, like: jax.Array) -> jax.Array:
    """Divides an array among the devices like another one, as far as types tell."""
    return x if spec(x) == spec(like) else jax.sharding.reshard(x, spec(like))
