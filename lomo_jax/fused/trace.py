"""Traces a loss and cuts it at its layer scans: dense segment, layer scan, dense segment, ..."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs, stacks
from lomo_jax.fused.arrays import Params, Place, PyTree
from lomo_jax.fused.jaxprs import Atom
from lomo_jax.fused.microbatches import WeightedLoss
from lomo_jax.fused.prelude import Loss

# Computed again rather than stored.
_CASTS = ("convert_element_type", "reshape", "squeeze", "transpose")


class DenseSegment(NamedTuple):
    """Operations without a layer scan: all their gradients exist at once."""

    function: Callable[..., list[Any]]  # (*inputs) -> outputs
    inputs: list[jex.Var]
    outputs: list[jex.Var]
    dense: list[int]  # parameters first used here: their gradients are complete after this segment

    @property
    def stacked(self) -> list["Stack"]:
        """No parameter is scanned here."""
        return []


class Stack(NamedTuple):
    """The layers of a parameter that one scan updates."""

    index: int  # of the parameter
    places: tuple[Place, ...]  # of its layers; for a scan inside a scan, of the layers of a layer


class LayerScan(NamedTuple):
    """A scan over stacked parameters: one layer's gradient exists at a time."""

    scan: jaxprs.Scan
    stacks: dict[int, Stack]  # position in scan.xs -> the layers that it updates
    dense: list[int]  # parameters that all layers share, first used here
    body: "Body | None" = None  # if there is a layer scan inside: a layer is a group of layers

    @property
    def stacked(self) -> list[Stack]:
        """The layers that it updates, in the order of the scan's inputs."""
        return list(self.stacks.values())


class Program(NamedTuple):
    """Segments that run one after the other.

    Parameters are given by their index among the leaves of the tree.
    """

    params: dict[int, jex.Var]
    segments: list[DenseSegment | LayerScan]
    differentiable: frozenset[jex.Var]  # floating-point, and depend on a trainable parameter
    of_batch: frozenset[jex.Var]  # depend on the batch

    def differentiates(self, atoms: Sequence[Atom]) -> list[bool]:
        """Returns for each atom whether it has a cotangent."""
        return [isinstance(a, jex.Var) and a in self.differentiable for a in atoms]


class TracedLoss(NamedTuple):
    """A loss, cut at its layer scans."""

    program: Program
    batch: list[jex.Var]
    loss: Atom
    weight: Callable[..., list[Any]] | None  # (*batch) -> [weight of a `WeightedLoss`]
    aux: list[Atom]
    aux_tree: Any
    # Of the trainable parameters that are stacks: the axes along which their layers are counted.
    layer_axes: dict[int, tuple[int, ...]]
    inputs: Loss
    operations: list[jaxprs.Operation]  # of all segments

    @property
    def stacked(self) -> frozenset[int]:
        """The trainable parameters whose layers are updated one by one."""
        segments = self.program.segments
        return frozenset(stack.index for segment in segments for stack in segment.stacked)


class Body(NamedTuple):
    """The body of a layer scan, cut at the layer scans inside it."""

    inputs: list[jex.Var]  # consts, carry, xs
    operations: list[jaxprs.Operation]
    segments: list[DenseSegment | LayerScan]
    results: list[Atom]  # carry, ys
    params: dict[int, jex.Var]  # those among the xs that are updated
    stacks: frozenset[jex.Var]  # xs that are layers of parameters: too large to read whole

    def program(self, varies: Sequence[bool], differentiable: Sequence[bool]) -> Program:
        """Returns the program, given which inputs depend on the batch and have a cotangent."""
        varying = {v for v, flag in zip(self.inputs, varies, strict=True) if flag}
        with_cotangent = {v for v, flag in zip(self.inputs, differentiable, strict=True) if flag}
        return _program(self.params, self.operations, self.segments, varying, with_cotangent)


def _program(
    params: dict[int, jex.Var],
    operations: Sequence[jaxprs.Operation],
    segments: list[DenseSegment | LayerScan],
    of_batch: Iterable[jex.Var],
    differentiable: Iterable[jex.Var],
) -> Program:
    """Returns a program, given which inputs depend on the batch and have a cotangent."""
    varies = jaxprs.labels(operations, dict.fromkeys(of_batch, 1))
    moves = jaxprs.labels(operations, dict.fromkeys(differentiable, 1), derivative=True)
    return Program(
        params,
        segments,
        frozenset(v for v, label in moves.items() if label and jaxprs.is_float(v)),
        frozenset(v for v, label in varies.items() if label),
    )


def trace(
    loss_fn: Callable[..., Any],
    params: Params,
    batch: PyTree,
    *,
    has_aux: bool = False,
    trainable: Sequence[bool],
) -> TracedLoss:
    """Traces ``loss_fn(params, batch)`` and cuts it at every scan over a parameter.

    Args:
      loss_fn: returns a scalar loss or a `WeightedLoss`, or (either, aux) with `has_aux`.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`.
      has_aux: see `loss_fn`.
      trainable: for each leaf of `params`, whether it has a gradient.

    Raises:
      TypeError: the loss is not a floating-point scalar.
      ValueError: the weight of the loss depends on a parameter.
    """
    with jax.disable_jit(False):  # it unrolls the loops over layers
        closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, batch)
        weighted, aux_tree = _check_result(shape, has_aux)
        names = arrays.names(params)
        inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
        param_vars, batch_vars = inputs[: len(names)], inputs[len(names) :]
        loss = Loss(
            closed, param_vars, {v: i for i, v in enumerate(param_vars) if trainable[i]}, batch_vars
        )
        operations, results = stacks.inline_calls(loss, inputs)
        weight = None
        if weighted:
            weight_atom = results.pop(1)
            labels = jaxprs.labels(operations, loss.labels)
            _check_weight(jaxprs.label(weight_atom, labels), names)
            weight = jaxprs.as_function(
                closed, jaxprs.live(operations, [weight_atom]), batch_vars, [weight_atom]
            )
        operations = stacks.scan_parameters(operations, results, results[:1], loss)
        layers = _layers_to_update(operations, results[:1], loss, {})
    segments = _cut(loss, operations, results, layers)
    return TracedLoss(
        program=_program(
            dict(enumerate(param_vars)), operations, segments, batch_vars, loss.trainable
        ),
        batch=batch_vars,
        loss=results[0],
        weight=weight,
        aux=results[1:],
        aux_tree=aux_tree,
        layer_axes={
            i: axes
            for i, places in layers.places.items()
            if (axes := arrays.layer_axes(len(jaxprs.shape(param_vars[i])), places)) is not None
        },
        inputs=loss,
        operations=operations,
    )


class _Layers(NamedTuple):
    """The stacks among the parameters of a program. Scans are given by their `id`."""

    places: dict[int, tuple[Place, ...]]  # of the layers of each stack, in one of its scans
    of_scan: dict[int, dict[int, Stack]]  # layers to update, by their position among the xs
    bodies: dict[int, Body]


def _layers_to_update(
    program: Sequence[jaxprs.Operation],
    roots: Sequence[Atom],
    loss: Loss,
    outer: Mapping[int, tuple[Place, ...]],
) -> _Layers:
    """Finds the parameters whose layers can be updated one by one.

    Args:
      program: see `stacks.scan_parameters`.
      roots: the results that have a cotangent.
      loss: the inputs of the program.
      outer: if the program is the body of a scan: where the parameters have the layers that are
        its inputs.
    """
    uses = _uses(program, roots, loss)
    whole: set[int] = set()  # parameters that get one gradient for all layers
    while True:
        inside = {
            id(operation): found
            for operation in program
            if isinstance(operation, jaxprs.Scan)
            and (found := _cut_body(operation, loss, outer, whole))
        }
        places: dict[int, tuple[Place, ...]] = {}
        of_scan: dict[int, dict[int, Stack]] = {}
        for i, found in uses.items():
            scans = [use for use in found if use is not None]
            in_scans = [
                (x.place, *(inside[id(scan)][1].get(i, ()) if id(scan) in inside else ()))
                for scan, x in scans
            ]
            if len({tuple((p.axis, p.size) for p in of_one) for of_one in in_scans}) != 1:
                continue
            shape, places[i] = jaxprs.shape(loss.variable(i)), in_scans[0]
            axis, _, size = places[i][0]
            ends = sorted((x.place.start, x.place.start + scan.length * size) for scan, x in scans)
            is_tiled = [*(start for start, _ in ends), shape[axis]] == [
                0,
                *(end for _, end in ends),
            ]
            is_layer = arrays.layer_axes(len(shape), places[i]) is not None
            if i not in whole and len(scans) == len(found) and is_tiled and is_layer:
                for (scan, x), of_one in zip(scans, in_scans, strict=True):
                    position = [layers.key for layers in scan.layers].index(x.key)
                    stack = Stack(i, (*outer.get(i, ()), *of_one[:1]))
                    of_scan.setdefault(id(scan), {})[position] = stack
        updated = {stack.index for found in of_scan.values() for stack in found.values()}
        failed = {i for body, _ in inside.values() for i in body.params} - updated
        if not failed:
            return _Layers(places, of_scan, {k: body for k, (body, _) in inside.items()})
        whole |= failed


def _uses(
    program: Sequence[jaxprs.Operation], roots: Sequence[Atom], loss: Loss
) -> dict[int, list[tuple[jaxprs.Scan, jaxprs.Layers] | None]]:
    """Returns the uses of each trainable parameter that contribute to its gradient.

    Returns:
      By index, the scan and the layers that it reads, or None for another use.
    """
    active = stacks.active_variables(program, roots)
    uses: dict[Any, list[Any]] = {}
    for operation in program:
        if active.isdisjoint(operation.outvars) or stacks.stops(operation):
            continue
        others = operation.invars
        if isinstance(operation, jaxprs.Scan):
            others = [*operation.consts, *operation.carry]
            for layers in operation.layers:
                uses.setdefault(loss.index(layers.of), []).append((operation, layers))
        for atom in others:
            uses.setdefault(loss.index(atom), []).append(None)
    for atom in roots:
        uses.setdefault(loss.index(atom), []).append(None)
    uses.pop(None, None)
    return uses


def _cut_body(
    scan: jaxprs.Scan,
    loss: Loss,
    outer: Mapping[int, tuple[Place, ...]],
    whole: Collection[int],
) -> tuple[Body, dict[int, tuple[Place, ...]]] | None:
    """Cuts the body of a scan at the layer scans inside it.

    Returns:
      The body, and where each parameter that is updated has the layers of one layer of `scan`; None
      if no parameter is scanned inside.
    """
    if not jaxprs.has_scan(scan.body):
        return None
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(scan.body).invars]
    xs = inputs[len(inputs) - len(scan.layers) :]
    params = {
        x: layers
        for x, layers in zip(xs, scan.layers, strict=True)
        if isinstance(layers.of, jex.Var) and any(layers.of is v for v in loss.params)
    }
    indices = {x: loss.index(layers.of) for x, layers in params.items()}
    trainable = {x: i for x, i in indices.items() if i is not None and i not in whole}
    others = [v for v in inputs if v not in params]
    inner = Loss(scan.body, list(params), trainable, others)
    operations, results = stacks.inline_calls(inner, inputs)
    operations = stacks.scan_parameters(operations, results, results, inner)
    within = {i: (*outer.get(i, ()), params[x].place) for x, i in trainable.items()}
    layers = _layers_to_update(operations, results, inner, within)
    if not layers.of_scan:
        return None
    body = Body(
        inputs=inputs,
        operations=operations,
        segments=_cut(inner, operations, results, layers),
        results=results,
        params={i: x for x, i in trainable.items()},
        stacks=frozenset(params),
    )
    updated = {stack.index for found in layers.of_scan.values() for stack in found.values()}
    return body, {i: layers.places[i] for i in updated}


def _cut(
    loss: Loss,
    program: Sequence[jaxprs.Operation],
    results: Sequence[Atom],
    layers: _Layers,
) -> list[DenseSegment | LayerScan]:
    """Cuts a program before and after each layer scan.

    Args:
      loss: the inputs of the program.
      program: see `stacks.scan_parameters`.
      results: its results.
      layers: see `_layers_to_update`.
    """
    groups: list[list[jaxprs.Operation]] = [[]]
    for operation in program:
        if isinstance(operation, jaxprs.Scan):
            groups += [[operation], []]
        else:
            groups[-1].append(operation)
    groups = [group for group in _cast_late(groups, results, loss) if group] or [[]]

    defined = [jaxprs.variables(v for op in group for v in op.outvars) for group in groups]
    used = [
        [v for v in jaxprs.variables(a for op in group for a in op.invars) if v not in own]
        for group, own in zip(groups, defined, strict=True)
    ]
    first_use = dict.fromkeys(loss.trainable.values(), 0)  # an unused one has a zero gradient
    for k in reversed(range(len(groups))):
        first_use.update({loss.trainable[v]: k for v in used[k] if v in loss.trainable})

    stacked = {stack.index for found in layers.of_scan.values() for stack in found.values()}
    segments: list[DenseSegment | LayerScan] = []
    for k, group in enumerate(groups):
        dense = [i for i, first in first_use.items() if first == k and i not in stacked]
        if group and isinstance(group[0], jaxprs.Scan):
            found = layers.of_scan.get(id(group[0]), {})
            body = layers.bodies.get(id(group[0]))
            segments.append(LayerScan(group[0], dict(sorted(found.items())), dense, body))
        else:
            later = jaxprs.variables(results).keys() | {v for u in used[k + 1 :] for v in u}
            outputs = [v for v in defined[k] if v in later]
            function = jaxprs.as_function(loss.closed, group, used[k], outputs)
            segments.append(DenseSegment(function, used[k], outputs, dense))
    return segments


def _cast_late(
    groups: Sequence[Sequence[jaxprs.Operation]], results: Sequence[Atom], loss: Loss
) -> list[list[jaxprs.Operation]]:
    """Moves casts of parameters, and the like, into each segment that uses the result.

    The gradient then leaves the segment in the dtype of the parameter: it is summed without another
    rounding. And no cast parameter is stored from the first segment to the last.

    Args:
      groups: the operations of each segment; every second one is dense.
      results: of the program.
      loss: the inputs of the program.
    """
    casts: dict[jex.Var, jex.JaxprEqn] = {}
    for eqn in itertools.chain(*groups):
        if not isinstance(eqn, jaxprs.Scan) and eqn.primitive.name in _CASTS:
            operand = eqn.invars[0]
            if isinstance(operand, jex.Var) and (operand in casts or operand in loss.params):
                casts[eqn.outvars[0]] = eqn

    def needed(operations: Iterable[jaxprs.Operation], atoms: Iterable[Atom] = ()) -> list[Any]:
        operands = [a for operation in operations for a in operation.invars]
        return jaxprs.live(list(casts.values()), [*operands, *atoms])

    rest = [[op for op in group if casts.keys().isdisjoint(op.outvars)] for group in groups]
    for k, group in enumerate(rest):
        # A layer scan gets the result from the dense segment before it.
        following = rest[k + 1] if k + 1 < len(rest) and k % 2 == 0 else []
        is_last = k == len(rest) - 1
        if k % 2 == 0:
            rest[k] = [*needed([*group, *following], results if is_last else ()), *group]
    return rest


def _check_result(shape: PyTree, has_aux: bool) -> tuple[bool, Any]:
    """Raises TypeError if the result of `loss_fn` does not fit `has_aux`, or is no loss.

    Returns:
      Whether the loss has a weight, and the structure of aux.
    """
    is_pair = isinstance(shape, tuple) and len(shape) == 2 and not isinstance(shape, WeightedLoss)
    if has_aux and not is_pair:
        raise TypeError(f"with has_aux=True loss_fn must return (loss, aux), got {shape}")
    loss, aux = shape if has_aux else (shape, None)
    weighted = isinstance(loss, WeightedLoss)
    if weighted:
        loss, weight = loss
        if getattr(weight, "shape", None) != () or not (
            jnp.issubdtype(weight.dtype, jnp.floating) or jnp.issubdtype(weight.dtype, jnp.integer)
        ):
            raise TypeError(f"the weight of a WeightedLoss must be a real scalar, got {weight}")
    if not isinstance(loss, jax.ShapeDtypeStruct):
        raise TypeError(
            f"loss_fn must return a scalar, got {loss}: pass has_aux=True if it returns (loss, aux)"
        )
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return a floating-point scalar, got {loss.dtype}{list(loss.shape)}"
        )
    return weighted, jax.tree.structure(aux)


def _check_weight(label: int, names: Sequence[str]) -> None:
    of_params = label & ((1 << len(names)) - 1)
    if of_params:
        raise ValueError(
            f"the weight of the loss depends on parameter {names[of_params.bit_length() - 1]}: "
            "compute it from the batch alone, such as a count of tokens"
        )
