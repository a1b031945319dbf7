"""LOMO: stochastic gradient descent with nothing to remember, as an optax transformation."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lomo_jax import _validate


class LomoState(NamedTuple):
    """State of `lomo`."""

    count: jax.typing.ArrayLike  # int32 [], updates made so far: the schedule's argument


def lomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_value: float | None = None,
) -> optax.GradientTransformation:
    r"""The update rule of LOMO, which keeps no statistics of the gradient.

    .. math::
        \theta \leftarrow \theta (1 - \eta \lambda) - \eta\, \mathrm{clip}(g)

    Computed in float32 whatever the dtype of the gradients: updates are float32, so that the sum
    with the parameter is rounded once, to the parameter's dtype.

    Args:
      learning_rate: :math:`\eta`, a float or a schedule from the number of updates made to a float.
      weight_decay: :math:`\lambda`, decoupled: multiplied by the learning rate.
      clip_value: each element of the gradient is clipped to [-clip_value, clip_value]; None for no
        clipping.

    Returns:
      An `optax.GradientTransformation`. `update` needs `params` if `weight_decay` is not 0.

    Raises:
      ValueError: an argument is outside its range.

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023
    """
    schedule = _validate.schedule("learning_rate", learning_rate)
    _validate.number("weight_decay", weight_decay, low=0.0)
    _validate.optional_number("clip_value", clip_value, low=0.0, open_low=True)
    decays = not isinstance(weight_decay, numbers.Real) or weight_decay != 0

    def init(params: optax.Params) -> LomoState:
        del params
        return LomoState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LomoState]:
        lr = jnp.asarray(schedule(state.count), jnp.float32)

        def descend(g, decay=0.0):
            g = g.astype(jnp.float32)
            if clip_value is not None:
                g = jnp.clip(g, -clip_value, clip_value)
            return -lr * (g + decay)

        if decays:
            decay = jax.tree.map(
                lambda p: weight_decay * p.astype(jnp.float32), _validate.params(params)
            )
            updates = jax.tree.map(descend, updates, decay)
        else:
            updates = jax.tree.map(descend, updates)
        return updates, LomoState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)
