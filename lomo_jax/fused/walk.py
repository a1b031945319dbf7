"""Runs a cut loss forward and back, showing every gradient to a visitor once it is complete."""

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs, offload
from lomo_jax.fused.cut import Cut, Dense, Layers
from lomo_jax.fused.microbatches import Piece, add, both, invert, merge, pick, widen
from lomo_jax.fused.order import evaluate_in_order
from lomo_jax.fused.remat import Kept, keep


class Visitor(Protocol):
    """What is done with gradients. Parameters are given by their index among the leaves."""

    def dense(self, indices: Sequence[int], grads: Sequence[jax.Array]) -> None:
        """Takes the gradients of parameters that are not stacked."""

    @property
    def together(self) -> bool:
        """Whether it takes all gradients of a layer at once."""
        ...

    def start(self, indices: Sequence[int], first: int, ahead: bool) -> Any:
        """Returns what to carry over the layers of stacked parameters, from layer `first` on.

        With `ahead` a layer is read before it is its turn, into the carry.
        """

    def layer(self, carry: Any, indices: Sequence[int], k: int, i: jax.Array) -> jax.Array:
        """Returns layer i of parameter `indices[k]`."""
        ...

    def visit(
        self,
        carry: Any,
        indices: Sequence[int],
        ks: Sequence[int],
        i: jax.Array,
        grads: Sequence[jax.Array],
    ) -> Any:
        """Takes the gradients of layer i of the parameters ks; returns the new carry."""

    def advance(self, carry: Any, following: jax.Array) -> Any:
        """Goes on to layer `following`; returns the new carry."""

    def finish(self, carry: Any) -> Any:
        """Returns what of the last carry `store` needs."""

    def store(self, result: Any, indices: Sequence[int]) -> None:
        """Takes what `finish` returned."""


class Walk:
    """A cut loss, run forward; `back` walks it back, once or more.

    Args:
      cut: the loss, traced with one microbatch.
      params: leaves of the parameters.
      batch: leaves of the batch; if there are several microbatches, with their axis in front.
      seed: the cotangent of the loss, [K], for each of K microbatches.
      remat: what the forward pass keeps of a layer, see `fused_step`.
      keep_on_host: whether that is kept in host memory.
    """

    def __init__(
        self,
        cut: Cut,
        params: Sequence[jax.Array],
        batch: Sequence[jax.Array],
        seed: jax.Array,
        *,
        remat: str | Callable[..., Any] = "full",
        keep_on_host: bool = False,
    ):
        self.cut, self.microbatches = cut, seed.shape[0]
        self.remat, self.keep_on_host = remat, keep_on_host
        self.values: dict[jex.Var, Any] = dict(
            zip([*cut.params, *cut.batch], [*params, *batch], strict=True)
        )
        loss_varies = self.vary([cut.loss])[0]
        self.seed = (seed if loss_varies else seed.sum()).astype(jaxprs.dtype(cut.loss))
        self.passes = [
            _DensePass(self, piece) if isinstance(piece, Dense) else _LayersPass(self, piece)
            for piece in cut.pieces
        ]

    def results(self) -> tuple[jax.Array, list[jax.Array]]:
        """The loss and the leaves of aux; if there are several microbatches, of each of them."""
        atoms = [self.cut.loss, *self.cut.aux]
        values = self.read(atoms)
        if self.microbatches > 1:
            values = self.spread(values, self.vary(atoms))
        loss, *aux = map(jnp.asarray, values)
        return loss, aux

    def back(self, visitor: Visitor) -> None:
        """Walks from the loss back to the parameters; `visitor` gets their gradients."""
        cotangents = Cotangents(self)
        if self.cut.differentiates([self.cut.loss])[0]:
            cotangents.add([self.cut.loss], [self.seed])
        for run in reversed(self.passes):
            run.back(cotangents, visitor)
            dense = run.piece.dense
            if dense:
                visitor.dense(dense, cotangents.take(self.cut.params[i] for i in dense))

    def again(self, value: jax.Array) -> jax.Array:
        """Makes the next walk wait for `value`, which the last one computed, and returns it.

        The caller must use what is returned. Otherwise XLA finds that the two walks have work in
        common, and keeps large results of the first for the second.
        """
        runs = [run for run in self.passes if isinstance(run, _DensePass)]
        args, value = jax.lax.optimization_barrier(([run.args for run in runs], value))
        for run, run_args in zip(runs, args, strict=True):
            run.args, run.first = run_args, False
        return value

    def read(self, atoms: Iterable[jaxprs.Atom]) -> list[Any]:
        """Their values, on the device."""
        return offload.to_device(self.stored(atoms))

    def stored(self, atoms: Iterable[jaxprs.Atom]) -> list[Any]:
        """Their values, where they are."""
        return [a.val if isinstance(a, jex.Literal) else self.values[a] for a in atoms]

    def vary(self, atoms: Iterable[jaxprs.Atom]) -> list[bool]:
        """For each atom: whether its value has an axis of microbatches in front."""
        several = self.microbatches > 1
        return [several and isinstance(a, jex.Var) and a in self.cut.of_batch for a in atoms]

    def spread(self, values: Sequence[Any], already: Sequence[bool]) -> list[Any]:
        """Puts the axis of microbatches in front of the values that do not have it already."""
        return [
            x if varies else jnp.broadcast_to(x, (self.microbatches, *jnp.shape(x)))
            for x, varies in zip(values, already, strict=True)
        ]


class Cotangents(dict):
    """Cotangents of variables, summed in float32 as they come, gone when they are taken."""

    def __init__(self, walk: Walk):
        self.walk = walk

    def add(self, variables: Iterable[Any], values: Iterable[jax.Array]) -> None:
        for var, value in zip(variables, values, strict=True):
            if var in self:
                value = widen(self[var]) + widen(value)
            # The gradient of a parameter is rounded no more on its way to the update.
            self[var] = value if var in self.walk.cut.params else value.astype(jaxprs.dtype(var))

    def take(self, variables: Iterable[jex.Var]) -> list[jax.Array]:
        variables = list(variables)
        zeros = [jaxprs.zeros(v) for v in variables]
        zeros = self.walk.spread(zeros, invert(self.walk.vary(variables)))
        return [self.pop(v, zero) for v, zero in zip(variables, zeros, strict=True)]


class _DensePass:
    """A dense piece, run forward."""

    def __init__(self, walk: Walk, piece: Dense):
        self.walk, self.piece, cut = walk, piece, walk.cut
        self.args = walk.read(piece.inputs)
        self.run = Piece(piece.function, walk.vary(piece.inputs), walk.vary(piece.outputs))
        self.diff_in = cut.differentiates(piece.inputs)
        self.first, self.grads = True, None
        has_loss = both([v is cut.loss for v in piece.outputs], cut.differentiates(piece.outputs))
        # A loss that the batch does not reach has one cotangent for all microbatches.
        is_of_each = walk.vary([cut.loss])[0] or walk.microbatches == 1
        if piece is cut.pieces[-1] and any(has_loss) and is_of_each:
            # Walked back at once, with what the forward pass computed; an earlier piece computes it
            # again when its turn comes.
            outputs, self.grads = self._vjp(self.diff_in, has_loss, [walk.seed], run=True)
            # The layers wait for the loss: computed last, it would keep the logits until then.
            inputs = pick(piece.inputs, self.diff_in)
            is_activation = [v not in cut.params for v in inputs]
            outputs, activations = jax.lax.optimization_barrier(
                (outputs, pick(self.grads, is_activation))
            )
            self.grads = merge(self.grads, activations, is_activation)
        else:
            outputs = self.run.run(self.args)
        walk.values.update(zip(piece.outputs, outputs, strict=True))

    def back(self, cotangents: Cotangents, visitor: Visitor) -> None:
        del visitor
        reached = [v in cotangents for v in self.piece.outputs]
        if not any(reached) or not any(self.diff_in):
            return
        ct_outputs = cotangents.take(pick(self.piece.outputs, reached))
        inputs = pick(self.piece.inputs, self.diff_in)
        known = [False] * len(inputs)
        if self.grads is not None:
            # A second walk computes the gradients of parameters again, which may be as large as
            # the parameters; those of activations are small enough to keep.
            known = [self.first or v not in self.walk.cut.params for v in inputs]
            cotangents.add(pick(inputs, known), pick(self.grads, known))
        if not all(known):
            wanted = merge(self.diff_in, invert(known), self.diff_in)
            _, grads = self._vjp(wanted, reached, ct_outputs)
            cotangents.add(pick(inputs, invert(known)), grads)

    def _vjp(self, diff_in, diff_out, cotangents, *, run=False):
        """`Piece.vjp`, not before its arguments are there."""
        args, cotangents, zero = jax.lax.optimization_barrier(
            (self.args, cotangents, jnp.float32(0))
        )
        return jaxprs.evaluate_late(
            lambda *args: self.run.vjp(args, diff_in, diff_out, cotangents, run=run), args, zero
        )


class _LayersPass:
    """A layer scan, run forward."""

    def __init__(self, walk: Walk, piece: Layers):
        self.walk, self.piece, cut, scan = walk, piece, walk.cut, piece.scan
        vary_carry = walk.vary(scan.carry_out)
        self.vary_xs, self.vary_ys = walk.vary(scan.xs), walk.vary(scan.ys)
        self.body = Piece(
            jex.jaxpr_as_fun(scan.body),
            [*walk.vary(scan.consts), *vary_carry, *self.vary_xs],
            [*vary_carry, *self.vary_ys],
        )
        # A carry that the batch reaches may start from something that it does not, such as zeros.
        spreads = both(vary_carry, invert(walk.vary(scan.carry)))
        self.consts, self.init = walk.read(scan.consts), walk.read(scan.carry)
        self.init = walk.spread(self.init, invert(spreads))
        self.xs = _swap(walk.stored(scan.xs), self.vary_xs)
        self.changed = jaxprs.changed_carry(scan)
        self.diff_consts = cut.differentiates(scan.consts)
        self.diff_carry = cut.differentiates(scan.carry_out)
        self.diff_xs = cut.differentiates(scan.xs)
        self.diff_in = [*self.diff_consts, *self.diff_carry, *self.diff_xs]

        self.diff_out = [*self.diff_carry, *cut.differentiates(scan.ys)]
        self.kept, forward = self._keep(), self.body
        if self.kept:
            forward = Piece(
                self.kept.forward,
                self.body.varies_in,
                [*self.body.varies_out, *self.kept.varies],
            )

        def layer(carry, x):
            results = forward.run([*self.consts, *carry, *offload.to_device(x)])
            carry_out, results = results[: len(carry)], results[len(carry) :]
            ys, values = results[: len(scan.ys)], results[len(scan.ys) :]
            stored = pick(carry, self.changed), values
            return carry_out, (ys, offload.to_host(stored) if walk.keep_on_host else stored)

        # Of the forward pass the input of each layer is stored, and what `remat` keeps.
        carry_out, (ys, self.stored) = jax.lax.scan(
            layer, self.init, self.xs, scan.length, scan.reverse, scan.unroll
        )
        walk.values.update(zip(scan.carry_out, carry_out, strict=True))
        walk.values.update(zip(scan.ys, _swap(ys, self.vary_ys), strict=True))

    def _keep(self) -> Kept | None:
        """What to keep beside the layer inputs; None if that is nothing."""
        outputs_vary = pick(self.body.varies_out, self.diff_out)
        # Microbatches that share some output but not all: rare, and the layer is computed again.
        mixed = any(outputs_vary) and not all(outputs_vary)
        if self.walk.remat == "full" or mixed or not (any(self.diff_out) and any(self.diff_in)):
            return None
        first = len(self.consts) + len(self.init)
        return keep(
            self.piece.scan.body,
            [first + k for k in self.piece.xs_params],
            self.walk.remat,
            self.body.varies_in,
            self.diff_in,
            self.diff_out,
        )

    def back(self, cotangents: Cotangents, visitor: Visitor) -> None:
        scan, stacked = self.piece.scan, self.piece.stacked
        reached = any(v in cotangents for v in [*scan.carry_out, *scan.ys])
        if not stacked and not (reached and any(self.diff_in)):
            return
        # What was kept is for cotangents of all outputs that may have one.
        diff_ys = (
            self.diff_out[len(scan.carry) :] if self.kept else [v in cotangents for v in scan.ys]
        )
        is_param = [k in self.piece.xs_params for k in range(len(scan.xs))]
        diff_others = both(self.diff_xs, invert(is_param))
        first, step = (0, 1) if scan.reverse else (scan.length - 1, -1)

        # All that is scanned over is read when it is needed: first what has a gradient to use.
        lazy = [*pick(range(len(scan.xs)), is_param), *pick(range(len(scan.xs)), invert(is_param))]
        others = pick(self.xs, invert(is_param))
        ct_ys = _swap(cotangents.take(pick(scan.ys, diff_ys)), pick(self.vary_ys, diff_ys))
        ct_carry = cotangents.take(pick(scan.carry_out, self.diff_carry))
        ct_consts = [
            jnp.zeros_like(c if varies else widen(c))
            for c, varies in zip(
                pick(self.consts, self.diff_consts),
                self.walk.vary(pick(scan.consts, self.diff_consts)),
                strict=True,
            )
        ]

        def layer_back(loop, x):
            i, carry, ct_carry, ct_consts = loop
            (inputs, values), ct_ys = offload.to_device(x)

            def gradients(layer, inputs, values, ct_carry, ct_ys, ct_consts):
                xs = [x for _, x in sorted(zip(lazy, layer, strict=True), key=lambda pair: pair[0])]
                _, grads = self.body.vjp(
                    [*self.consts, *merge(self.init, inputs, self.changed), *xs],
                    self.diff_in,
                    [*self.diff_carry, *diff_ys],
                    [*ct_carry, *ct_ys],
                    kept=self.kept and (self.kept.backward, values, self.kept.varies),
                )
                grads = iter(grads)
                ct_consts = [add(c, next(grads)) for c in ct_consts]
                ct_carry = [next(grads).astype(c.dtype) for c in ct_carry]
                ct_xs = [next(grads) if d else None for d in self.diff_xs]
                return pick(ct_xs, is_param), (ct_carry, ct_consts, pick(ct_xs, diff_others))

            def read(carry, k):
                if k < len(stacked):
                    return visitor.layer(carry, stacked, k, i)
                layer = jax.lax.dynamic_index_in_dim(others[k - len(stacked)], i, keepdims=False)
                return offload.to_device(layer)

            (ct_carry, ct_consts, ct_others), carry = evaluate_in_order(
                gradients,
                [jax.eval_shape(_first_layer, self.xs[k]) for k in lazy],
                (inputs, values, ct_carry, ct_ys, ct_consts),
                read,
                lambda carry, ks, grads: visitor.visit(carry, stacked, ks, i, grads),
                carry,
                together=visitor.together,
            )
            following = jnp.clip(i + step, 0, scan.length - 1)
            carry = visitor.advance(carry, following)
            return (following, carry, ct_carry, ct_consts), ct_others

        def run(ahead: bool):
            """Walks the layers back."""
            loop = (jnp.int32(first), visitor.start(stacked, first, ahead), ct_carry, ct_consts)
            (_, carry, *sums), ct_others = jax.lax.scan(
                layer_back, loop, (self.stored, ct_ys), scan.length, not scan.reverse
            )
            return visitor.finish(carry), *sums, ct_others

        # XLA for CPUs may put the last use of a layer after the write of the new one, and copies
        # the whole stack to keep the layer. It has no reason to if the layer was read before. A
        # layer that comes from host memory is read before to be fetched once.
        if any(map(offload.is_on_host, self.xs)):
            results = run(True)
        else:
            in_place = functools.partial(run, False)
            results = jax.lax.platform_dependent(
                cuda=in_place, rocm=in_place, default=functools.partial(run, True)
            )
        result, ct_carry, ct_consts, ct_others = results
        visitor.store(result, stacked)
        cotangents.add(pick(scan.consts, self.diff_consts), ct_consts)
        cotangents.add(
            pick(scan.xs, diff_others), _swap(ct_others, pick(self.vary_xs, diff_others))
        )
        starts = pick(scan.carry, self.diff_carry)
        # As in `spreads`, and a carry that parameters reach may start from something else, too.
        sums = both(
            self.walk.vary(pick(scan.carry_out, self.diff_carry)), invert(self.walk.vary(starts))
        )
        ct_starts = [widen(c).sum(0) if s else c for c, s in zip(ct_carry, sums, strict=True)]
        differentiable = self.walk.cut.differentiates(starts)
        cotangents.add(pick(starts, differentiable), pick(ct_starts, differentiable))


def _first_layer(stack: jax.Array) -> jax.Array:
    return offload.to_device(jax.lax.index_in_dim(stack, 0, keepdims=False))


def _swap(items: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """Swaps the axes of layers and of microbatches of the flagged ones."""
    return [jnp.swapaxes(x, 0, 1) if flag else x for x, flag in zip(items, flags, strict=True)]
