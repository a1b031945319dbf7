"""Whether arrays are, to the bit, those that were saved."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import is_on_host


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
    # One after the other: see below what that takes on a CPU.
    each = [jax.device_get(_of_array(x)) for x in jax.tree.leaves(tree)]
    return Checksums([int(total) for total, _ in each], all(finite for _, finite in each))


@jax.jit
def _of_array(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    infinity = _bits(jnp.array(jnp.inf, x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else None
    on_host = is_on_host(x)
    if not on_host:
        # Before the loop: XLA for CPUs would write out a stack of bfloat16 as float32 there.
        x = _bits(x)

    def of_part(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        if on_host:
            part = _bits(jax.device_put(part, jax.memory.Space.Device))
        total = jnp.sum(part, dtype=jnp.uint32)
        if infinity is None:
            return total, jnp.array(True)
        not_finite = (part & infinity) == infinity
        # A float64 is two words.
        return total, ~(not_finite.all(-1) if infinity.ndim else not_finite).any()

    def add(carry, layer):
        (total, finite), (more, is_finite) = carry, of_part(layer)
        return (total + more, finite & is_finite), None

    if x.ndim < 3 or arrays.partition_spec(x)[0] is not None:
        return of_part(x)
    # One layer of a stack at a time: the device may have no room for more of what is in host
    # memory, and XLA for CPUs writes out each number as wide as the sum is.
    return jax.lax.scan(add, (jnp.uint32(0), jnp.array(True)), x)[0]


def _bits(x: jax.Array) -> jax.Array:
    """The same bits as unsigned numbers; of NaN and infinity those of the exponent are all 1."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(math.gcd(x.dtype.itemsize, 4), jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word)
