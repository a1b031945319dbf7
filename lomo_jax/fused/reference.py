"""The reference step, which tests and benchmarks compare with the fused step."""

import functools

import jax
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs, microbatches
from lomo_jax.fused.arrays import Params, PyTree
from lomo_jax.fused.base import Result, Step, TracedStep
from lomo_jax.fused.trace import LayerScan, Stack
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
        traced = traced.with_value(loss, share)
        finite, norm = jnp.isfinite(loss).all(), None
        if self.needs_first_pass:
            factor = self._factor(scale, None)
            norm = jnp.sqrt(sum_of_squares([scale_gradient(g, factor) for g in grads.values()]))
            finite &= jnp.isfinite(norm)
        factor = self._factor(scale, norm)
        grads = {i: scale_gradient(g, factor) for i, g in grads.items()}
        leaves, states = jax.tree.leaves(params), dict(states)
        if not self.dynamic or self.dynamic.skip == "step":
            skip_update = ~finite if self.dynamic else None
            for i, updater in traced.updaters.items():
                leaves[i], states[i] = updater.apply_whole(
                    grads[i], states[i], leaves[i], key, skip_update
                )
            return Result(leaves, states, loss, aux, share, norm, finite)

        # Overflow in one layer skips those that the backward pass reaches later.
        for segment in reversed(traced.loss.program.segments):
            if isinstance(segment, LayerScan) and segment.stacked:
                go_on = self._finite_so_far(segment, grads, finite)
                finite = go_on.all()
                for stack in segment.stacked:
                    i, layers = stack.index, (stack, segment.scan.length)
                    leaf, state = traced.updaters[i].apply_whole(
                        _take(grads[i], *layers),
                        _take(states[i], *layers, axis=0),
                        _take(leaves[i], *layers),
                        key,
                        ~go_on,
                        stack.places[0].start,
                    )
                    leaves[i] = _put(leaves[i], leaf, stack)
                    states[i] = _put(states[i], state, stack, axis=0)
            if segment.dense:
                finite &= all_finite([grads[i] for i in segment.dense])
                for i in segment.dense:
                    leaves[i], states[i] = traced.updaters[i].apply_whole(
                        grads[i], states[i], leaves[i], key, ~finite
                    )
        return Result(leaves, states, loss, aux, share, norm, finite)

    def _finite_so_far(
        self, segment: LayerScan, grads: dict[int, jax.Array], finite: jax.Array
    ) -> jax.Array:
        """Returns for each layer whether the backward pass has met finite gradients only, [L]."""
        if segment.body:
            raise ValueError(
                "reference_step with DynamicLossScale(skip='layers') cannot follow a layer scan "
                "inside another scan: use skip='step', or fused_step"
            )
        length = segment.scan.length
        layers = [_take(grads[stack.index], stack, length) for stack in segment.stacked]
        axes = [stack.places[0].axis for stack in segment.stacked]
        flags = jax.vmap(all_finite, (axes,))(layers)
        # The backward pass of a scan from the last layer to the first begins at the first.
        return finite & jax.lax.cumprod(
            flags.astype(jnp.int32), reverse=not segment.scan.reverse
        ).astype(bool)

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


def _take(tree: PyTree, stack: Stack, length: int, axis: int | None = None) -> PyTree:
    """Returns `length` layers of a stack, which are on its own axis or on `axis`."""
    place = stack.places[0]
    axis, end = place.axis if axis is None else axis, place.start + length
    return jax.tree.map(lambda x: jax.lax.slice_in_dim(x, place.start, end, axis=axis), tree)


def _put(tree: PyTree, layers: PyTree, stack: Stack, axis: int | None = None) -> PyTree:
    """Replaces layers of a stack."""
    place = stack.places[0]
    write = functools.partial(
        jax.lax.dynamic_update_slice_in_dim,
        start_index=place.start,
        axis=place.axis if axis is None else axis,
    )
    return jax.tree.map(write, tree, layers)
