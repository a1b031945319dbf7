"""Whether arrays are, to the bit, those that were saved."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lomo_jax.fused.offload import is_on_host


class Checksums(NamedTuple):
    """Of the arrays of a tree."""

    sums: list[int]  # of each, the sum of its bits as unsigned numbers, modulo 2**32
    finite: bool  # whether no number is NaN or infinite


def checksums(tree: Any) -> Checksums:
    """Reads every array once, where it is.

    Sums of integers do not depend on their order: they stay the same when the arrays are divided
    among other devices. A bit that flips changes them.

    Args:
      tree: pytree of arrays, in device or in host memory, divided or not.
    """
    sums, finite = jax.device_get(_checksums(tree))
    return Checksums([int(x) for x in sums], bool(finite))


@jax.jit
def _checksums(tree: Any) -> tuple[list[jax.Array], jax.Array]:
    each = [_of_array(x) for x in jax.tree.leaves(tree)]
    finite = jnp.array(True)
    for _, is_finite in each:
        finite &= is_finite
    return [total for total, _ in each], finite


def _of_array(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    if not is_on_host(x):
        return _of_device_array(x)
    if x.ndim < 3:
        return _of_device_array(jax.device_put(x, jax.memory.Space.Device))

    def add(carry, layer):
        total, finite = carry
        more, is_finite = _of_device_array(jax.device_put(layer, jax.memory.Space.Device))
        return (total + more, finite & is_finite), None

    # A stack of layers may be there because the device has no room for it: one layer at a time.
    return jax.lax.scan(add, (jnp.uint32(0), jnp.array(True)), x)[0]


def _of_device_array(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    finite = jnp.isfinite(x).all() if jnp.issubdtype(x.dtype, jnp.inexact) else jnp.array(True)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(math.gcd(x.dtype.itemsize, 4), jnp.uint32)
    return jnp.sum(jax.lax.bitcast_convert_type(x, word), dtype=jnp.uint32), finite
