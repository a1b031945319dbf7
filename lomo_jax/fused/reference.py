"""The plain computation that the fused step is measured against."""

import jax
import jax.numpy as jnp

from lomo_jax.fused import jaxprs, microbatches, offload
from lomo_jax.fused.base import Result, Step
from lomo_jax.fused.cut import Layers
from lomo_jax.fused.update import layer_key
from lomo_jax.fused.visitors import all_finite, prepare, sum_of_squares


class ReferenceStep(Step):
    """See `reference_step`."""

    def _run(self, plan, params, states, batch, scale, key):
        params, states = offload.to_device((params, states))
        leaves = jax.tree.leaves(params)
        grads, share, loss, aux = self._gradient(plan, params, batch, scale)
        finite, norm = jnp.isfinite(loss).all(), None
        if self.measures:
            factor = self._factor(scale, None)
            norm = jnp.sqrt(sum_of_squares([prepare(g, factor) for g in grads.values()]))
            finite &= jnp.isfinite(norm)
        factor = self._factor(scale, norm)
        grads = {i: prepare(g, factor) for i, g in grads.items()}
        states = dict(states)
        # In the order of the walk, which matters to skip="layers" only.
        for piece in reversed(plan.cut.pieces):
            if isinstance(piece, Layers) and piece.stacked:
                keep = None
                if self.dynamic:
                    go_on = jnp.broadcast_to(finite, (piece.scan.length,))
                    if self.dynamic.skip == "layers":
                        flags = jax.vmap(all_finite)([grads[i] for i in piece.stacked])
                        # A scan that runs from the first layer to the last is walked the other way.
                        go_on &= jax.lax.cumprod(
                            flags.astype(jnp.int32), reverse=not piece.scan.reverse
                        ).astype(bool)
                        finite = go_on.all()
                    keep = ~go_on
                for i in piece.stacked:
                    updater = plan.updaters[i]
                    keys = jax.vmap(lambda layer, u=updater: layer_key(key, u, layer))(
                        jnp.arange(piece.scan.length)
                    )
                    leaves[i], states[i] = jax.vmap(updater.apply)(
                        grads[i], states[i], leaves[i], keys, keep
                    )
            if piece.dense:
                if self.dynamic and self.dynamic.skip == "layers":
                    finite &= all_finite([grads[i] for i in piece.dense])
                keep = ~finite if self.dynamic else None
                for i in piece.dense:
                    updater = plan.updaters[i]
                    leaves[i], states[i] = updater.apply(
                        grads[i], states[i], leaves[i], layer_key(key, updater), keep
                    )
        return Result(leaves, states, loss, aux, share, norm, finite)

    def _gradient(self, plan, params, batch, scale):
        """Returns gradients by index, share, loss and aux."""
        leaves, treedef = jax.tree.flatten(params)
        indices = list(plan.updaters)
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
        dtype = jaxprs.dtype(plan.cut.loss)
        if self.microbatches == 1:
            grads, (loss, _, aux) = gradient(trained, batch, seed)
            share = microbatches.shares(None, 1, dtype)
            return dict(zip(indices, grads, strict=True)), share, loss, aux

        weights = jax.lax.map(lambda part: seeded(trained, part, seed)[1][1], batch)
        share = microbatches.shares(weights, self.microbatches, dtype)

        def accumulate(totals, x):
            part, part_share = x
            grads, (loss, _, aux) = gradient(trained, part, part_share * seed.astype(share.dtype))
            return list(map(microbatches.add, totals, grads)), (loss, aux)

        zeros = [jnp.zeros_like(microbatches.widen(x)) for x in trained]
        grads, (loss, aux) = jax.lax.scan(accumulate, zeros, (batch, share))
        return dict(zip(indices, grads, strict=True)), share, loss, aux
