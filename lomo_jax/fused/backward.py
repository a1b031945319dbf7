"""The backward pass: hands each gradient to a consumer as soon as it exists, then drops it.

A dense segment is one `jax.vjp`. A layer scan is a loop from the last layer to the first, whose
carry holds the stacked parameters: recompute layer i, form its gradient, let the consumer write the
new layer in place, continue with layer i - 1.
"""

import dataclasses
import functools
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs
from lomo_jax.fused.arrays import Part, Place, PyTree, add, widen
from lomo_jax.fused.flags import scatter, select, zip_and, zip_not
from lomo_jax.fused.forward import (
    DensePass,
    ForwardPass,
    LayersPass,
    Values,
    run_segments,
    swap_axes,
)
from lomo_jax.fused.order import Steps, TracedLayer, divide, trace_layer
from lomo_jax.fused.pipeline import Layer, evaluate, read_first
from lomo_jax.fused.trace import Stack


class Consumer(Protocol):
    """Uses gradients: `update.Update` and `update.SumOfSquares`.

    Parameters are given by their index among the leaves of the tree. The stacks of one scan are
    used in a loop: `init_carry` returns its first carry, `use_layer` and `write_layer` update it,
    and `store` gets the last one. Layer i is the one that the scan reads as its i-th xs.
    """

    writes: bool  # whether `write_layer` changes anything

    def use_dense(
        self, indices: Sequence[int], grads: Sequence[jax.Array], others: dict[Any, jax.Array]
    ) -> dict[Any, jax.Array]:
        """Uses the gradients of parameters that are not stacked.

        Args:
          indices: the parameters.
          grads: their gradients.
          others: the other cotangents.

        Returns:
          The other cotangents, which wait until new parameters are in host memory.
        """
        ...

    @property
    def needs_whole_layer(self) -> bool:
        """Whether `use_layer` needs all gradients of a layer in one call."""
        ...

    def states_on_host(self, stacks: Sequence[Stack]) -> list[int]:
        """Returns the k for which the optimizer's state of `stacks[k]` is in host memory."""
        ...

    def init_carry(self, stacks: Sequence[Stack]) -> PyTree:
        """Returns the carry of the loop over stacked parameters; see `pipeline.Layer`."""

    def read_layer(self, carry: PyTree, stacks: Sequence[Stack], k: int, i: jax.Array) -> jax.Array:
        """Returns layer i of `stacks[k]`."""
        ...

    def read_state(self, carry: PyTree, stacks: Sequence[Stack], k: int, i: jax.Array) -> PyTree:
        """Returns the optimizer's state of layer i of `stacks[k]`; None if gradients need none."""

    def use_layer(
        self,
        carry: PyTree,
        stacks: Sequence[Stack],
        ks: Sequence[int],
        i: jax.Array,
        grads: Sequence[jax.Array],
        params: Mapping[int, jax.Array],
        states: Mapping[int, PyTree],
    ) -> tuple[PyTree, PyTree]:
        """Uses the gradients of layer i of `stacks[k]`.

        Args:
          carry: the carry.
          stacks: the parameters.
          ks: which of the stacks.
          i: the layer.
          grads: its gradients.
          params: results of `read_layer`, by k.
          states: results of `read_state`, by k.

        Returns:
          The new carry, and what `write_layer` writes.
        """
        ...

    def write_layer(
        self, carry: PyTree, stacks: Sequence[Stack], ks: Sequence[int], i: jax.Array, news: PyTree
    ) -> PyTree:
        """Writes layer i of `stacks[k]`; returns the new carry."""

    def store(self, carry: PyTree, stacks: Sequence[Stack]) -> None:
        """Stores the last carry of the loop."""

    @property
    def params(self) -> Sequence[jax.Array]:
        """All parameters, as they are now."""
        ...

    def enter(self, carry: PyTree, stacks: Sequence[Stack], i: jax.Array) -> "Consumer":
        """Returns a consumer for the layers in layer i, which is a group of layers."""
        ...

    def leave(self, inner: Any, stacks: Sequence[Stack]) -> PyTree:
        """Returns the carry after `inner`, which `enter` returned, has used its gradients."""


def backward(
    forward: ForwardPass,
    roots: Iterable[tuple[jaxprs.Atom, jax.Array]],
    consumer: Consumer,
    exact: Iterable[jex.Var] = (),
) -> "Cotangents":
    """Runs the backward pass; `consumer` gets every gradient as soon as it is complete.

    Args:
      forward: the forward pass.
      roots: results of the program, with their cotangents.
      consumer: uses the gradients of the parameters.
      exact: inputs whose cotangents are not rounded to their dtype.

    Returns:
      The cotangents of the other inputs.
    """
    values = forward.values
    program = values.program
    cotangents = Cotangents(values, {*program.params.values(), *exact})
    for atom, value in roots:
        if program.differentiates([atom])[0]:
            cotangents.add([atom], [value])
    for segment_pass in reversed(forward.passes):
        if isinstance(segment_pass, DensePass):
            _backward_dense(values, segment_pass, cotangents)
        else:
            _backward_layers(values, segment_pass, cotangents, consumer)
        dense = segment_pass.segment.dense
        if dense:
            grads = cotangents.take(program.params[i] for i in dense)
            cotangents.update(consumer.use_dense(dense, grads, dict(cotangents)))
    return cotangents


class Cotangents(dict):
    """The cotangents of variables: summed in float32 when added, removed when read."""

    def __init__(self, values: Values, exact: Collection[jex.Var]):
        self.values_of_program, self.exact = values, exact

    def add(self, variables: Iterable[Any], values: Iterable[jax.Array]) -> None:
        """Adds to the cotangents of `variables`."""
        for var, value in zip(variables, values, strict=True):
            if var in self:
                value = widen(self[var]) + widen(value)
            # The gradient of a parameter is not rounded again before the update.
            self[var] = value if var in self.exact else value.astype(jaxprs.dtype(var))

    def take(self, variables: Iterable[jex.Var]) -> list[jax.Array]:
        """Removes and returns the cotangents of `variables`; zeros where there are none."""
        variables, values = list(variables), self.values_of_program
        zeros = [jaxprs.zeros(v) for v in variables]
        zeros = values.spread(zeros, zip_not(values.vary(variables)))
        return [self.pop(v, zero) for v, zero in zip(variables, zeros, strict=True)]


def _backward_dense(values: Values, dense: DensePass, cotangents: Cotangents) -> None:
    segment = dense.segment
    reached = [v in cotangents for v in segment.outputs]
    if not any(reached) or not any(dense.diff_in):
        return
    ct_outputs = cotangents.take(select(segment.outputs, reached))
    inputs = select(segment.inputs, dense.diff_in)
    known = [False] * len(inputs)
    if dense.grads is not None:
        # In the segment of the loss, a second pass recomputes the gradients of parameters, which
        # may be as large as the parameters. Gradients of activations are small enough to save.
        known = [dense.is_first or v not in cotangents.exact for v in inputs]
        cotangents.add(select(inputs, known), select(dense.grads, known))
    if not all(known):
        wanted = scatter(dense.diff_in, zip_not(known), dense.diff_in)
        _, grads = dense.vjp(wanted, reached, ct_outputs)
        cotangents.add(select(inputs, zip_not(known)), grads)


def _backward_layers(
    values: Values, layers: LayersPass, cotangents: Cotangents, consumer: Consumer
) -> None:
    scan, stacked = layers.segment.scan, layers.segment.stacked
    reached = any(v in cotangents for v in [*scan.carry_out, *scan.ys])
    if not stacked and not (reached and any(layers.diff_in)):
        return
    # Residuals were saved for cotangents of all outputs that may have one.
    diff_ys = layers.diff_ys if layers.split else [v in cotangents for v in scan.ys]
    ct_ys = swap_axes(cotangents.take(select(scan.ys, diff_ys)), select(layers.vary_ys, diff_ys))
    ct_carry = cotangents.take(select(scan.carry_out, layers.diff_carry))
    diff_consts = select(scan.consts, layers.diff_consts)
    ct_consts = [
        jnp.zeros_like(c if varies else widen(c))
        for c, varies in zip(
            select(layers.consts, layers.diff_consts), values.vary(diff_consts), strict=True
        )
    ]
    loop = _LayerLoop(layers, consumer, diff_ys)
    run = functools.partial(loop.run, ct_carry, ct_ys, ct_consts)
    if layers.segment.body:
        results = run(steps=None)  # the loops inside have steps
    else:
        layer = loop.trace(ct_carry, ct_ys, ct_consts)
        steps = loop.divide(layer)
        in_place = functools.partial(run, steps)
        if steps.waits or not consumer.writes:
            results = in_place()
        else:
            # XLA for CPUs may schedule the last use of a layer after the write of the new one, and
            # then copies the whole stack. Reading the layer ahead, in the step before, prevents it.
            in_advance = lambda: run(loop.divide(layer, read_ahead=True))  # noqa: E731
            results = jax.lax.platform_dependent(cuda=in_place, rocm=in_place, default=in_advance)
    result, ct_carry, ct_consts, ct_others = results
    consumer.store(result, stacked)
    cotangents.add(diff_consts, ct_consts)
    diff_others = layers.diff_others
    cotangents.add(
        select(scan.xs, diff_others),
        [
            _in_place(ct, found)
            for ct, found in zip(
                swap_axes(ct_others, select(layers.vary_xs, diff_others)),
                select(scan.layers, diff_others),
                strict=True,
            )
        ],
    )
    starts = select(scan.carry, layers.diff_carry)
    # A carry that varies may start from a value that does not, and one with a gradient from a value
    # without: see `forward`.
    sums = zip_and(
        values.vary(select(scan.carry_out, layers.diff_carry)), zip_not(values.vary(starts))
    )
    ct_starts = [widen(c).sum(0) if s else c for c, s in zip(ct_carry, sums, strict=True)]
    differentiable = values.program.differentiates(starts)
    cotangents.add(select(starts, differentiable), select(ct_starts, differentiable))


@dataclasses.dataclass(frozen=True)
class _LayerLoop(Layer):
    """The loop over the layers of one scan, from the last to the first."""

    layers: LayersPass
    consumer: Consumer
    diff_ys: list[bool]  # ys that have a cotangent

    @property
    def order(self) -> list[int]:
        """The xs, trainable parameters first."""
        ks, is_param = range(len(self.layers.xs)), self.layers.is_param
        return [*select(ks, is_param), *select(ks, zip_not(is_param))]

    @property
    def saved_on_host(self) -> list[jax.Array]:
        """Layer inputs and residuals, [L, ...], if they are in host memory."""
        saved = jax.tree.leaves(self.layers.saved)
        return saved if any(map(arrays.is_on_host, saved)) else []

    def trace(
        self, ct_carry: list[jax.Array], ct_ys: list[jax.Array], ct_consts: list[jax.Array]
    ) -> TracedLayer:
        """Traces the backward pass of a layer.

        Its inputs are the xs in their `order`, and what was saved in host memory.

        Args:
          ct_carry: cotangents of the last carry.
          ct_ys: cotangents of the ys, [L, ...].
          ct_consts: cotangents of the consts.
        """
        layers, order, saved = self.layers, self.order, self.saved_on_host

        def gradients(read, saved, *args):
            xs = sorted(zip(order, read[: len(order)], strict=True), key=lambda pair: pair[0])
            if saved is None:
                saved = jax.tree.unflatten(jax.tree.structure(layers.saved), read[len(order) :])
            return self.gradients([x for _, x in xs], *saved, *args)

        def one(tree):
            leaves, treedef = jax.tree.flatten(tree)
            # `jax.eval_shape` loses shardings under a mesh with Auto axes.
            first = jax.make_jaxpr(lambda: [x[0] for x in arrays.to_device(leaves)])()
            return jax.tree.unflatten(treedef, first.out_avals)

        xs = [jax.eval_shape(functools.partial(layers.read, k, 0)) for k in order]
        args = (None if saved else one(layers.saved), ct_carry, one(ct_ys), ct_consts)
        return trace_layer(gradients, [*xs, *one(saved)], args)

    def divide(self, layer: TracedLayer, *, read_ahead: bool = False) -> Steps:
        """Divides the backward pass of a layer into steps.

        Args:
          layer: from `trace`.
          read_ahead: see `order.divide`.
        """
        layers, order = self.layers, self.order
        xs_on_host = [n for n, k in enumerate(order) if arrays.is_on_host(layers.arrays[k])]
        saved_ks = range(len(order), len(order) + len(self.saved_on_host))
        return divide(
            layer,
            on_host=[*xs_on_host, *saved_ks],
            kept=saved_ks,
            states_on_host=self.consumer.states_on_host(layers.segment.stacked),
            read_ahead=read_ahead,
            all_at_once=self.consumer.needs_whole_layer,
        )

    def run(
        self,
        ct_carry: list[jax.Array],
        ct_ys: list[jax.Array],
        ct_consts: list[jax.Array],
        steps: Steps | None,
    ) -> tuple[PyTree, list[jax.Array], list[jax.Array], list[jax.Array]]:
        """Runs the loop.

        Args:
          ct_carry: cotangents of the last carry.
          ct_ys: cotangents of the ys, [L, ...].
          ct_consts: zeros, to which the cotangents of the consts are added.
          steps: of the backward pass of a layer; None for groups of layers.

        Returns:
          The last carry of the consumer, and the cotangents of the first carry, of the consts, and
          of the xs that are not trainable parameters.
        """
        scan = self.layers.segment.scan
        i = jnp.int32(0 if scan.reverse else scan.length - 1)
        carry = self.consumer.init_carry(self.layers.segment.stacked)
        if steps is None:
            body, saved, first = self.group, self.layers.saved, []
        else:
            body = functools.partial(self.layer, steps)
            saved = None if self.saved_on_host else self.layers.saved
            first = read_first(steps, self, _with_index(carry, i))
        (_, carry, ct_carry, ct_consts, _), ct_others = jax.lax.scan(
            body,
            (i, carry, ct_carry, ct_consts, first),
            (saved, ct_ys),
            scan.length,
            not scan.reverse,
        )
        return carry, ct_carry, ct_consts, ct_others

    def layer(self, steps: Steps, loop: PyTree, x: PyTree) -> tuple[PyTree, list[jax.Array]]:
        """Forms the gradients of layer i, one after the other, and has the consumer use them.

        Args:
          steps: of the backward pass of a layer.
          loop: (i, carry of the consumer, cotangents of the carry, cotangents of the consts, what
            the first step needs).
          x: ((layer inputs, residuals) of layer i, cotangents of its ys).
        """
        i, carry, ct_carry, ct_consts, first = loop
        saved, ct_ys = x
        (ct_carry, ct_consts, ct_others), carry, first = evaluate(
            steps, (saved, ct_carry, ct_ys, ct_consts), self, _with_index(carry, i), first
        )
        carry, i = _without_index(carry)
        return (self._following(i), carry, ct_carry, ct_consts, first), ct_others

    def read(self, carry: PyTree, k: int) -> jax.Array:
        consumers, i = _without_index(carry)
        stacked, order = self.layers.segment.stacked, self.order
        if k < len(stacked):
            return self.consumer.read_layer(consumers, stacked, k, i)
        if k < len(order):
            return self.layers.read(order[k], i)
        return arrays.read_layer(self.saved_on_host[k - len(order)], [Place()], [i])

    def read_state(self, carry: PyTree, k: int) -> PyTree:
        carry, i = _without_index(carry)
        return self.consumer.read_state(carry, self.layers.segment.stacked, k, i)

    def following(self, carry: PyTree) -> PyTree:
        carry, i = _without_index(carry)
        return _with_index(carry, self._following(i))

    def use(
        self,
        carry: PyTree,
        ks: Sequence[int],
        grads: Sequence[jax.Array],
        params: Mapping[int, jax.Array],
        states: Mapping[int, PyTree],
    ) -> tuple[PyTree, PyTree]:
        carry, i = _without_index(carry)
        stacked = self.layers.segment.stacked
        carry, news = self.consumer.use_layer(carry, stacked, ks, i, grads, params, states)
        return _with_index(carry, i), news

    def write(self, carry: PyTree, ks: Sequence[int], news: PyTree) -> PyTree:
        carry, i = _without_index(carry)
        carry = self.consumer.write_layer(carry, self.layers.segment.stacked, ks, i, news)
        return _with_index(carry, i)

    def _following(self, i: jax.Array) -> jax.Array:
        scan = self.layers.segment.scan
        return jnp.clip(i + (1 if scan.reverse else -1), 0, scan.length - 1)

    def group(self, loop: PyTree, x: PyTree) -> tuple[PyTree, list[jax.Array]]:
        """Recomputes layer i, a group of layers, and walks back through the layers inside.

        Arguments and results are those of `layer`.
        """
        i, carry, ct_carry, ct_consts, first = loop
        (inputs, _), ct_ys = arrays.to_device(x)
        layers = self.layers
        segment, body = layers.segment, layers.body_program
        consumer = self.consumer.enter(carry, segment.stacked, i)
        # The consumer writes the new layers in place: all reads go through its arrays.
        stacks = list(layers.xs)
        for k, stack in segment.stacks.items():
            array = consumer.params[stack.index]
            is_part = isinstance(stacks[k], Part)
            stacks[k] = dataclasses.replace(stacks[k], array=array) if is_part else array
        values = layers.body_values(
            i, scatter(layers.carry, inputs, layers.changed), stacks, [None] * len(stacks)
        )
        forward = ForwardPass(values, run_segments(values, body.segments, layers.saving))
        diff_out = [*layers.diff_carry, *self.diff_ys]
        results = select(body.results, diff_out)
        ct_results = [
            widen(ct).sum(0) if outside and not inside else ct
            for ct, outside, inside in zip(
                [*ct_carry, *ct_ys],
                select(layers.body.varies_out, diff_out),
                values.vary(results),
                strict=True,
            )
        ]
        n_consts, n_carry = len(layers.consts), len(layers.carry)
        consts = select(body.inputs[:n_consts], layers.diff_consts)
        starts = select(body.inputs[n_consts : n_consts + n_carry], layers.diff_carry)
        others = select(body.inputs[n_consts + n_carry :], layers.diff_others)
        cotangents = backward(forward, zip(results, ct_results, strict=True), consumer, consts)
        ct_consts = list(map(add, ct_consts, cotangents.take(consts)))
        ct_starts = cotangents.take(starts)
        ct_carry = [new.astype(old.dtype) for new, old in zip(ct_starts, ct_carry, strict=True)]
        carry = self.consumer.leave(consumer, segment.stacked)
        loop = self._following(i), carry, ct_carry, ct_consts, first
        return loop, cotangents.take(others)

    def gradients(
        self,
        xs: Sequence[jax.Array],
        inputs: Sequence[jax.Array],
        residuals: Sequence[jax.Array],
        ct_carry: Sequence[jax.Array],
        ct_ys: Sequence[jax.Array],
        ct_consts: Sequence[jax.Array],
    ) -> tuple[list[jax.Array], tuple[list[jax.Array], list[jax.Array], list[jax.Array]]]:
        """Pulls the cotangents back through one layer.

        Returns:
          The gradients of its parameters, and the cotangents of its carry, of the consts (added to
          `ct_consts`) and of its other xs.
        """
        layers = self.layers
        split = layers.split
        _, grads = layers.body.vjp(
            [*layers.consts, *scatter(layers.carry, inputs, layers.changed), *xs],
            layers.diff_in,
            [*layers.diff_carry, *self.diff_ys],
            [*ct_carry, *ct_ys],
            residuals=split and (split.backward, residuals, split.varies),
        )
        grads = iter(grads)
        new_ct_consts = [add(c, next(grads)) for c in ct_consts]
        new_ct_carry = [next(grads).astype(c.dtype) for c in ct_carry]
        ct_xs = [next(grads) if d else None for d in layers.diff_xs]
        others = select(ct_xs, layers.diff_others)
        return select(ct_xs, layers.is_param), (new_ct_carry, new_ct_consts, others)


# The index passes the barriers too: XLA would share one copy of a frozen layer between the forward
# and the backward pass, and store it in between.
def _with_index(carry: PyTree, i: jax.Array) -> PyTree:
    stacks, rest = carry
    return stacks, (rest, i)


def _without_index(carry: PyTree) -> tuple[PyTree, jax.Array]:
    stacks, (rest, i) = carry
    return (stacks, rest), i


def _in_place(gradient: jax.Array, layers: jaxprs.Layers) -> jax.Array:
    """Returns the gradient of a whole stack, given the gradient of some layers, [L, ...]."""
    length = len(gradient)
    if layers.is_in_front(length):
        return gradient
    axis, start, size = layers.place
    gradient = jnp.moveaxis(gradient, 0, axis)
    if size > 1:
        before, after = gradient.shape[:axis], gradient.shape[axis + 2 :]
        gradient = gradient.reshape(*before, length * size, *after)
    zeros = jnp.zeros(jaxprs.shape(layers.of), gradient.dtype)
    return jax.lax.dynamic_update_slice_in_dim(zeros, gradient, start, axis)
