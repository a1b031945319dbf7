"""Keys and values of tokens that a decoder has already read.

Dimensions: L layers, B batch, Q new tokens, S slots, H query heads, K key and value heads, G = H /
K, h head dimension.

A slot has the position of its token in the row's text, and the branch: a token of branch n > 0
continues the text of branch 0 and does not see the other branches. So one row holds a prompt and
all answers to it, and reads the prompt once. Positions, not slots, say what a query sees: padding
may be anywhere in a row.
"""

from __future__ import annotations

from typing import NamedTuple, Self

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import sharding
from lomo_jax.models.attention import Scores, probabilities
from lomo_jax.models.config import DecoderConfig

PADDING = -1  # the position of padding and of empty slots, which no token sees
_STACK = P(None, sharding.BATCH, "tensor", None, None)


class Cache(NamedTuple):
    """Keys and values of all layers."""

    k: jax.Array  # [L, B, K, h, S], so that CPUs compute scores twice as fast
    v: jax.Array  # [L, B, K, S, h]
    positions: jax.Array  # int32 [B, S]; PADDING where there is no token
    branches: jax.Array  # int32 [B, S]
    length: jax.Array  # int32 [], slots in use, the same for all rows

    @classmethod
    def empty(cls, config: DecoderConfig, batch: int, slots: int, dtype: DTypeLike) -> Self:
        """Returns a cache without tokens."""
        heads = config.num_layers, batch, config.num_kv_heads
        k = jnp.zeros((*heads, config.head_dim, slots), dtype)
        v = jnp.zeros((*heads, slots, config.head_dim), dtype)
        if sharding.is_explicit():
            k, v = jax.sharding.reshard((k, v), _STACK)
        positions, branches = sharding.shard_batch(
            (jnp.full((batch, slots), PADDING, jnp.int32), jnp.zeros((batch, slots), jnp.int32))
        )
        return cls(k, v, positions, branches, jnp.zeros((), jnp.int32))

    def append(self, positions_BxQ: jax.Array, branches_BxQ: jax.Array) -> Self:
        """Returns the cache with slots for new tokens; their keys and values are not yet there."""
        start = (jnp.zeros((), jnp.int32), self.length)
        return self._replace(
            positions=jax.lax.dynamic_update_slice(self.positions, positions_BxQ, start),
            branches=jax.lax.dynamic_update_slice(self.branches, branches_BxQ, start),
            length=self.length + positions_BxQ.shape[1],
        )

    def distance(self, positions_BxQ: jax.Array, branches_BxQ: jax.Array) -> jax.Array:
        """Returns how many tokens before each query a slot is, int32 `[B, Q, S]`.

        The largest integer where the query does not see the slot.
        """
        slot_Bx1xS, branch_Bx1xS = self.positions[:, None], self.branches[:, None]
        distance_BxQxS = positions_BxQ[:, :, None] - slot_Bx1xS
        is_seen = (distance_BxQxS >= 0) & (slot_Bx1xS != PADDING)
        is_seen &= (branch_Bx1xS == 0) | (branch_Bx1xS == branches_BxQ[:, :, None])
        return jnp.where(is_seen, distance_BxQxS, jnp.iinfo(jnp.int32).max)


class LayerCache(NamedTuple):
    """The cache as one layer uses it: the stacks of all layers, and its place in them.

    The stacks are written in place; a layer's own slice would be copied twice.
    """

    k: jax.Array  # [L, B, K, h, S]
    v: jax.Array  # [L, B, K, S, h]
    layer: jax.Array  # int32 []
    start: jax.Array  # int32 [], the first slot of the new tokens
    mask: jax.Array  # bool [B, Q, S], which slots each new token sees

    def write(self, k_BxQxKxh: jax.Array, v_BxQxKxh: jax.Array) -> Self:
        """Returns the cache with the keys and values of the new tokens."""
        zero = jnp.zeros((), jnp.int32)
        k_BxKxhxQ = jnp.moveaxis(k_BxQxKxh, 1, 3).astype(self.k.dtype)
        v_BxKxQxh = jnp.moveaxis(v_BxQxKxh, 1, 2).astype(self.v.dtype)
        update = jax.lax.dynamic_update_slice
        return self._replace(
            k=update(self.k, k_BxKxhxQ[None], (self.layer, zero, zero, zero, self.start)),
            v=update(self.v, v_BxKxQxh[None], (self.layer, zero, zero, self.start, zero)),
        )

    def attend(self, q_BxQxHxh: jax.Array, scores: Scores) -> jax.Array:
        """Returns the attention of the new tokens over the slots that they see, `[B, Q, H, h]`."""

        def attend(q_BxQxHxh, k_LxBxKxhxS, v_LxBxKxSxh, layer, mask_BxQxS):
            k_BxKxhxS, v_BxKxSxh = (
                jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
                for stack in (k_LxBxKxhxS, v_LxBxKxSxh)
            )
            return _attend(q_BxQxHxh, k_BxKxhxS, v_BxKxSxh, mask_BxQxS, scores)

        if sharding.is_explicit():
            heads, rows = P(sharding.BATCH, None, "tensor", None), P(sharding.BATCH, None, None)
            attend = jax.shard_map(
                attend,
                in_specs=(heads, _STACK, _STACK, P(), rows),
                out_specs=heads,
                check_vma=False,
            )
        with jax.named_scope("attention"):
            return attend(q_BxQxHxh, self.k, self.v, self.layer, self.mask)


def _attend(
    q_BxQxHxh: jax.Array,
    k_BxKxhxS: jax.Array,
    v_BxKxSxh: jax.Array,
    mask_BxQxS: jax.Array,
    scores: Scores,
) -> jax.Array:
    """Attention with scores and softmax in float32."""
    batch, queries, heads, head_dim = q_BxQxHxh.shape
    groups, dtype = k_BxKxhxS.shape[1], q_BxQxHxh.dtype
    if dtype == jnp.float16:  # CPUs have no product of float16 with a float32 result
        q_BxQxHxh, k_BxKxhxS, v_BxKxSxh = (
            x.astype(jnp.float32) for x in (q_BxQxHxh, k_BxKxhxS, v_BxKxSxh)
        )
    q_BxQxKxGxh = q_BxQxHxh.reshape(batch, queries, groups, heads // groups, head_dim)
    scores_BxKxQxGxS = jnp.einsum(
        "bqkgh,bkhs->bkqgs", q_BxQxKxGxh, k_BxKxhxS, preferred_element_type=jnp.float32
    )
    mask_Bx1xQx1xS = mask_BxQxS[:, None, :, None]
    p_BxKxQxGxS = probabilities(scores_BxKxQxGxS, mask_Bx1xQx1xS, head_dim, scores)
    p_BxKxQxGxS = p_BxKxQxGxS.astype(v_BxKxSxh.dtype)
    y_BxQxKxGxh = jnp.einsum("bkqgs,bksh->bqkgh", p_BxKxQxGxS, v_BxKxSxh)
    return y_BxQxKxGxh.reshape(batch, queries, heads, head_dim).astype(dtype)
