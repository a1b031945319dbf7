"""Options of a step that have values of their own: loss scale, offload, rounding, remat."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from lomo_jax import _validate

ROUNDINGS = ("nearest", "stochastic")
REMAT_POLICIES = ("full", "attention", "products", "none")  # least memory first
SKIPS = ("step", "layers")
# Gradients are multiplied by the reciprocal of the loss scale: both are normal float32 numbers.
MIN_LOSS_SCALE, MAX_LOSS_SCALE = 2.0**-126, 2.0**126


@dataclasses.dataclass(frozen=True)
class Offload:
    """The arrays that a step stores in pinned host memory, and copies to the device layer by layer.

    The results do not change. On a GPU this trades memory for transfers over PCIe; on a CPU it
    changes nothing.

    Args:
      params: the parameters. Put them into host memory before the first step,
        ``jax.device_put(params, jax.memory.Space.Host)``; the step updates them there. Each layer
        is copied to the device once in the forward pass and once in the backward pass, and
        written back once.
      activations: the layer inputs that the forward pass saves for the backward pass.
      state: the optimizer's state; ``step.init`` puts it there.

    Example:
      >>> import jax, jax.numpy as jnp, lomo_jax
      >>> def loss_fn(params, x):
      ...     return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params)[0].mean()
      >>> step = lomo_jax.fused_step(
      ...     loss_fn, lomo_jax.lomo(0.1), offload=lomo_jax.Offload(params=True, activations=True)
      ... )
      >>> params = jax.device_put(jnp.ones((4, 8, 8)), jax.memory.Space.Host)
      >>> x = jnp.ones((2, 8))
      >>> params, state, out = jax.jit(step)(params, step.init(params, x), x)
      >>> params.sharding.memory_kind
      'pinned_host'
    """

    params: bool = False
    activations: bool = False
    state: bool = False


class LossScaleState(NamedTuple):
    """State of a `DynamicLossScale`."""

    scale: jax.Array  # float32 [], multiplies the loss of the next step
    good_steps: jax.Array  # int32 [], finite steps since the scale last changed


@dataclasses.dataclass(frozen=True)
class DynamicLossScale:
    """A loss scale that falls when a gradient overflows, and grows again.

    A step whose loss or gradient is not finite divides the scale by `factor` and skips the update,
    or a part of it (see `skip`). After `growth_interval` finite steps in a row the scale is
    multiplied by `factor`.

    With ``skip="step"`` no parameter can be updated before the last gradient is known to be finite,
    so the step makes two backward passes, as with ``clip_norm``, and takes about 1.7 times as long;
    together with ``clip_norm`` it costs nothing more. ``skip="layers"`` makes one backward pass.

    Args:
      initial: the first scale, at least `minimum`.
      growth_interval: finite steps in a row before the scale grows.
      factor: divides and multiplies the scale, above 1. Scaling by a power of two is exact.
      minimum: the smallest scale.
      skip: ``"step"`` leaves parameters and optimizer state bit-identical when a gradient
        overflows. ``"layers"`` applies the updates before the overflow in the backward pass, of
        the layers above, and skips the rest.

    Raises:
      ValueError: an argument is out of range.

    Example:
      >>> import jax.numpy as jnp, lomo_jax
      >>> scale = lomo_jax.DynamicLossScale(initial=1024.0)
      >>> state = scale.update(scale.init(), finite=jnp.array(False))
      >>> float(state.scale)
      512.0

    References:
      Micikevicius et al., `Mixed Precision Training <https://arxiv.org/abs/1710.03740>`_, 2017
    """

    initial: float = 2.0**16
    growth_interval: int = 2000
    factor: float = 2.0
    minimum: float = 1.0
    skip: str = "step"

    def __post_init__(self):
        _validate.number("minimum", self.minimum, low=MIN_LOSS_SCALE, high=MAX_LOSS_SCALE)
        _validate.number(
            "initial", self.initial, low=self.minimum, high=math.nextafter(MAX_LOSS_SCALE, math.inf)
        )
        _validate.integer("growth_interval", self.growth_interval, low=1)
        _validate.number("factor", self.factor, low=1.0, open_low=True)
        _validate.choice("skip", self.skip, SKIPS)

    def init(self) -> LossScaleState:
        """Returns the first state."""
        return LossScaleState(jnp.float32(self.initial), jnp.int32(0))

    def update(self, state: LossScaleState, finite: jax.Array) -> LossScaleState:
        """Returns the state after a step.

        Args:
          state: the state before the step.
          finite: bool [], whether loss and gradient were finite.
        """
        good_steps = state.good_steps + 1
        grows = good_steps >= self.growth_interval
        grown = jnp.minimum(state.scale * self.factor, MAX_LOSS_SCALE)
        after_good = LossScaleState(
            jnp.where(grows, grown, state.scale),
            jnp.where(grows, 0, good_steps),
        )
        after_bad = LossScaleState(
            jnp.maximum(state.scale / self.factor, self.minimum), jnp.zeros_like(good_steps)
        )
        return jax.tree.map(lambda a, b: jnp.where(finite, a, b), after_good, after_bad)
