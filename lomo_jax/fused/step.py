"""fused_step and reference_step."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused import jaxprs
from lomo_jax.fused import microbatches as microbatches_lib
from lomo_jax.fused.base import Result, Step
from lomo_jax.fused.loss_scale import DynamicLossScale
from lomo_jax.fused.offload import Offload
from lomo_jax.fused.reference import ReferenceStep
from lomo_jax.fused.visitors import Measure, Update
from lomo_jax.fused.walk import Walk


class FusedStep(Step):
    """See `fused_step`."""

    def _run(self, plan, params, states, batch, scale, key):
        leaves, parts = jax.tree.leaves(params), jax.tree.leaves(batch)
        weights, weight = None, plan.cut.weight
        if weight is not None and self.microbatches > 1:
            (weights,) = jax.lax.map(lambda part: weight(*part), parts)
        share = microbatches_lib.shares(weights, self.microbatches, jaxprs.dtype(plan.cut.loss))
        walk = Walk(
            plan.cut,
            leaves,
            parts,
            share if scale is None else share * scale.astype(share.dtype),
            remat=self.remat,
            keep_on_host=self.offloads.activations,
        )
        loss, aux = walk.results()
        finite, norm = jnp.isfinite(loss).all(), None
        if self.measures:
            measure = Measure(leaves, self._factor(scale, None))
            walk.back(measure)
            norm = walk.again(jnp.sqrt(measure.total))
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
        walk.back(update)
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
    offload: Offload | None = None,
    remat: str | Callable[..., Any] = "full",
) -> Step:
    r"""Turns a loss into a training step that never holds the whole gradient.

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

    With loss :math:`\ell`, loss scale :math:`s`, microbatches :math:`b_1 \dots b_K` and their
    shares :math:`w_k` of the loss (:math:`1/K`, or those of `WeightedLoss`), `tx` gets

    .. math::
        g = c \, \frac{1}{s} \sum_k \nabla \left( s\, w_k\, \ell(\theta, b_k) \right), \qquad
        c = \min\left(1, \frac{\mathrm{clip\_norm}}{\lVert g / c \rVert + 10^{-6}}\right)

    in float32, and the result equals that of `reference_step` up to rounding. A stacked parameter
    [L, ...] is L parameters to `tx`: whatever it computes of a parameter, such as AdaLomo's root
    mean square, it computes of one layer. `rms`, `Factors` and counts in its state have the layer
    axis in front. The state is a pytree of arrays; saved and restored, the run goes on as it would
    have.

    Beside parameters and state a step needs the layer inputs, and one layer's parameters, gradient
    and activations a few times over. A model without a layer scan has all its gradients in one
    piece; it depends on XLA how early each is used up.

    *Randomness.* A loss that draws random numbers takes its key from the batch, another one at
    each step, and gives each layer its own, as `nn.scan` does with `split_rngs` or a scan over
    `jax.random.split(key, L)`. With microbatches a key that is a scalar of the batch is split, one
    for each. A layer that is computed again draws what it drew before. Callbacks and prints inside
    layers happen each time that the layer is computed.

    *Several devices.* Under a mesh of Explicit axes, set by `jax.set_mesh`, parameters and state
    stay divided as they are, gradients are divided like their parameters, and a weight that a layer
    gathers with `jax.sharding.reshard` is gathered again rather than kept. Over Auto axes XLA
    decides. See `lomo_jax.sharding`.

    Args:
      loss_fn: `(params, batch) -> loss`, or `(loss, aux)` with `has_aux`. The loss is a scalar of
        floating point, or a `WeightedLoss`. A checkpoint around the layers or inside them is
        allowed and not needed. `params` is a pytree of arrays; leaves that are not of floating
        point stay as they are.
      tx: an optax transformation that updates each parameter from its own gradient, value and
        state. It sees trees with the paths of `params`, one parameter at a time, the other leaves
        masked by `optax.MaskedNode`: masks and labels by path work. It gets gradients in float32
        (float64 of float64 parameters); its state keeps the dtypes of `tx.init`. One that draws
        random numbers from a key in its state, such as `optax.add_noise`, draws the same for every
        parameter and layer. Extra arguments, such as the loss, are not passed.
      has_aux: whether `loss_fn` returns something beside the loss.
      clip_norm: scales the gradient down to this global norm, that of all trainable parameters
        together. Infinity measures the norm and clips nothing. The layers are walked back twice,
        from the same stored inputs, the first time to add up squares; a step takes 1.7 times as
        long. `None`: no clipping, and no norm in the output.
      microbatches: splits the leading axis [B, ...] of every leaf of the batch in K, [K, B/K, ...];
        microbatch k has the rows k, k + K, ..., so that a batch which is divided among devices
        stays where it is. Scalars go to every microbatch.
        Activations then need memory for one microbatch, layer inputs still for all. Each layer
        takes all microbatches before the next, its gradient summed in float32. The loss is the mean
        over the microbatches, weighted if it is a `WeightedLoss`.
      loss_scale: what the loss is multiplied by and gradients are divided by, so that float16 can
        hold them: a number, or a `DynamicLossScale`, which skips steps that overflow. Without
        `clip_norm`, skipping a whole step costs what `clip_norm` does; see there.
      rounding: of the sum of parameter and update, computed in float32, to bfloat16 or float16.
        "nearest", or "stochastic": up or down at random, so that updates below half the distance
        between two numbers count on average. The key is in the state, and starts from 0.
      trainable: which parameters to train: a predicate on the name of a parameter, such as
        "layers/attention/query" (`jax.tree_util.keystr(path, simple=True, separator="/")`), or a
        pytree of bool, of the structure of `params` or a prefix of it. The others have neither
        gradient nor state. Layers below the first trainable parameter are not walked back.
      offload: what lives in host memory instead of the device's: an `Offload`.
      remat: what the forward pass keeps of a layer for the backward pass, which computes the rest
        again. "full": the layer's input alone, and the backward pass runs the layer again.
        "attention": also the results of attention, those of cuDNN's flash attention and values
        named "attention" by `jax.ad_checkpoint.checkpoint_name`. "none": all that `jax.vjp` keeps.
        Or a policy of `jax.checkpoint_policies`. It takes the place of a checkpoint around the
        whole layer; one inside the layer stays as it is. What is kept exists for all layers.

    Returns:
      A `Step`: `init(params, batch)` makes the state, a call makes one update. New parameters have
      the dtypes of the old ones.

    Raises:
      ValueError: an option is out of its range, or two of them do not go together. When the step
        is traced: the layers of a stacked parameter cannot be updated one by one (it reaches the
        scan through a cast or transpose, is used outside the scan too, or is scanned inside an
        operation that cannot be cut, such as `cond`); `tx` mixes parameters; the batch does not
        split into the microbatches; `trainable` fits no parameter; the state does not fit.
      TypeError: the loss is not a floating-point scalar, or a parameter is not an array.

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023
    """
    return FusedStep(
        loss_fn,
        tx,
        has_aux,
        clip_norm,
        microbatches,
        loss_scale,
        rounding,
        trainable,
        offload,
        remat,
    )


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
    offload: Offload | None = None,
    remat: str | Callable[..., Any] = "full",
) -> Step:
    """The plain computation that `fused_step` is measured against.

    Computes the whole gradient with `jax.value_and_grad`, then applies `tx`, to stacked parameters
    under `jax.vmap` over their layers. Arguments, state and results are those of `fused_step`.
    """
    return ReferenceStep(
        loss_fn,
        tx,
        has_aux,
        clip_norm,
        microbatches,
        loss_scale,
        rounding,
        trainable,
        offload,
        remat,
    )
