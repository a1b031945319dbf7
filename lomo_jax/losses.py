"""Next-token loss that never holds all the logits.

Dimension key: B batch, T sequence, N = B*T tokens, D width, V vocabulary, C columns of one chunk
of the vocabulary, K chunks.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Metrics(NamedTuple):
    """What `next_token_loss` counts besides the loss."""

    accuracy: jax.Array  # float32 scalar: weighted share of targets that are the likeliest token
    weight: jax.Array  # float32 scalar: sum of the weights, by which batches are averaged


def next_token_loss(
    x_BxTxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    chunk: int = 2048,
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of `softmax(x @ head)` against the targets.

    The logits exist for at most `chunk` tokens of the vocabulary at a time and are computed again
    in the backward pass: `4 * B * T * chunk` bytes, like an activation, not `4 * B * T * V`.

    Args:
      x_BxTxD: the model's output after its final norm, any float dtype.
      head_DxV: the output embedding, any float dtype. The products run in this dtype; they sum in
        float32, as does everything else.
      targets_BxT: int32, the token to predict at each place; any number where the weight is 0.
      weights_BxT: float32, how much each place counts.
      chunk: the most columns of the head multiplied at once.

    Returns:
      The loss, a float32 scalar averaged over the weights (0 where they are all 0), and `Metrics`.
    """
    num_chunks = -(-head_DxV.shape[1] // chunk)
    loss_N, correct_N = _token_losses(
        num_chunks, x_BxTxD.reshape(-1, x_BxTxD.shape[-1]), head_DxV, targets_BxT.reshape(-1)
    )
    weights_N = weights_BxT.reshape(-1)
    weight = weights_N.sum()
    share_N = weights_N / jnp.where(weight > 0, weight, 1)
    return jnp.vdot(share_N, loss_N), Metrics(jnp.vdot(share_N, correct_N), weight)


# Why chunks of the vocabulary and not of tokens: a column of the head then gets its gradient from
# one product, rounded once. Chunks of tokens add up the gradient of the whole head: 64 of them, in
# bfloat16, leave 8 times the error of unchunked logits, and in float32 take twice the memory.
# Why a custom_vjp: the scan's own derivative adds a whole head of mostly zeros for each chunk.
def _primal(
    num_chunks: int, x_NxD: jax.Array, head_DxV: jax.Array, targets_N: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """Returns each token's loss, and 1.0 where its target is the likeliest token, else 0.0."""
    return _forward(num_chunks, x_NxD, head_DxV, targets_N)[0]


_Residuals = tuple[jax.Array, jax.Array, jax.Array, jax.Array]


def _forward(
    num_chunks: int, x_NxD: jax.Array, head_DxV: jax.Array, targets_N: jax.Array
) -> tuple[tuple[jax.Array, jax.Array], _Residuals]:
    def body(_, i):
        _, _, column_C, logits_NxC = _chunk(num_chunks, x_NxD, head_DxV, i)
        is_target_NxC = column_C == targets_N[:, None]
        best_N = logits_NxC.argmax(1)
        return None, (
            jax.nn.logsumexp(logits_NxC, axis=1),
            jnp.where(is_target_NxC, logits_NxC, 0).sum(1),
            logits_NxC.max(1),
            column_C[best_N],
        )

    _, (logsumexp_KxN, target_KxN, best_KxN, column_KxN) = jax.lax.scan(
        body, None, jnp.arange(num_chunks, dtype=jnp.int32)
    )
    logsumexp_N = jax.nn.logsumexp(logsumexp_KxN, axis=0)
    likeliest_N = jnp.take_along_axis(column_KxN, best_KxN.argmax(0)[None], axis=0)[0]
    correct_N = (likeliest_N == targets_N).astype(jnp.float32)
    outputs = logsumexp_N - target_KxN.sum(0), correct_N
    return outputs, (x_NxD, head_DxV, targets_N, logsumexp_N)


def _backward(
    num_chunks: int, residuals: _Residuals, cotangents: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array, None]:
    x_NxD, head_DxV, targets_N, logsumexp_N = residuals
    ct_N, _ = cotangents
    # A mean over thousands of tokens makes ct tiny: divided out, it does not underflow in float16.
    scale = jnp.abs(ct_N).max()
    scale = jnp.where(scale > 0, scale, 1)
    dtype = head_DxV.dtype

    def body(i, carry):
        dx_NxD, dhead_DxV = carry
        start, head_DxC, column_C, logits_NxC = _chunk(num_chunks, x_NxD, head_DxV, i)
        is_target_NxC = (column_C == targets_N[:, None]).astype(jnp.float32)
        p_NxC = jnp.exp(logits_NxC - logsumexp_N[:, None])
        g_NxC = ((p_NxC - is_target_NxC) * (ct_N / scale)[:, None]).astype(dtype)
        dx_NxD += _dot(g_NxC, head_DxC.T)
        # Added, not written: columns that the chunk shares with the one before have g = 0 here.
        dhead_DxC = jax.lax.dynamic_slice_in_dim(dhead_DxV, start, len(column_C), axis=1)
        dhead_DxC += (scale * _dot(x_NxD.astype(dtype).T, g_NxC)).astype(dtype)
        return dx_NxD, jax.lax.dynamic_update_slice_in_dim(dhead_DxV, dhead_DxC, start, axis=1)

    dx_NxD, dhead_DxV = jax.lax.fori_loop(
        0, num_chunks, body, (jnp.zeros(x_NxD.shape, jnp.float32), jnp.zeros_like(head_DxV))
    )
    return (scale * dx_NxD).astype(x_NxD.dtype), dhead_DxV, None


_token_losses = jax.custom_vjp(_primal, nondiff_argnums=(0,))
_token_losses.defvjp(_forward, _backward)


def _chunk(
    num_chunks: int, x_NxD: jax.Array, head_DxV: jax.Array, i: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns chunk i's start, its part of the head, its columns' numbers and its logits.

    Where the vocabulary does not divide evenly, the last chunk starts early. The columns it shares
    with the chunk before have logit -inf and the number V, which is no target.
    """
    vocab = head_DxV.shape[1]
    size = -(-vocab // num_chunks)
    start = jnp.minimum(i * size, vocab - size)
    head_DxC = jax.lax.dynamic_slice_in_dim(head_DxV, start, size, axis=1)
    column_C = start + jnp.arange(size, dtype=jnp.int32)
    is_new_C = column_C >= i * size
    logits_NxC = _dot(x_NxD.astype(head_DxV.dtype), head_DxC)
    return (
        start,
        head_DxC,
        jnp.where(is_new_C, column_C, vocab),
        jnp.where(is_new_C, logits_NxC, -jnp.inf),
    )


def _dot(a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.dot(a, b, preferred_element_type=jnp.float32)
