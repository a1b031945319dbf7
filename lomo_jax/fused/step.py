"""The fused step: a forward pass, and a backward pass that updates each layer on the way."""

import warnings
from typing import Any

import jax
import jax.numpy as jnp

from lomo_jax.fused import jaxprs
from lomo_jax.fused import microbatches as microbatches_lib
from lomo_jax.fused.arrays import Params, PyTree
from lomo_jax.fused.backward import backward
from lomo_jax.fused.base import Result, Step, StepState, TracedStep
from lomo_jax.fused.explain import explain
from lomo_jax.fused.forward import Saving, forward
from lomo_jax.fused.options import Offload
from lomo_jax.fused.tx import rule_by_ndim
from lomo_jax.fused.update import SumOfSquares, Update


class fused_step(Step):  # noqa: N801  # a transformation, like jax.custom_vjp
    r"""Turns a loss into a training step that never holds the whole gradient.

    The loss is traced and cut at every `jax.lax.scan` over parameters (``nn.scan``, ``nnx.scan``):
    its layers. The forward pass saves the input of each layer. The backward pass goes from the last
    layer to the first: it recomputes the layer, forms its gradient, applies `tx`, and writes the
    new layer in place before the next gradient exists. Parameters outside the layers are updated as
    soon as their gradient is complete; one that is used in several places is updated once, with the
    summed gradient. Besides parameters and state a step needs memory for the layer inputs, and for
    the parameters, gradient and activations of about one layer.

    Jit the step with parameters and state donated. Otherwise XLA copies both before it writes. On a
    GPU also pass `compiler_options`.

    With loss :math:`\ell`, loss scale :math:`s`, microbatches :math:`b_1 \dots b_K` and their
    shares :math:`w_k` of the loss (:math:`1/K`, or from `WeightedLoss`), `tx` gets

    .. math::
        g = c \, \frac{1}{s} \sum_k \nabla \left( s\, w_k\, \ell(\theta, b_k) \right), \qquad
        c = \min\left(1, \frac{\mathrm{clip\_norm}}{\lVert g / c \rVert + 10^{-6}}\right)

    in float32, and the result equals `reference_step` up to rounding. A stacked parameter
    [L, ...] is L parameters to `tx`: AdaLomo's root mean square, for example, is taken per layer.
    Every array of its state has the layer axis in front.

    *What may happen to a stack before its scan:* casts, masks, transposes and other operations that
    keep its layers apart run on one layer at a time, in the forward and in the backward pass. So do
    loops that index a stack by their counter, scans of parts of a stack, and a sum over a stack,
    such as a penalty. A stack that is used in another way gets its whole gradient: the result is
    right, the memory is not saved. ``init`` warns about it, and ``step.explain(params, batch)``
    says which gradients exist together, and why. *Models without a layer scan* gain little: all
    their gradients may exist at once, and it depends on XLA how early each is used.

    *Randomness.* A loss that draws random numbers takes a new key from the batch at every step, and
    gives each layer its own, as ``nn.scan`` does with ``split_rngs``, or a scan over
    ``jax.random.split(key, L)``. A key that is a scalar of the batch is split between microbatches.
    A recomputed layer draws the same numbers again. Callbacks and prints inside layers run each
    time that the layer is computed.

    *Several devices.* Shard the inputs under a mesh of Explicit axes, set with `jax.set_mesh`:
    parameters and state keep their shardings, gradients are sharded like their parameters, and a
    weight that a layer gathers with `jax.sharding.reshard` is gathered again for the backward pass.
    With Auto axes XLA decides. See `lomo_jax.sharding`.

    Example:
      >>> import jax, jax.numpy as jnp, lomo_jax
      >>> def loss_fn(params, batch):
      ...     layer = lambda x, w: (jnp.tanh(x @ w), None)
      ...     x, _ = jax.lax.scan(layer, batch["x"], params["layers"])
      ...     return jnp.mean((x - batch["y"]) ** 2)
      >>> params = {"layers": jnp.stack(4 * [jnp.eye(8)])}
      >>> batch = {"x": jnp.ones((2, 8)), "y": jnp.zeros((2, 8))}
      >>> step = lomo_jax.fused_step(loss_fn, lomo_jax.adalomo(0.1))
      >>> state = step.init(params, batch)
      >>> train_step = jax.jit(step, donate_argnums=(0, 1))
      >>> params, state, first = train_step(params, state, batch)
      >>> params, state, second = train_step(params, state, batch)
      >>> bool(second.loss < first.loss)
      True

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023
    """

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of XLA for `jax.jit`. They matter on GPUs, and have no effect on a CPU.

        With them XLA recomputes nothing that the step does not. (Left to itself it does near the
        limit of a GPU's memory, against which it counts what is in host memory too.) If the step
        moves data to the host or, under the mesh of `jax.set_mesh`, between devices, transfers run
        beside computing.

        Example:
          >>> import jax, jax.numpy as jnp, lomo_jax
          >>> offload = lomo_jax.Offload(params=True)
          >>> loss_fn = lambda w, x: (w @ x).sum()
          >>> step = lomo_jax.fused_step(loss_fn, lomo_jax.lomo(0.1), offload=offload)
          >>> train_step = jax.jit(
          ...     step, donate_argnums=(0, 1), compiler_options=step.compiler_options
          ... )
        """
        # Percent of the memory that XLA thinks is left. Where it thinks that it has too little it
        # recomputes, and its scheduler lets every transfer block.
        options: dict[str, Any] = {"xla_gpu_memory_limit_slop_factor": 100_000}
        if self.offload == Offload() and jax.sharding.get_abstract_mesh().size <= 1:
            return options
        return options | {
            "xla_gpu_enable_latency_hiding_scheduler": True,
            # A step gathers one weight and sums one gradient, and copies to the host and from it.
            "xla_gpu_experimental_parallel_collective_overlap_limit": 2,
            "xla_gpu_experimental_parallel_async_compute_limit": 16,
        }

    def init(self, params: Params, batch: PyTree) -> StepState:
        traced = self._trace(params, batch)
        explanation = explain(traced.loss, traced.names, traced.updaters, self.microbatches)
        of_tx = rule_by_ndim(self.tx, params, traced.loss.layer_axes)
        for message in filter(None, (explanation.warning, of_tx)):
            warnings.warn(message, stacklevel=2)
        return self._init(traced, params)

    def _run(
        self,
        traced: TracedStep,
        params: Params,
        states: dict[int, PyTree],
        batch: PyTree,
        scale: jax.Array | None,
        key: jax.Array | None,
    ) -> Result:
        loss, leaves, parts = traced.loss, jax.tree.leaves(params), jax.tree.leaves(batch)
        weights = None
        if loss.weight is not None and self.microbatches > 1:
            weight = loss.weight
            (weights,) = jax.lax.map(lambda part: weight(*part), parts)
        share = microbatches_lib.shares(weights, self.microbatches, jaxprs.dtype(loss.loss))
        run, seed = forward(
            loss,
            leaves,
            parts,
            share if scale is None else share * scale.astype(share.dtype),
            Saving(self.remat, self.offload.activations),
        )
        value, *aux = run.results([loss.loss, *loss.aux])
        traced = traced.with_value(value, share)
        finite, norm = jnp.isfinite(value).all(), None
        if self.needs_first_pass:
            squares = SumOfSquares(leaves, self._factor(scale, None))
            backward(run, [(loss.loss, seed)], squares)
            run, norm = run.begin_second_pass(jnp.sqrt(squares.total))
            finite &= jnp.isfinite(norm)
        update = Update(
            traced.updaters,
            leaves,
            states,
            factor=self._factor(scale, norm),
            key=key,
            finite=finite if self.dynamic else None,
            stop_at_overflow=self.dynamic is not None and self.dynamic.skip == "layers",
        )
        backward(run, [(loss.loss, seed)], update)
        if update.finite is not None:
            finite = update.finite
        aux = jax.tree.unflatten(loss.aux_tree, aux)
        return Result(update.params, update.states, value, aux, share, norm, finite)
