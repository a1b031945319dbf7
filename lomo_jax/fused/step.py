"""fused_step and reference_step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused import microbatches as microbatches_lib
from lomo_jax.fused.base import Result, Step
from lomo_jax.fused.loss_scale import DynamicLossScale
from lomo_jax.fused.reference import ReferenceStep
from lomo_jax.fused.visitors import Measure, Update
from lomo_jax.fused.walk import Walk


class FusedStep(Step):
    """See `fused_step`."""

    def _run(self, plan, params, states, batch, scale, key):
        leaves, parts = jax.tree.leaves(params), jax.tree.leaves(batch)
        share = jnp.ones(1)
        if self.microbatches > 1:
            weights = None
            if plan.cut.weight is not None:
                (weights,) = jax.lax.map(lambda part: plan.cut.weight(*part), parts)
            share = microbatches_lib.shares(weights, self.microbatches)
        walk = Walk(plan.cut, leaves, parts, share if scale is None else share * scale)
        loss, aux = walk.results()
        finite, norm = jnp.isfinite(loss).all(), None
        if self.measures:
            measure = Measure(leaves, self._factor(scale, None))
            walk.back(measure)
            norm = jnp.sqrt(measure.total)
            finite &= jnp.isfinite(norm)
        update = Update(
            plan.updaters,
            leaves,
            states,
            factor=self._factor(scale, norm),
            key=key,
            finite=finite if self.dynamic else None,
            watch=self.dynamic is not None and self.dynamic.skip == "layers",
        )
        walk.back(update, after=norm)
        if update.finite is not None:
            finite = update.finite
        aux = jax.tree.unflatten(plan.cut.aux_tree, aux)
        return Result(update.params, update.states, loss, aux, share, norm, finite)


def fused_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    clip_norm: float | None = None,
    microbatches: int = 1,
    loss_scale: float | DynamicLossScale | None = None,
    rounding: str = "nearest",
    trainable: Any = None,
) -> Step:
    """Turns a loss into a training step that never holds the whole gradient.

    The loss is traced and cut at every `jax.lax.scan` that scans over parameters (`nn.scan`,
    `nnx.scan`), its layers. The forward pass keeps the input of each layer. The backward pass takes
    the layers from the last to the first: a layer is computed again, its gradient formed, `tx`
    applied and the layer's parameters written in place before the next gradient exists. Parameters
    outside the layers are updated as soon as their gradient is complete, those used in several
    places once, with the sum.

    Jit the step with parameters and state donated, or the in-place update becomes a copy::

        step = lomo_jax.fused_step(loss_fn, lomo_jax.adalomo(1e-3))
        state = step.init(params, batch)
        train = jax.jit(step, donate_argnums=(0, 1))
        params, state, out = train(params, state, batch)

    The result equals that of `reference_step` up to rounding. A stacked parameter [L, ...] is L
    parameters to `tx`: whatever it computes of a parameter, such as AdaLomo's root mean square, it
    computes of one layer. Its state has the layer axis in front of every array, counts too.
    Callbacks and prints inside layers happen twice: when a layer is computed, and when it is
    computed again.

    Beside parameters and state a step needs the layer inputs, and one layer's parameters, gradient
    and activations a few times over. A model without a layer scan has all its gradients in one
    piece; it depends on XLA how early each is used up.

    Args:
      loss_fn: `(params, batch) -> loss`, or `(loss, aux)` with `has_aux`. The loss is a scalar of
        floating point. A checkpoint around the layers or inside them is allowed and not needed.
        `params` is a pytree of arrays; leaves that are not of floating point stay as they are.
      tx: an optax transformation that updates each parameter from its own gradient, value and
        state. It sees trees with the paths of `params`, in which leaves of other pieces are
        `optax.MaskedNode`. One that draws random numbers from a key in its state, such as
        `optax.add_noise`, draws the same for every layer.
      has_aux: whether `loss_fn` returns something beside the loss.

    Returns:
      A `Step`: `init(params, batch)` makes the state, a call makes one update. New parameters have
      the dtypes of the old ones: update and parameter are added in float32 and rounded once.

    Raises (when the step is traced):
      TypeError: the loss is not a floating-point scalar.
      ValueError: the layers of a stacked parameter cannot be updated one by one (it reaches the
        scan through a cast or transpose, is used outside the scan too, or is scanned inside an
        operation that cannot be cut, such as `cond`); `tx` mixes parameters; the state does not
        fit.

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023
    """
    return FusedStep(loss_fn, tx, has_aux, clip_norm, microbatches, loss_scale, rounding, trainable)


def reference_step(
    loss_fn: Callable[..., Any],
    tx: optax.GradientTransformation,
    *,
    has_aux: bool = False,
    clip_norm: float | None = None,
    microbatches: int = 1,
    loss_scale: float | DynamicLossScale | None = None,
    rounding: str = "nearest",
    trainable: Any = None,
) -> Step:
    """The plain computation that `fused_step` is measured against.

    Computes the whole gradient with `jax.value_and_grad`, then applies `tx`, to stacked parameters
    under `jax.vmap` over their layers. Arguments, state and results are those of `fused_step`.
    """
    return ReferenceStep(
        loss_fn, tx, has_aux, clip_norm, microbatches, loss_scale, rounding, trainable
    )
