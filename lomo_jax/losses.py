"""Next-token loss that never holds all the logits.

Dimension key: B batch, T sequence, N = B*T tokens, D width, V vocabulary, C vocabulary columns in one chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class Metrics(NamedTuple):
    """What `next_token_loss` counts besides the loss."""

    accuracy: jax.Array  # float32 scalar: weighted share of targets that are the likeliest token
    weight: jax.Array  # float32 scalar: sum of the weights, to combine batches by


def next_token_loss(
    x_BxTxD: jax.Array,
    head_DxV: jax.Array,
    targets_BxT: jax.Array,
    weights_BxT: jax.Array,
    *,
    chunk: int = 4096,
) -> tuple[jax.Array, Metrics]:
    """Mean cross-entropy of `softmax(x @ head)` against the targets.

    The logits exist for `chunk` columns of the vocabulary at a time, in float32, and once more in
    the backward pass: memory is `4 * B * T * chunk` bytes, not `4 * B * T * V`.

    Args:
      x_BxTxD: the model's output after its final norm, any float dtype.
      head_DxV: the output embedding, any float dtype; the products run in this dtype and sum in
        float32.
      targets_BxT: int32, the token to predict at each place.
      weights_BxT: float32, how much each place counts; 0 leaves it out.
      chunk: columns of the vocabulary computed at once.

    Returns:
      The loss, a float32 scalar averaged over the weights (0 where every weight is 0), and `Metrics`.
    """
    logits_NxV = jnp.einsum("btd,dv->btv", x_BxTxD, head_DxV, preferred_element_type=jnp.float32)
    losses = jax.nn.logsumexp(logits_NxV, -1) - jnp.take_along_axis(
        logits_NxV, targets_BxT[..., None], -1
    ).squeeze(-1)
    weight = weights_BxT.sum()
    mean = jnp.where(weight > 0, weight, 1)
    correct = (logits_NxV.argmax(-1) == targets_BxT) * weights_BxT
    return (losses * weights_BxT).sum() / mean, Metrics(correct.sum() / mean, weight)
