"""Next-token loss that never holds all the logits.

Dimension key: B batch, T sequence, N = B*T tokens, D width, V vocabulary, C columns of one chunk
of the vocabulary, K chunks. On several devices the functions below `next_token_loss` see one
device's shards: its tokens, and its rows (R of D) and columns of the head.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lomo_jax import sharding


class Metrics(NamedTuple):
    """Metrics that `next_token_loss` returns with the loss."""

    accuracy: jax.Array  # float32 [], weighted share of targets that are the likeliest token
    weight: jax.Array  # float32 [], sum of the weights: weight batches by it to average them


def next_token_loss(
    x_BxTxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    chunk: int = 2048,
    cap: float | None = None,
) -> tuple[jax.Array, Metrics]:
    """Computes the mean cross-entropy of ``softmax(x @ head)`` against the targets.

    The logits exist for at most `chunk` tokens of the vocabulary at a time, and the backward pass
    recomputes them: ``4 * B * T * chunk`` bytes instead of ``4 * B * T * V``.

    Under a mesh of `lomo_jax.sharding.make_mesh` tokens are sharded over ``sharding.BATCH`` and the
    head by ``P("fsdp", "tensor")``: a device computes the logits of its shard of the vocabulary,
    and gathers one chunk of the head at a time.

    Args:
      x_BxTxD: the model's output after its final norm, any float dtype.
      head_DxV: the output embedding, any float dtype. Matrix products have operands of this dtype
        and accumulate in float32; everything else is computed in float32.
      targets_BxT: int32, the token to predict at each position; any number where the weight is 0.
      weights_BxT: float32, the weight of each position.
      chunk: the largest number of columns of the head that are multiplied at once.
      cap: the logits become ``cap * tanh(logits / cap)``, as in Gemma 2.

    Returns:
      The weighted mean of the loss, float32 [] (0 if all weights are 0), and `Metrics`.

    Example:
      >>> import jax.numpy as jnp
      >>> from lomo_jax.losses import next_token_loss
      >>> x, head = jnp.ones((1, 3, 4)), jnp.zeros((4, 10))
      >>> targets, weights = jnp.array([[1, 2, 3]]), jnp.ones((1, 3))
      >>> loss, metrics = next_token_loss(x, head, targets, weights, chunk=5)
      >>> round(float(loss), 4)  # log 10: all tokens are equally likely
      2.3026
    """
    x_NxD, targets_N, weights_N = sharding.shard_batch(
        (x_BxTxD.reshape(-1, x_BxTxD.shape[-1]), targets_BxT.reshape(-1), weights_BxT.reshape(-1))
    )
    loss_N, correct_N = _token_losses(_Logits(chunk, cap), x_NxD, head_DxV, targets_N)
    weight = weights_N.sum()
    share_N = weights_N / jnp.where(weight > 0, weight, 1)
    return (share_N * loss_N).sum(), Metrics((share_N * correct_N).sum(), weight)


def token_losses(
    x_NxD: jax.Array,
    head_DxV: jax.Array,
    targets_N: jax.Array,
    *,
    chunk: int = 2048,
    cap: float | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Computes each token's cross-entropy, and whether it is the likeliest one.

    Args:
      x_NxD: the model's output at the positions before the tokens.
      head_DxV: see `next_token_loss`.
      targets_N: int32, the tokens.
      chunk: see `next_token_loss`.
      cap: see `next_token_loss`.

    Returns:
      float32 [N] in nats, and float32 [N], 1 where the target is the likeliest token, else 0.
    """
    x_NxD, targets_N = sharding.shard_batch((x_NxD, targets_N))
    return _token_losses(_Logits(chunk, cap), x_NxD, head_DxV, targets_N)


class _Logits(NamedTuple):
    """How logits are computed."""

    chunk: int  # the largest number of columns of the head at once
    cap: float | None  # see `next_token_loss`


_TOKENS, _HEAD = P(sharding.BATCH), P("fsdp", "tensor")


# Chunks of the vocabulary rather than of tokens: the gradient of each column of the head comes from
# one product and is rounded once. With chunks of tokens the gradient of the whole head is a sum:
# 64 chunks in bfloat16 have 8 times the error of unchunked logits, and in float32 the sum takes
# twice the memory. A custom_vjp, because the derivative of the scan adds a whole head of mostly
# zeros for each chunk.
def _primal(
    how: _Logits, x_NxD: jax.Array, head_DxV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each token's loss, and 1.0 where its target is the likeliest token, else 0.0."""
    return _forward(how, x_NxD, head_DxV, targets_N)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(
    how: _Logits, x_NxD: jax.Array, head_DxV: jax.Array, targets_N: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    specs = (P(*_TOKENS, None), _HEAD, _TOKENS)
    run = _on_each_device(_part_forward, how, specs, (_TOKENS, _TOKENS, _TOKENS))
    loss_N, correct_N, logsumexp_N = run(x_NxD, head_DxV, targets_N)
    return (loss_N, correct_N), (x_NxD, head_DxV, targets_N, logsumexp_N)


def _part_forward(how, parallel, x_NxD, head_RxV, targets_N):
    def body(_, i):
        _, _, column_C, logits_NxC = _chunk(how, parallel, x_NxD, head_RxV, i)
        is_target_NxC = column_C == targets_N[:, None]
        best_N = logits_NxC.argmax(1)
        return None, (
            jax.nn.logsumexp(logits_NxC, axis=1),
            jnp.where(is_target_NxC, logits_NxC, 0).sum(1),
            logits_NxC.max(1),
            column_C[best_N],
        )

    chunks = jnp.arange(_num_chunks(how.chunk, head_RxV), dtype=jnp.int32)
    _, found = jax.lax.scan(body, None, chunks)
    if parallel:
        found = jax.lax.all_gather(found, "tensor", tiled=True)
    logsumexp_KxN, target_KxN, best_KxN, column_KxN = found
    logsumexp_N = jax.nn.logsumexp(logsumexp_KxN, axis=0)
    likeliest_N = jnp.take_along_axis(column_KxN, best_KxN.argmax(0)[None], axis=0)[0]
    correct_N = (likeliest_N == targets_N).astype(jnp.float32)
    return logsumexp_N - target_KxN.sum(0), correct_N, logsumexp_N


def _backward(
    how: _Logits, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    ct_N, _ = cotangents
    specs = (P(*_TOKENS, None), _HEAD, _TOKENS, _TOKENS, _TOKENS, _HEAD)
    run = _on_each_device(_part_backward, how, specs, (P(*_TOKENS, None), _HEAD))
    # Zeros are created here: inside shard_map, `evaluate_late` would not find them.
    dx_NxD, dhead_DxV = run(*residuals, ct_N, jnp.zeros_like(residuals[1]))
    return dx_NxD, dhead_DxV, None


def _part_backward(how, parallel, x_NxD, head_RxV, targets_N, logsumexp_N, ct_N, dhead_RxV):
    # The mean over thousands of tokens makes ct tiny: dividing by it avoids underflow in float16.
    scale = jnp.abs(ct_N).max()
    scale = jnp.where(scale > 0, scale, 1)
    dtype = head_RxV.dtype

    def body(i, carry):
        dx_NxD, dhead_RxV = carry
        start, head_DxC, column_C, logits_NxC = _chunk(how, parallel, x_NxD, head_RxV, i)
        is_target_NxC = (column_C == targets_N[:, None]).astype(jnp.float32)
        p_NxC = jnp.exp(logits_NxC - logsumexp_N[:, None])
        g_NxC = (p_NxC - is_target_NxC) * (ct_N / scale)[:, None]
        if how.cap is not None:
            # Columns that are not new have logit -inf and no gradient.
            share_NxC = jnp.where(jnp.isfinite(logits_NxC), logits_NxC, 0) / how.cap
            g_NxC *= 1 - jnp.square(share_NxC)
        g_NxC = g_NxC.astype(dtype)
        dx_NxD += _dot(g_NxC, head_DxC.T)
        # Added, not written: the columns shared with the previous chunk have g = 0 here.
        dhead_RxC = jax.lax.dynamic_slice_in_dim(dhead_RxV, start, len(column_C), axis=1)
        dhead_RxC += _reduce((scale * _dot(x_NxD.astype(dtype).T, g_NxC)).astype(dtype), parallel)
        return dx_NxD, jax.lax.dynamic_update_slice_in_dim(dhead_RxV, dhead_RxC, start, axis=1)

    dx_NxD = jnp.zeros(x_NxD.shape, jnp.float32)
    chunks = _num_chunks(how.chunk, head_RxV)
    dx_NxD, dhead_RxV = jax.lax.fori_loop(0, chunks, body, (dx_NxD, dhead_RxV))
    dx_NxD = (scale * dx_NxD).astype(x_NxD.dtype)
    return jax.lax.psum(dx_NxD, "tensor") if parallel else dx_NxD, dhead_RxV


_token_losses = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_token_losses.defvjp(_forward, _backward)


def _on_each_device(
    function: Callable[..., Any], how: _Logits, in_specs: Any, out_specs: Any
) -> Callable[..., tuple[jax.Array, ...]]:
    parallel = sharding.is_explicit()
    function = functools.partial(function, how, parallel)
    if not parallel:
        return function
    return jax.shard_map(function, in_specs=in_specs, out_specs=out_specs, check_vma=False)


def _num_chunks(chunk: int, head_RxV: jax.Array) -> int:
    return -(-head_RxV.shape[1] // chunk)


def _chunk(
    how: _Logits, parallel: bool, x_NxD: jax.Array, head_RxV: jax.Array, i: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns the start of chunk i, its columns of the head, their token ids, and its logits.

    If the vocabulary is not a multiple of the chunk's size, the last chunk starts early. The
    columns that it shares with the previous chunk get logit -inf and the id V, which is no target.
    """
    vocab = total = head_RxV.shape[1]
    size = -(-vocab // _num_chunks(how.chunk, head_RxV))
    start = jnp.minimum(i * size, vocab - size)
    head_DxC = jax.lax.dynamic_slice_in_dim(head_RxV, start, size, axis=1)
    column_C = start + jnp.arange(size, dtype=jnp.int32)
    is_new_C = column_C >= i * size
    if parallel:
        head_DxC = jax.lax.all_gather(head_DxC, "fsdp", tiled=True)
        column_C += jax.lax.axis_index("tensor") * vocab
        total *= jax.lax.axis_size("tensor")
    logits_NxC = _dot(x_NxD.astype(head_RxV.dtype), head_DxC)
    if how.cap is not None:
        logits_NxC = how.cap * jnp.tanh(logits_NxC / how.cap)
    return (
        start,
        head_DxC,
        jnp.where(is_new_C, column_C, total),
        jnp.where(is_new_C, logits_NxC, -jnp.inf),
    )


def _reduce(dhead_DxC: jax.Array, parallel: bool) -> jax.Array:
    """Sums a gradient over all tokens; each device gets its own rows."""
    if not parallel:
        return dhead_DxC
    dhead_RxC = jax.lax.psum_scatter(dhead_DxC, "fsdp", tiled=True)
    return jax.lax.psum(dhead_RxC, "data")


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
