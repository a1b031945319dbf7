"""LOMO: stochastic gradient descent without optimizer state, as an optax transformation."""

import numbers
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lomo_jax import _validate


class LomoState(NamedTuple):
    """State of `lomo`."""

    count: jax.typing.ArrayLike  # int32 [], number of updates so far, the argument of the schedule


def lomo(
    learning_rate: optax.ScalarOrSchedule,
    *,
    weight_decay: float = 0.0,
    clip_value: float | None = None,
) -> optax.GradientTransformation:
    r"""The update rule of LOMO: stochastic gradient descent.

    .. math::
        \theta \leftarrow \theta (1 - \eta \lambda) - \eta\, \mathrm{clip}(g)

    Updates are computed and returned in float32, whatever the dtype of the gradients, so that their
    sum with the parameter is rounded once, to the parameter's dtype.

    Clip the gradient, with `clip_value` or with ``clip_norm`` of the step: without clipping LOMO
    can destroy a pretrained model.

    Args:
      learning_rate: :math:`\eta`, a float, or a schedule of the number of updates so far.
      weight_decay: :math:`\lambda`, decoupled, multiplied by the learning rate.
      clip_value: clips each element of the gradient to [-clip_value, clip_value]; None for no
        clipping.

    Returns:
      An `optax.GradientTransformation`. ``update`` needs `params` if `weight_decay` is not 0.

    Raises:
      ValueError: an argument is out of range. `init` and `update` raise it for complex parameters.

    Example:
      >>> import jax.numpy as jnp, lomo_jax
      >>> tx = lomo_jax.lomo(0.5)
      >>> params, grads = {"w": jnp.ones(2)}, {"w": jnp.array([1.0, -2.0])}
      >>> updates, state = tx.update(grads, tx.init(params), params)
      >>> updates["w"].tolist()
      [-0.5, 1.0]

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023
    """
    schedule = _validate.schedule("learning_rate", learning_rate)
    _validate.number("weight_decay", weight_decay, low=0.0)
    _validate.optional_number("clip_value", clip_value, low=0.0, open_low=True)
    decays = not isinstance(weight_decay, numbers.Real) or weight_decay != 0

    def init(params: optax.Params) -> LomoState:
        _validate.real("lomo", params)
        return LomoState(count=jnp.zeros([], jnp.int32))

    def update(
        updates: optax.Updates, state: Any, params: optax.Params | None = None
    ) -> tuple[optax.Updates, LomoState]:
        _validate.real("lomo", updates)
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
