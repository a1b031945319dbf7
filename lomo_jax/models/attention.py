"""Causal attention of packed rows: whole score matrices, blocks of queries, cuDNN or Pallas.

Dimensions: B batch, T sequence (S for keys), H query heads, K key and value heads, G = H / K, h
head dimension, Q queries of one block.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import PartitionSpec as P

from lomo_jax import sharding
from lomo_jax.fused.arrays import partition_spec

_BLOCK = 256  # queries whose scores exist at a time in a long row
_TILE = 64  # queries of one tile of the Triton kernel; rows are a multiple of it
_LONG = 4096  # tokens; shorter rows materialise all scores of a layer


class Scores(NamedTuple):
    """How a model computes the scores of queries and keys."""

    scale: float | None = None  # multiplies them; None: head_dim ** -0.5
    cap: float | None = None  # c: scores become c * tanh(scores / c)


class Visible(NamedTuple):
    """Which earlier keys a query sees. Both are None where it sees all."""

    segments: jax.Array | None  # int32 [B, T]: keys of its own segment only
    window: int | jax.Array | None  # keys at most window - 1 tokens before it
    mask: jax.Array | None  # bool [B, 1, T, T]: the first two, where the row is short


def is_long(length: int, implementation: str) -> bool:
    """Returns whether rows of this many tokens are attended block by block, without a mask."""
    return implementation != "cudnn" and length > _LONG


def segment_mask(segments_BxT: jax.Array) -> jax.Array:
    """Returns whether query and key are in the same segment, bool `[B, 1, T, T]`."""
    return segments_BxT[:, None, :, None] == segments_BxT[:, None, None, :]


def and_window(
    mask: jax.Array | None, length: int, window: int | jax.Array | None
) -> jax.Array | None:
    """Returns the mask without keys that are `window` tokens or more before their query."""
    if window is None:
        return mask
    index_T = jnp.arange(length, dtype=jnp.int32)
    near = (index_T[:, None] - index_T[None] < window)[None, None]
    return near if mask is None else mask & near


def attend(
    q_BxTxHxh: jax.Array,
    k_BxTxKxh: jax.Array,
    v_BxTxKxh: jax.Array,
    visible: Visible,
    scores: Scores,
    implementation: Any,
) -> jax.Array:
    """Returns the attention of each query over the keys that it sees, `[B, T, H, h]`."""
    dtype = q_BxTxHxh.dtype
    if dtype == jnp.float16 and implementation == "xla":
        # JAX's float16 attention needs a matrix product that CPUs and TPUs lack.
        q_BxTxHxh, k_BxTxKxh, v_BxTxKxh = (
            x.astype(jnp.float32) for x in (q_BxTxHxh, k_BxTxKxh, v_BxTxKxh)
        )

    def attend(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, visible):
        length = q_BxTxHxh.shape[1]
        if is_long(length, implementation):
            plain = scores.cap is None and visible.window is None
            if implementation == "pallas" and plain and length % _TILE == 0:
                return _flash(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, visible.segments, scores)
            return _in_blocks(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, visible, scores)
        if scores.cap is not None:
            mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
            mask = mask if visible.mask is None else mask & visible.mask
            return _capped(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, mask, scores)
        return jax.nn.dot_product_attention(
            q_BxTxHxh,
            k_BxTxKxh,
            v_BxTxKxh,
            mask=visible.mask,
            scale=scores.scale,
            is_causal=True,
            implementation="cudnn" if implementation == "cudnn" else "xla",
        )

    if sharding.is_explicit():
        # Every device has whole heads of whole sequences, but cuDNN's op has no sharding rule.
        heads, rows = P(sharding.BATCH, None, "tensor", None), P(sharding.BATCH, None)
        masks = P() if visible.mask is None else partition_spec(visible.mask)
        specs = Visible._make((rows, P(), masks))
        attend = jax.shard_map(
            attend, in_specs=(heads, heads, heads, specs), out_specs=heads, check_vma=False
        )
    # dot_product_attention mixes dtypes, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.named_scope("attention"):
        y_BxTxHxh = attend(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, visible).astype(dtype)
    # `remat="attention"` saves cuDNN's output without a name; with one it would be saved twice.
    return y_BxTxHxh if implementation == "cudnn" else checkpoint_name(y_BxTxHxh, "attention")


def _flash(
    q_BxTxHxh: jax.Array,
    k_BxTxKxh: jax.Array,
    v_BxTxKxh: jax.Array,
    segments_BxT: jax.Array | None,
    scores: Scores,
    interpret: bool = False,
) -> jax.Array:
    """Flash attention in JAX's Triton kernel, which knows segments but neither caps nor windows."""
    with warnings.catch_warnings():
        # jax 0.12 points to tokamax, a package of its own.
        warnings.simplefilter("ignore", DeprecationWarning)
        from jax.experimental.pallas.ops.gpu import attention as kernel  # slow to import

    head_dim, groups = q_BxTxHxh.shape[-1], q_BxTxHxh.shape[2] // k_BxTxKxh.shape[2]
    tiles = kernel.BlockSizes(
        block_q=_TILE,
        block_k=_TILE // 2,
        block_q_dkv=_TILE // 2,
        block_kv_dkv=_TILE // 2,
        block_q_dq=_TILE // 2,
        block_kv_dq=_TILE // 2,
    )
    return kernel.mha(
        q_BxTxHxh,
        jnp.repeat(k_BxTxKxh, groups, axis=2),
        jnp.repeat(v_BxTxKxh, groups, axis=2),
        segments_BxT,
        sm_scale=head_dim**-0.5 if scores.scale is None else scores.scale,
        causal=True,
        block_sizes=tiles,
        interpret=interpret,
    )


def _capped(
    q_BxTxHxh: jax.Array,
    k_BxSxKxh: jax.Array,
    v_BxSxKxh: jax.Array,
    mask_Bx1xTxS: jax.Array,
    scores: Scores,
) -> jax.Array:
    """Attention with all scores of these queries at once; scores and softmax in float32."""
    batch, length, heads, head_dim = q_BxTxHxh.shape
    groups = k_BxSxKxh.shape[2]
    q_BxTxKxGxh = q_BxTxHxh.reshape(batch, length, groups, heads // groups, head_dim)
    scores_BxKxGxTxS = jnp.einsum(
        "btkgh,bskh->bkgts", q_BxTxKxGxh, k_BxSxKxh, preferred_element_type=jnp.float32
    )
    p_BxKxGxTxS = probabilities(scores_BxKxGxTxS, mask_Bx1xTxS[:, :, None], head_dim, scores)
    p_BxKxGxTxS = p_BxKxGxTxS.astype(v_BxSxKxh.dtype)
    y_BxTxKxGxh = jnp.einsum("bkgts,bskh->btkgh", p_BxKxGxTxS, v_BxSxKxh)
    return y_BxTxKxGxh.reshape(batch, length, heads, head_dim)


def probabilities(products: jax.Array, mask: jax.Array, head_dim: int, scores: Scores) -> jax.Array:
    """Returns the softmax over the last axis of the products of queries and keys, in float32.

    Args:
      products: float32.
      mask: bool, of a shape that broadcasts to it: False where a query does not see a key.
      head_dim: the width of a head.
      scores: how the products are scaled and capped.
    """
    products *= head_dim**-0.5 if scores.scale is None else scores.scale
    if scores.cap is not None:
        products = scores.cap * jnp.tanh(products / scores.cap)
    lowest = jnp.finfo(jnp.float32).min / 2
    return jax.nn.softmax(jnp.where(mask, products, lowest), axis=-1)


def _in_blocks(
    q_BxTxHxh: jax.Array,
    k_BxTxKxh: jax.Array,
    v_BxTxKxh: jax.Array,
    visible: Visible,
    scores: Scores,
) -> jax.Array:
    """Attends block by block of queries: memory for the scores of one block, both ways."""
    length = q_BxTxHxh.shape[1]
    padding = -length % _BLOCK
    starts = jnp.arange(0, length, _BLOCK, dtype=jnp.int32)
    padded = jnp.pad(q_BxTxHxh, ((0, 0), (0, padding), (0, 0), (0, 0)))
    key_S = jnp.arange(length, dtype=jnp.int32)
    segments_BxT = visible.segments
    if segments_BxT is not None:
        segments_BxT = jnp.pad(segments_BxT, ((0, 0), (0, padding)))

    @functools.partial(jax.checkpoint, prevent_cse=False)
    def attend(start: jax.Array) -> jax.Array:
        query_Q = start + jnp.arange(_BLOCK, dtype=jnp.int32)
        distance_QxS = query_Q[:, None] - key_S[None]
        mask = (distance_QxS >= 0)[None]
        if visible.window is not None:
            mask &= (distance_QxS < visible.window)[None]
        if segments_BxT is not None:
            own = jax.lax.dynamic_slice_in_dim(segments_BxT, start, _BLOCK, axis=1)
            mask = mask & (own[:, :, None] == segments_BxT[:, None, :length])
        q_BxQxHxh = jax.lax.dynamic_slice_in_dim(padded, start, _BLOCK, axis=1)
        return _capped(q_BxQxHxh, k_BxTxKxh, v_BxTxKxh, mask[:, None], scores)

    y_NxBxQxHxh = jax.lax.map(attend, starts)
    y_BxNxQxHxh = jnp.moveaxis(y_NxBxQxHxh, 0, 1)
    batch, _, heads, head_dim = padded.shape
    return y_BxNxQxHxh.reshape(batch, -1, heads, head_dim)[:, :length]
