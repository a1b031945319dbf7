"""How the next token is chosen from the logits.

Dimensions: B batch, V vocabulary.

References:
  Fan et al., Hierarchical Neural Story Generation, arXiv 1805.04833, for top-k.
  Holtzman et al., The Curious Case of Neural Text Degeneration, arXiv 1904.09751, for top-p.
  Meister et al., Locally Typical Sampling, arXiv 2202.00666.
  Nguyen et al., Turning Up the Heat: Min-p Sampling, arXiv 2407.01082.
  Keskar et al., CTRL, arXiv 1909.05858, for the repetition penalty.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lomo_jax import sharding


class Sampling(NamedTuple):
    """How to sample; the fields apply in the order of transformers, from the first to the last.

    By default sampling is greedy: the most likely token.
    """

    repetition_penalty: float | None = None  # above 1: tokens of the row so far are less likely
    temperature: float | None = None  # divides the logits; None or 0: greedy
    top_k: int | None = None  # only the k most likely tokens
    top_p: float | None = None  # only the most likely tokens with this probability together
    min_p: float | None = None  # only tokens at least this times as likely as the likeliest one
    typical_p: float | None = None  # like top_p, the tokens of the most typical surprise first

    @property
    def is_greedy(self) -> bool:
        """Whether the most likely token is chosen."""
        return not self.temperature

    def check(self) -> None:
        """Raises ValueError if a value makes no sense."""
        allowed = {
            "repetition_penalty": (lambda x: x > 0, "above 0"),
            "temperature": (lambda x: x >= 0, "0 or more"),
            "top_k": (lambda x: x >= 1 and x == int(x), "a whole number, 1 or more"),
            "top_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
            "min_p": (lambda x: 0 <= x <= 1, "between 0 and 1"),
            "typical_p": (lambda x: 0 < x <= 1, "above 0 and at most 1"),
        }
        for name, (fits, text) in allowed.items():
            value = getattr(self, name)
            if value is not None and not fits(value):
                raise ValueError(f"{name}={value} must be {text}")


def choose(
    logits_BxV: jax.Array,
    seen_BxV: jax.Array | None,
    sampling: Sampling,
    key: jax.Array,
    numbers_B: jax.Array,
) -> jax.Array:
    """Returns the next token of each row, int32 `[B]`.

    Args:
      logits_BxV: float32.
      seen_BxV: bool, the tokens of each row so far; needed for a repetition penalty.
      sampling: How to choose. Which fields are None decides what is compiled.
      key: A random key.
      numbers_B: int32; a row's sample depends on the key and on its number.
    """
    arguments = logits_BxV, seen_BxV, sampling, key, numbers_B
    if not sharding.is_explicit():
        return _choose(*arguments)
    rows, both = P(sharding.BATCH), P(sharding.BATCH, None)
    seen = None if seen_BxV is None else both
    specs = both, seen, jax.tree.map(lambda _: P(), sampling), P(), rows
    arguments = jax.tree.map(jax.sharding.reshard, arguments, specs)
    return jax.shard_map(_choose, in_specs=specs, out_specs=rows, check_vma=False)(*arguments)


def _choose(logits_BxV, seen_BxV, sampling, key, numbers_B):
    if sampling.repetition_penalty is not None:
        penalty = sampling.repetition_penalty
        lower_BxV = jnp.where(logits_BxV < 0, logits_BxV * penalty, logits_BxV / penalty)
        logits_BxV = jnp.where(seen_BxV, lower_BxV, logits_BxV)
    if sampling.temperature is None:
        return jnp.argmax(logits_BxV, axis=-1).astype(jnp.int32)
    logits_BxV = keep_likely(logits_BxV / sampling.temperature, sampling)
    keys_B = jax.vmap(lambda number: jax.random.fold_in(key, number))(numbers_B)
    return jax.vmap(jax.random.categorical)(keys_B, logits_BxV).astype(jnp.int32)


def keep_likely(logits_BxV: jax.Array, sampling: Sampling) -> jax.Array:
    """Returns the logits with -inf for tokens that top-k, top-p, min-p or typical-p leave out."""
    if sampling.top_k is not None:
        sorted_BxV = jnp.sort(logits_BxV, axis=-1)
        place = jnp.maximum(sorted_BxV.shape[-1] - sampling.top_k, 0)
        smallest_Bx1 = jax.lax.dynamic_slice_in_dim(sorted_BxV, place, 1, axis=-1)
        logits_BxV = _leave_out(logits_BxV, logits_BxV < smallest_Bx1)
    if sampling.top_p is not None:
        logits_BxV = _up_to_mass(logits_BxV, -logits_BxV, sampling.top_p)
    if sampling.min_p is not None:
        p_BxV = jax.nn.softmax(logits_BxV, axis=-1)
        least_Bx1 = sampling.min_p * p_BxV.max(axis=-1, keepdims=True)
        logits_BxV = _leave_out(logits_BxV, p_BxV < least_Bx1)
    if sampling.typical_p is not None:
        surprise_BxV = -jax.nn.log_softmax(logits_BxV, axis=-1)
        p_BxV = jnp.exp(-surprise_BxV)
        product_BxV = jnp.where(p_BxV > 0, p_BxV * surprise_BxV, 0)
        entropy_Bx1 = product_BxV.sum(axis=-1, keepdims=True)
        unusual_BxV = jnp.abs(surprise_BxV - entropy_Bx1)
        logits_BxV = _up_to_mass(logits_BxV, unusual_BxV, sampling.typical_p)
    return logits_BxV


def _up_to_mass(logits_BxV: jax.Array, rank_BxV: jax.Array, mass: jax.Array | float) -> jax.Array:
    """Keeps the tokens of the lowest rank that together have the probability `mass`."""
    order_BxV = jnp.argsort(rank_BxV, axis=-1, stable=True)
    p_BxV = jax.nn.softmax(jnp.take_along_axis(logits_BxV, order_BxV, axis=-1), axis=-1)
    before_BxV = jnp.cumsum(p_BxV, axis=-1) - p_BxV
    # The first token stays, and the one with which the mass is reached.
    is_out_BxV = (before_BxV >= mass).at[:, 0].set(False)
    place_BxV = jnp.argsort(order_BxV, axis=-1)
    return _leave_out(logits_BxV, jnp.take_along_axis(is_out_BxV, place_BxV, axis=-1))


def _leave_out(logits_BxV: jax.Array, is_out_BxV: jax.Array) -> jax.Array:
    return jnp.where(is_out_BxV, -jnp.inf, logits_BxV)
