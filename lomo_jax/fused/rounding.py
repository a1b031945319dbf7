"""Stochastic rounding: small updates of low-precision parameters are kept on average."""

import jax
import jax.numpy as jnp

from lomo_jax.fused import explicit


def rounds(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a float32 number has to be rounded to fit into `dtype`."""
    return jnp.finfo(dtype).nmant < jnp.finfo(jnp.float32).nmant


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in `dtype`, so that the mean is `x`.

    The nearer neighbour is the likelier one, in proportion, and what `dtype` can hold stays as it
    is. Below the normal range of float16 the mean is `x` up to `2**-13` of the distance between the
    neighbours. Numbers of bfloat16 below `2**-119` go to the nearest neighbour: float32 cannot hold
    the distance.

    Args:
      x: float32 [...].
      dtype: bfloat16, float16 or another with less precision than float32.
      key: a key of `jax.random`.

    Returns:
      `dtype` [...].

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015
    """
    info, wide = jnp.finfo(dtype), jnp.finfo(jnp.float32)
    exponent_bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent_bits, jnp.float32)  # of two, at most |x|
    # All powers of two, and what they divide has no more bits than float32: nothing rounds here.
    spacing = jnp.maximum(power * jnp.float32(info.eps), jnp.float32(info.smallest_subnormal))
    # As many random bits as are dropped: one more, and their sum with x would be rounded.
    dropped = wide.nmant - info.nmant
    bits = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=explicit.sharding(x))
    bits >>= 16 - dropped
    threshold = bits.astype(jnp.float32) * jnp.float32(2.0**-dropped)
    rounded = jnp.floor(x / spacing + threshold) * spacing
    is_exact = jnp.isfinite(x) & (spacing >= wide.tiny)
    return jnp.where(is_exact, rounded, x).astype(dtype)
