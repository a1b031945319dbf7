"""The reference step, which tests and benchmarks compare with the fused step."""

import jax
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs, microbatches
from lomo_jax.fused.arrays import Params, PyTree
from lomo_jax.fused.base import Result, Step, TracedStep
from lomo_jax.fused.trace import LayerScan
from lomo_jax.fused.update import all_finite, scale_gradient, sum_of_squares


class reference_step(Step):  # noqa: N801  # a transformation, like jax.custom_vjp
    """A step like `fused_step`, computed without fusion.

    Computes the whole gradient with `jax.value_and_grad`, then applies `tx`, to stacked parameters
    under `jax.vmap` over their layers. Arguments, state and results are as for `fused_step`.
    """

    def _run(
        self,
        traced: TracedStep,
        params: Params,
        states: dict[int, PyTree],
        batch: PyTree,
        scale: jax.Array | None,
        key: jax.Array | None,
    ) -> Result:
        params, states = arrays.to_device((params, states))
        grads, share, loss, aux = self._gradient(traced, params, batch, scale)
        finite, norm = jnp.isfinite(loss).all(), None
        if self.needs_first_pass:
            factor = self._factor(scale, None)
            norm = jnp.sqrt(sum_of_squares([scale_gradient(g, factor) for g in grads.values()]))
            finite &= jnp.isfinite(norm)
        factor = self._factor(scale, norm)
        grads = {i: scale_gradient(g, factor) for i, g in grads.items()}
        leaves, states = jax.tree.leaves(params), dict(states)
        # In the order of the backward pass, which matters to skip="layers" only.
        for segment in reversed(traced.loss.segments):
            if isinstance(segment, LayerScan) and segment.stacked:
                skip_update = None
                if self.dynamic:
                    go_on = self._finite_so_far(segment, grads, finite)
                    if self.dynamic.skip == "layers":
                        finite = go_on.all()
                    skip_update = ~go_on
                for i in segment.stacked:
                    updater = traced.updaters[i]
                    keys = jax.vmap(lambda layer, u=updater: u.key(key, layer))(
                        jnp.arange(segment.scan.length)
                    )
                    leaves[i], states[i] = jax.vmap(updater.apply)(
                        grads[i], states[i], leaves[i], keys, skip_update
                    )
            if segment.dense:
                if self.dynamic and self.dynamic.skip == "layers":
                    finite &= all_finite([grads[i] for i in segment.dense])
                skip_update = ~finite if self.dynamic else None
                for i in segment.dense:
                    updater = traced.updaters[i]
                    leaves[i], states[i] = updater.apply(
                        grads[i], states[i], leaves[i], updater.key(key), skip_update
                    )
        return Result(leaves, states, loss, aux, share, norm, finite)

    def _finite_so_far(
        self, segment: LayerScan, grads: dict[int, jax.Array], finite: jax.Array
    ) -> jax.Array:
        """Returns for each layer whether the backward pass has met finite gradients only, [L]."""
        go_on = jnp.broadcast_to(finite, (segment.scan.length,))
        if self.dynamic and self.dynamic.skip == "layers":
            flags = jax.vmap(all_finite)([grads[i] for i in segment.stacked])
            # The backward pass of a scan from the last layer to the first begins at the first.
            go_on &= jax.lax.cumprod(
                flags.astype(jnp.int32), reverse=not segment.scan.reverse
            ).astype(bool)
        return go_on

    def _gradient(
        self, traced: TracedStep, params: Params, batch: PyTree, scale: jax.Array | None
    ) -> tuple[dict[int, jax.Array], jax.Array, jax.Array, PyTree]:
        """Returns gradients by the index of the parameter, shares, loss and aux."""
        leaves, treedef = jax.tree.flatten(params)
        indices = list(traced.updaters)
        trained = [leaves[i] for i in indices]
        seed = jnp.float32(1.0) if scale is None else scale

        def seeded(values, part, seed):
            """Returns (seed * loss, (loss, weight, aux)) of one microbatch."""
            merged = dict(enumerate(leaves)) | dict(zip(indices, values, strict=True))
            result = self.loss_fn(jax.tree.unflatten(treedef, merged.values()), part)
            loss, aux = result if self.has_aux else (result, None)
            loss, weight = loss if isinstance(loss, microbatches.WeightedLoss) else (loss, None)
            loss = jnp.asarray(loss)
            return seed.astype(loss.dtype) * loss, (loss, weight, aux)

        gradient = jax.grad(seeded, has_aux=True)
        dtype = jaxprs.dtype(traced.loss.loss)
        if self.microbatches == 1:
            grads, (loss, _, aux) = gradient(trained, batch, seed)
            share = microbatches.shares(None, 1, dtype)
            return dict(zip(indices, grads, strict=True)), share, loss, aux

        weights = jax.lax.map(lambda part: seeded(trained, part, seed)[1][1], batch)
        share = microbatches.shares(weights, self.microbatches, dtype)

        def accumulate(totals, x):
            part, part_share = x
            grads, (loss, _, aux) = gradient(trained, part, part_share * seed.astype(share.dtype))
            return list(map(arrays.add, totals, grads)), (loss, aux)

        zeros = [jnp.zeros_like(arrays.widen(x)) for x in trained]
        grads, (loss, aux) = jax.lax.scan(accumulate, zeros, (batch, share))
        return dict(zip(indices, grads, strict=True)), share, loss, aux
