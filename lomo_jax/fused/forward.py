"""The forward pass: runs the segments of a loss and saves residuals for the backward pass.

For a layer scan it saves the input of each layer, and the residuals that `remat` selects. For a
dense segment it saves the segment's inputs.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs
from lomo_jax.fused.arrays import Part
from lomo_jax.fused.flags import Flags, scatter, select, zip_and, zip_not
from lomo_jax.fused.microbatches import Microbatched, vjp_of
from lomo_jax.fused.order import Steps, divide, trace_layer
from lomo_jax.fused.pipeline import Layer, evaluate, read_first
from lomo_jax.fused.trace import Body, DenseSegment, LayerScan, Program, TracedLoss

# Outputs of cuDNN's flash attention: the result, and the row sums that its derivative needs.
_FLASH_ATTENTION = "dot_product_attention_fwd_wrapper"


class Values(NamedTuple):
    """The values of a program's variables, in host or device memory."""

    program: Program
    microbatches: int
    by_var: dict[jex.Var, Any]

    def stored(self, atoms: Iterable[jaxprs.Atom]) -> list[Any]:
        """Returns the values of `atoms`, in the memory that they are in, some an `arrays.Part`."""
        return [a.val if isinstance(a, jex.Literal) else self.by_var[a] for a in atoms]

    def read(self, atoms: Iterable[jaxprs.Atom]) -> list[Any]:
        """Returns the values of `atoms`, on the device."""
        stored = self.stored(atoms)
        return [x.read() if isinstance(x, Part) else arrays.to_device(x) for x in stored]

    def vary(self, atoms: Iterable[jaxprs.Atom]) -> list[bool]:
        """Returns for each atom whether its value has an axis of microbatches in front."""
        several = self.microbatches > 1
        return [several and isinstance(a, jex.Var) and a in self.program.of_batch for a in atoms]

    def spread(self, values: Sequence[Any], already: Flags) -> list[Any]:
        """Puts the axis of microbatches in front of the values that do not have it already."""
        return [
            x if varies else jnp.broadcast_to(x, (self.microbatches, *jnp.shape(x)))
            for x, varies in zip(values, already, strict=True)
        ]


class DensePass(NamedTuple):
    """A dense segment after its forward pass."""

    segment: DenseSegment
    function: Microbatched
    args: list[Any]
    diff_in: list[bool]  # inputs that have a gradient
    # Gradients of these inputs. Only the segment of the loss computes them in the forward pass; the
    # others are recomputed in the backward pass.
    grads: list[Any] | None = None
    is_first: bool = True  # the next backward pass over this segment is the first

    def vjp(
        self, diff_in: Flags, diff_out: Flags, cotangents: Sequence[jax.Array], *, run: bool = False
    ) -> tuple[list[Any], list[jax.Array]]:
        """Calls `Microbatched.vjp`; XLA cannot begin it before all its arguments exist."""
        args, cotangents, zero = jax.lax.optimization_barrier(
            (self.args, cotangents, jnp.float32(0))
        )
        return jaxprs.evaluate_late(
            lambda *args: self.function.vjp(args, diff_in, diff_out, cotangents, run=run),
            args,
            zero,
        )


class SplitLayer(NamedTuple):
    """A layer, split into a forward function that saves residuals and a backward function."""

    forward: Callable[..., list[Any]]  # (*inputs) -> [*outputs, *residuals]
    # (inputs, residuals) -> the function from cotangents of outputs to cotangents of inputs
    backward: Callable[[Sequence[Any], Sequence[Any]], Callable[[list[Any]], Sequence[Any]]]
    varies: list[bool]  # which residuals differ between microbatches


class Saving(NamedTuple):
    """What the forward pass of layers saves for the backward pass, see `Step`."""

    remat: str | Callable[..., Any] = "full"
    on_host: bool = False


class LayersPass(NamedTuple):
    """A layer scan after its forward pass."""

    segment: LayerScan
    body: Microbatched
    microbatches: int
    consts: list[Any]
    carry: list[Any]  # the first layer's
    xs: list[Any]  # layers in front, then microbatches
    vary_xs: list[bool]
    vary_ys: list[bool]
    changed: list[bool]  # elements of the carry that differ from layer to layer
    diff_consts: list[bool]
    diff_carry: list[bool]
    diff_xs: list[bool]
    diff_ys: list[bool]
    saving: Saving
    split: SplitLayer | None = None  # None: the backward pass recomputes each layer
    saved: Any = None  # ([layer inputs [L, ...]], [residuals [L, ...]])

    @property
    def is_param(self) -> list[bool]:
        """Which xs are trainable parameters."""
        return [k in self.segment.stacks for k in range(len(self.xs))]

    @property
    def arrays(self) -> list[jax.Array]:
        """The arrays that the xs are layers of."""
        return [x.array if isinstance(x, Part) else x for x in self.xs]

    @property
    def is_stack(self) -> list[bool]:
        """Which xs are stacks of layers themselves."""
        body = self.segment.body
        if body is None:
            return [False] * len(self.xs)
        return [v in body.stacks for v in body.inputs[len(body.inputs) - len(self.xs) :]]

    @property
    def body_program(self) -> Body:
        """The body of a scan over groups of layers."""
        assert self.segment.body is not None
        return self.segment.body

    def read(self, k: int, i: Any) -> jax.Array:
        """Returns layer i of x k, on the device."""
        x, place = self.xs[k], self.segment.scan.layers[k].place
        return (
            x.layer(place, i).read() if isinstance(x, Part) else arrays.read_layer(x, [place], [i])
        )

    def body_values(
        self, i: Any, carry: Sequence[Any], stacks: Sequence[Any], xs: Sequence[Any]
    ) -> Values:
        """Returns the values of the inputs of `segment.body` in layer i.

        Args:
          i: the layer.
          carry: its input.
          stacks: the arrays of the xs.
          xs: layer i of the xs, where it is read; None elsewhere.
        """
        body, parts = self.body_program, []
        for k, (x, is_stack) in enumerate(zip(xs, self.is_stack, strict=True)):
            if is_stack:
                place, stack = self.segment.scan.layers[k].place, stacks[k]
                part = stack if isinstance(stack, Part) else Part(stack, (), ())
                parts.append(part.layer(place, i))
            else:
                parts.append(arrays.to_device(self.read(k, i) if x is None else x))
        program = body.program(self.body.varies_in, self.diff_in)
        inputs = [*self.consts, *carry, *parts]
        by_var = dict(zip(body.inputs, inputs, strict=True))
        return Values(program, self.microbatches, by_var)

    def run_body(self, i: Any, carry: Sequence[Any], xs: Sequence[Any]) -> list[Any]:
        """Returns the outputs of layer i, a group of layers."""
        values = self.body_values(i, carry, self.xs, xs)
        run_segments(values, self.body_program.segments, None)
        atoms = self.body_program.results
        results = values.read(atoms)
        already = values.vary(atoms)
        return [
            values.spread([x], [False])[0] if wanted and not varies else x
            for x, varies, wanted in zip(results, already, self.body.varies_out, strict=True)
        ]

    @property
    def diff_others(self) -> list[bool]:
        """Which xs have a cotangent and are not trainable parameters."""
        return zip_and(self.diff_xs, zip_not(self.is_param))

    @property
    def diff_in(self) -> list[bool]:
        """Which inputs of the body have a cotangent."""
        return [*self.diff_consts, *self.diff_carry, *self.diff_xs]

    @property
    def diff_out(self) -> list[bool]:
        """Which outputs of the body may have a cotangent."""
        return [*self.diff_carry, *self.diff_ys]


class ForwardPass(NamedTuple):
    """A program after its forward pass."""

    values: Values
    passes: list[DensePass | LayersPass]

    def results(self, atoms: Sequence[jaxprs.Atom]) -> list[jax.Array]:
        """Returns the values of `atoms`, with an axis [K] in front if K > 1."""
        values = self.values.read(atoms)
        if self.values.microbatches > 1:
            values = self.values.spread(values, self.values.vary(atoms))
        return list(map(jnp.asarray, values))

    def begin_second_pass(self, value: jax.Array) -> tuple["ForwardPass", jax.Array]:
        """Makes the second backward pass wait for `value`, a result of the first one.

        Use both results in place of the arguments. Otherwise XLA merges common computations of
        the two passes and stores large arrays of the first pass for the second.
        """
        dense = [p for p in self.passes if isinstance(p, DensePass)]
        args, value = jax.lax.optimization_barrier(([p.args for p in dense], value))
        args = iter(args)
        passes: list[DensePass | LayersPass] = [
            p._replace(args=next(args), is_first=False) if isinstance(p, DensePass) else p
            for p in self.passes
        ]
        return self._replace(passes=passes), value


def forward(
    loss: TracedLoss,
    params: Sequence[jax.Array],
    batch: Sequence[jax.Array],
    shares: jax.Array,
    saving: Saving,
) -> tuple[ForwardPass, jax.Array]:
    """Runs the segments of a loss.

    Args:
      loss: traced with one microbatch.
      params: leaves of the parameters.
      batch: leaves of the batch, with an axis [K] in front if there are K > 1 microbatches.
      shares: the cotangent of the loss for each microbatch, [K].
      saving: what to save.

    Returns:
      The program after its forward pass, and the cotangent of the loss: [], or [K] if it varies.
    """
    inputs = zip([*loss.program.params.values(), *loss.batch], [*params, *batch], strict=True)
    values = Values(loss.program, shares.shape[0], dict(inputs))
    seed = shares if values.vary([loss.loss])[0] else shares.sum()
    seed = seed.astype(jaxprs.dtype(loss.loss))
    *segments, last = loss.program.segments
    passes = run_segments(values, segments, saving)
    if isinstance(last, DenseSegment):
        passes.append(_run_dense(values, last, loss.loss, seed))
    else:
        passes += run_segments(values, [last], saving)
    return ForwardPass(values, passes), seed


def run_segments(
    values: Values, segments: Sequence[DenseSegment | LayerScan], saving: Saving | None
) -> list[DensePass | LayersPass]:
    """Runs segments, which adds to `values`. Without `saving` nothing is saved."""
    return [
        _run_dense(values, segment)
        if isinstance(segment, DenseSegment)
        else _run_layers(values, segment, saving)
        for segment in segments
    ]


def _run_dense(
    values: Values,
    segment: DenseSegment,
    loss: jaxprs.Atom | None = None,
    seed: jax.Array | None = None,
) -> DensePass:
    """Runs a dense segment.

    Args:
      values: of the variables so far.
      segment: a dense segment.
      loss: for the last segment of a loss, which computes the gradients on the way.
      seed: the cotangent of the loss.
    """
    program = values.program
    args = values.read(segment.inputs)
    function = Microbatched(
        segment.function, values.vary(segment.inputs), values.vary(segment.outputs)
    )
    result = DensePass(segment, function, args, program.differentiates(segment.inputs))
    is_loss = [v is loss for v in segment.outputs]
    diff_loss = zip_and(is_loss, program.differentiates(segment.outputs))
    # A loss that does not depend on the batch has one cotangent for all microbatches.
    is_of_each = any(zip_and(is_loss, function.varies_out)) or values.microbatches == 1
    if any(diff_loss) and is_of_each:
        # Nothing runs between the forward and the backward pass of the last segment: one vjp does
        # both. The barrier makes the layers wait for the loss: XLA might compute it last, and store
        # the logits until then.
        outputs, grads = result.vjp(
            result.diff_in, diff_loss, [seed] if seed is not None else [], run=True
        )
        inputs = select(segment.inputs, result.diff_in)
        params = program.params.values()
        is_activation = [not any(v is param for param in params) for v in inputs]
        outputs, activations = jax.lax.optimization_barrier((outputs, select(grads, is_activation)))
        result = result._replace(grads=scatter(grads, activations, is_activation))
    else:
        outputs = function.run(args)
    values.by_var.update(zip(segment.outputs, outputs, strict=True))
    return result


def _run_layers(values: Values, segment: LayerScan, saving: Saving | None) -> LayersPass:
    layers, scan = _layers_pass(values, segment, saving or Saving()), segment.scan
    body = layers.body
    if layers.split:
        varies_out = [*body.varies_out, *layers.split.varies]
        body = Microbatched(layers.split.forward, body.varies_in, varies_out)
    saves = saving is not None and any(layers.diff_out) and any(layers.diff_in)
    # `jax.lax.scan` reads layers on axis 0. Others are read by their index.
    by_scan = [
        not isinstance(x, Part) and found.is_in_front(scan.length) and not is_stack
        for x, found, is_stack in zip(layers.xs, scan.layers, layers.is_stack, strict=True)
    ]

    steps = None if segment.body else _divide(layers, body)
    if steps is not None:
        far = {k for k, _ in steps.far.values()}
        by_scan = [flag and k not in far for k, flag in enumerate(by_scan)]

    def layer(loop, x):
        i, carry, first = loop
        xs = scatter([None] * len(by_scan), x, by_scan)
        if segment.body:
            results = layers.run_body(i, carry, xs)
        elif steps is not None:
            results, (_, i), first = evaluate(steps, (carry,), _Reader(layers, xs), ([], i), first)
        else:
            xs = [layers.read(k, i) if x is None else x for k, x in enumerate(xs)]
            results = body.run([*layers.consts, *carry, *arrays.to_device(xs)])
        next_i = None if i is None else i + (-1 if scan.reverse else 1)
        carry_out, results = results[: len(carry)], results[len(carry) :]
        ys, residuals = results[: len(scan.ys)], results[len(scan.ys) :]
        saved = (select(carry, layers.changed), residuals) if saves else ([], [])
        saved = arrays.to_host(saved) if layers.saving.on_host else saved
        return (next_i, carry_out, first), (ys, saved)

    i = None if all(by_scan) else jnp.int32(scan.length - 1 if scan.reverse else 0)
    first = [] if steps is None else read_first(steps, _Reader(layers), ([], i))
    (_, carry_out, _), (ys, saved) = jax.lax.scan(
        layer,
        (i, layers.carry, first),
        select(layers.xs, by_scan),
        scan.length,
        scan.reverse,
        scan.unroll,
    )
    values.by_var.update(zip(scan.carry_out, carry_out, strict=True))
    values.by_var.update(zip(scan.ys, swap_axes(ys, layers.vary_ys), strict=True))
    return layers._replace(saved=saved)


def _divide(layers: LayersPass, body: Microbatched) -> Steps | None:
    """Divides the forward pass of a layer into steps, if it waits for something."""
    xs = [jax.eval_shape(functools.partial(layers.read, k, 0)) for k in range(len(layers.xs))]
    on_host = [k for k, x in enumerate(layers.arrays) if arrays.is_on_host(x)]
    if not on_host and all(jax.typeof(x).sharding.is_fully_replicated for x in layers.arrays):
        return None
    run = lambda xs, carry: ([], body.run([*layers.consts, *carry, *xs]))  # noqa: E731
    steps = divide(trace_layer(run, xs, (layers.carry,)), on_host=on_host)
    return steps if steps.waits else None


@dataclasses.dataclass(frozen=True)
class _Reader(Layer):
    """Reads a layer in the forward pass; a carry is ``([], i)``."""

    layers: LayersPass
    xs: Sequence[Any] = ()  # those that the scan reads; None for others

    def read(self, carry: Any, k: int) -> jax.Array:
        _, i = carry
        if self.xs and self.xs[k] is not None:
            return self.xs[k]
        return self.layers.read(k, i)

    def following(self, carry: Any) -> Any:
        scan = self.layers.segment.scan
        stacks, i = carry
        return stacks, jnp.clip(i + (-1 if scan.reverse else 1), 0, scan.length - 1)


def _layers_pass(values: Values, segment: LayerScan, saving: Saving) -> LayersPass:
    """Returns the pass over the layers of a scan, with what they read."""
    scan, program = segment.scan, values.program
    vary_carry, vary_xs = values.vary(scan.carry_out), values.vary(scan.xs)
    vary_ys = values.vary(scan.ys)
    # The carry may depend on the batch although its first value, such as zeros, does not.
    spreads = zip_and(vary_carry, zip_not(values.vary(scan.carry)))
    layers = LayersPass(
        segment=segment,
        body=Microbatched(
            jex.jaxpr_as_fun(scan.body),
            [*values.vary(scan.consts), *vary_carry, *vary_xs],
            [*vary_carry, *vary_ys],
        ),
        microbatches=values.microbatches,
        consts=values.read(scan.consts),
        carry=values.spread(values.read(scan.carry), zip_not(spreads)),
        xs=swap_axes(values.stored(scan.xs), vary_xs),
        vary_xs=vary_xs,
        vary_ys=vary_ys,
        changed=jaxprs.changed_carry(scan),
        diff_consts=program.differentiates(scan.consts),
        diff_carry=program.differentiates(scan.carry_out),
        diff_xs=program.differentiates(scan.xs),
        diff_ys=program.differentiates(scan.ys),
        saving=saving,
    )
    return layers._replace(split=_split_layer(layers))


def swap_axes(items: Sequence[Any], flags: Flags) -> list[Any]:
    """Swaps the axis of layers and the axis of microbatches of the flagged arrays."""
    return [jnp.swapaxes(x, 0, 1) if flag else x for x, flag in zip(items, flags, strict=True)]


def _split_layer(layers: LayersPass) -> SplitLayer | None:
    """Returns the layer with its residuals, or None if the backward pass should recompute it."""
    remat = layers.saving.remat
    vary_out = select(layers.body.varies_out, layers.diff_out)
    # Some outputs differ between microbatches and some do not: rare, so recompute.
    mixed = any(vary_out) and not all(vary_out)
    has_gradient = any(layers.diff_out) and any(layers.diff_in)
    # A group of layers is always recomputed, from its input.
    if remat == "full" or mixed or not has_gradient or layers.segment.body:
        return None
    first = len(layers.consts) + len(layers.carry)
    return save_residuals(
        layers.segment.scan.body,
        [first + k for k in layers.segment.stacks],
        remat,
        layers.body.varies_in,
        layers.diff_in,
        layers.diff_out,
    )


def save_residuals(
    body: Any,
    stacked: Sequence[int],
    remat: str | Callable[..., Any],
    varies_in: Flags,
    diff_in: Flags,
    diff_out: Flags,
) -> SplitLayer:
    """Splits the body of a layer scan into its forward and its backward pass.

    Args:
      body: a closed jaxpr.
      stacked: the inputs that are parameters.
      remat: see `Step`; not "full".
      varies_in: which inputs differ between microbatches.
      diff_in: the inputs to differentiate with respect to.
      diff_out: the outputs that may have a cotangent.
    """
    policy = remat if callable(remat) else _POLICIES[remat]
    # The two passes are different loops: XLA cannot merge their common computations.
    function = jax.checkpoint(
        _without_outer_checkpoint(body, stacked), policy=policy, prevent_cse=False
    )
    vjp_parts: list[Any] = []

    def forward(*inputs):
        outputs, vjp = vjp_of(function, inputs, diff_in, diff_out)
        leaves, treedef = jax.tree.flatten(vjp)
        vjp_parts[:] = treedef, [None if _is_array(x) else x for x in leaves]
        return outputs, [x for x in leaves if _is_array(x)]

    inputs = jaxprs.open_jaxpr(body).invars
    closed, (outputs, _) = jax.make_jaxpr(forward, return_shape=True)(*(v.aval for v in inputs))
    treedef, static = vjp_parts
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    eqns, results = jaxprs.inline(closed, variables, lambda eqn: False)
    results, leaf_atoms = results[: len(outputs)], results[len(outputs) :]
    # The backward pass has the inputs anyway: they need not be saved.
    inputs_by_var = {v: k for k, v in enumerate(variables)}
    residuals = [v for v in jaxprs.variables(leaf_atoms) if v not in inputs_by_var]

    def backward(inputs, values):
        env: dict[Any, Any] = dict(zip(residuals, values, strict=True)) | {
            v: inputs[k] for v, k in inputs_by_var.items()
        }
        leaves = iter([a.val if isinstance(a, jex.Literal) else env[a] for a in leaf_atoms])
        return jax.tree.unflatten(treedef, [next(leaves) if x is None else x for x in static])

    labels = jaxprs.dependence(closed, list(map(int, varies_in)))[len(outputs) :]
    varies = {v: bool(x) for v, x in zip(leaf_atoms, labels, strict=True) if v in residuals}
    return SplitLayer(
        jaxprs.as_function(closed, eqns, variables, [*results, *residuals]),
        backward,
        [varies[v] for v in residuals],
    )


def _without_outer_checkpoint(body: Any, stacked: Sequence[int]) -> Callable[..., list[Any]]:
    """Returns the body without a checkpoint around the whole layer: `remat` replaces it."""
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(body).invars]
    parameters = {variables[k] for k in stacked}

    def is_around_the_layer(eqn):
        return jaxprs.called_jaxpr(eqn) is not None and parameters.issubset(
            jaxprs.variables(eqn.invars)
        )

    eqns, results = jaxprs.inline(body, variables, is_around_the_layer)
    return jaxprs.as_function(body, eqns, variables, results)


def _save_attention(primitive: Any, *_: Any, **params: Any) -> bool:
    return primitive.name == _FLASH_ATTENTION or (
        primitive.name == "name" and params["name"] == "attention"
    )


def _save_products(primitive: Any, *avals: Any, **params: Any) -> bool:
    if primitive.name == "dot_general":
        # Those with batch axes are inside attention: scores, which grow with the square of the
        # length.
        (_, _), (batch, _) = params["dimension_numbers"]
        return not batch
    return primitive.name.startswith("ragged_dot") or _save_attention(primitive, *avals, **params)


def _save_all_but_gathered(primitive: Any, *_: Any, **__: Any) -> bool:
    # Saving gathered weights would put the whole model on every device.
    return primitive.name != "reshard"


_POLICIES: dict[Any, Callable[..., bool]] = {
    "attention": _save_attention,
    "products": _save_products,
    "none": _save_all_but_gathered,
}


def _is_array(x: Any) -> bool:
    return hasattr(x, "dtype")
