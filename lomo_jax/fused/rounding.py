"""Stochastic rounding: small updates of low-precision parameters are kept on average."""

import jax
import jax.numpy as jnp


def rounds(dtype: jax.typing.DTypeLike) -> bool:
    """Whether a float32 number has to be rounded to fit into `dtype`."""
    return jnp.finfo(dtype).nmant < jnp.finfo(jnp.float32).nmant


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Rounds to one of the two neighbours in `dtype`, so that the mean is `x`.

    The nearer neighbour is the likelier one, in proportion; what `dtype` can hold stays as it is.
    The mean is exact for numbers in the normal range of `dtype`; below it, it is `x` up to
    `2**-13` of the distance between the neighbours.

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
    spacing = jnp.maximum(
        power * jnp.float32(info.eps), max(float(info.smallest_subnormal), float(wide.tiny))
    )
    # As many random bits as are dropped: one more, and their sum with x would be rounded.
    dropped = wide.nmant - info.nmant
    bits = jax.random.bits(key, x.shape, jnp.uint16) >> (16 - dropped)
    threshold = bits.astype(jnp.float32) * jnp.float32(2.0**-dropped)
    rounded = jnp.floor(x / spacing + threshold) * spacing
    return jnp.where(jnp.isfinite(x), rounded, x).astype(dtype)
