"""Rotary position embeddings: frequencies, and what differs by layer.

Dimensions: B batch, T sequence, N heads, h head dimension, r rotary dimension, L layers.
"""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from lomo_jax.models.config import DecoderConfig, RopeScaling


def frequencies(config: DecoderConfig, length: int) -> tuple[np.ndarray, float]:
    """Returns the rotary frequencies of a model for rows of `length` tokens.

    Returns:
      `(frequencies, magnitude)`: float32 `[r / 2]`, in radians per token, and what multiplies the
      rotated values.
    """
    dim = config.rotary_dim or config.head_dim
    exponent = np.arange(0, dim, 2) / dim
    frequency, scaling = config.rope_theta**-exponent, config.rope_scaling
    if scaling is None:
        return frequency.astype(np.float32), 1.0
    match scaling.kind:
        case "linear":
            frequency = frequency / scaling.factor
        case "dynamic":
            growth = scaling.factor * max(length / config.max_length, 1) - (scaling.factor - 1)
            frequency = (config.rope_theta * growth ** (dim / max(dim - 2, 1))) ** -exponent
        case "llama3":
            turns = scaling.original_max_length * frequency / (2 * np.pi)
            low, high = scaling.low_freq_factor, scaling.high_freq_factor
            unchanged = np.clip((turns - low) / (high - low), 0, 1)  # 0 for low frequencies
            frequency = frequency * (unchanged + (1 - unchanged) / scaling.factor)
        case "yarn":
            divided = _yarn_ramp(scaling, config.rope_theta, dim)  # 1 for low frequencies
            frequency = frequency * (1 - divided + divided / scaling.factor)
        case "longrope":
            is_long = length > scaling.original_max_length
            factors = scaling.long_factors if is_long else scaling.short_factors
            frequency = frequency / np.asarray(factors)
    return frequency.astype(np.float32), scaling.magnitude


def _yarn_ramp(scaling: RopeScaling, theta: float, dim: int) -> np.ndarray:
    def index(turns: float) -> float:  # of the frequency with this many turns
        return (
            dim
            * math.log(scaling.original_max_length / (turns * 2 * math.pi))
            / (2 * math.log(theta))
        )

    low, high = index(scaling.fast_turns), index(scaling.slow_turns)
    if scaling.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dim - 1)
    return np.clip((np.arange(dim // 2) - low) / (high - low or 0.001), 0, 1)


def layer_frequencies(config: DecoderConfig, length: int) -> tuple[np.ndarray, np.ndarray] | None:
    """Returns the rotary frequencies of each layer, or None if those of all layers are equal.

    A layer that does not rotate has frequency 0.

    Returns:
      `(frequencies, magnitudes)`: float32 `[L, r / 2]` and `[L]`.
    """
    frequency, magnitude = frequencies(config, length)
    local = frequency, magnitude
    if config.local_rope_theta is not None:
        local = frequencies(
            dataclasses.replace(config, rope_theta=config.local_rope_theta, rope_scaling=None),
            length,
        )
    rows = [
        (np.zeros_like(frequency), 1.0)
        if config.rope_layers and not config.rope_layers[layer]
        else local
        if config.is_sliding(layer)
        else (frequency, magnitude)
        for layer in range(config.num_layers)
    ]
    frequency_Lxr, magnitude_L = (np.stack(part) for part in zip(*rows, strict=True))
    if (frequency_Lxr == frequency).all() and (magnitude_L == magnitude).all():
        return None
    return frequency_Lxr.astype(np.float32), magnitude_L.astype(np.float32)


def angle(positions_BxT: jax.Array, frequency_r: jax.Array | np.ndarray) -> jax.Array:
    """Returns the angles of rotation at each position, float32 `[B, T, 1, r / 2]` radians."""
    return positions_BxT.astype(jnp.float32)[:, :, None, None] * frequency_r


def rotate(x_BxTxNxh: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates the pairs (i, i + r / 2), Hugging Face's order, by the angles of their positions."""
    dim = 2 * cos.shape[-1]
    if dim < x_BxTxNxh.shape[-1]:
        turned_BxTxNxr = rotate(x_BxTxNxh[..., :dim], cos, sin)
        return jnp.concatenate([turned_BxTxNxr, x_BxTxNxh[..., dim:]], axis=-1)
    a, b = jnp.split(x_BxTxNxh.astype(jnp.float32), 2, axis=-1)
    rotated = (a * cos - b * sin, b * cos + a * sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BxTxNxh.dtype)
