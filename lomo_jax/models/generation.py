"""Text generation, for samples during training."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from numpy.typing import ArrayLike

from lomo_jax import sharding
from lomo_jax.models.decoder import Decoder

_BUFFER_MULTIPLE = 32  # tokens; prompts of similar length share one compilation


def generate(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokens: ArrayLike,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    seed: int = 0,
) -> np.ndarray:
    """Continues prompts of equal length.

    There is no key-value cache: each new token recomputes the whole prefix. Good for a few short
    samples during training, too slow for serving.

    Args:
      graphdef: The structure of a `Decoder`.
      params: Its parameters.
      tokens: Integer `[B, T]`, the prompts, without padding.
      max_new_tokens: Number of tokens to add.
      temperature: Divides the logits before sampling. 0 is greedy: the most likely token.
      seed: Random seed for sampling.

    Returns:
      int32 `[B, T + max_new_tokens]`, prompts and continuations.

    Raises:
      ValueError: The prompts are empty, or `T + max_new_tokens` exceeds the model's `max_length`.
    """
    prompt_BxT = np.asarray(tokens, np.int32)
    if prompt_BxT.ndim != 2 or prompt_BxT.shape[1] == 0:
        raise ValueError(f"tokens of shape {prompt_BxT.shape} must be [batch, prompt length > 0]")
    total = prompt_BxT.shape[1] + max_new_tokens
    max_length = nnx.merge(graphdef, params).config.max_length
    if total > max_length:
        raise ValueError(
            f"prompt and continuation together are {total} tokens, "
            f"more than the model's max_length={max_length}"
        )
    padding = -total % _BUFFER_MULTIPLE + max_new_tokens
    rows = -len(prompt_BxT) % sharding.batch_shards()
    buffer_BxN = np.pad(prompt_BxT, ((0, rows), (0, padding)))
    filled_BxN = _fill(
        graphdef, params, buffer_BxN, prompt_BxT.shape[1], total, temperature, jax.random.key(seed)
    )
    return np.asarray(filled_BxN)[: len(prompt_BxT), :total]


@functools.partial(jax.jit, static_argnums=0)
def _fill(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    buffer_BxN: jax.Array,
    start: jax.Array,
    stop: jax.Array,
    temperature: jax.Array,
    key: jax.Array,
) -> jax.Array:
    """Generates tokens start, ..., stop - 1 of each row."""
    model = nnx.merge(graphdef, params)

    def write(position: jax.Array, buffer_BxN: jax.Array) -> jax.Array:
        # Attention is causal: tokens after the prefix do not affect its last position.
        x_BxNxD = model.hidden(buffer_BxN)
        x_BxD = jax.lax.dynamic_index_in_dim(x_BxNxD, position - 1, axis=1, keepdims=False)
        logits_BxV = jnp.matmul(
            x_BxD, sharding.gather(model.head()), preferred_element_type=jnp.float32
        )
        sampled_B = jax.random.categorical(
            jax.random.fold_in(key, position), logits_BxV / jnp.maximum(temperature, 1e-6)
        )
        next_B = jnp.where(temperature > 0, sampled_B, jnp.argmax(logits_BxV, axis=-1))
        return buffer_BxN.at[:, position].set(sharding.replicate(next_B))

    return jax.lax.fori_loop(start, stop, write, buffer_BxN)
