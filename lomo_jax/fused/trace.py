"""Traces a loss and cuts it at its layer scans: dense segment, layer scan, dense segment, ..."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs, stacks
from lomo_jax.fused.arrays import Params, PyTree
from lomo_jax.fused.jaxprs import Atom
from lomo_jax.fused.microbatches import WeightedLoss


class DenseSegment(NamedTuple):
    """Equations without a layer scan: all their gradients exist at once."""

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
    axis: int  # of its layers
    start: int  # the first of these layers


class LayerScan(NamedTuple):
    """A scan over stacked parameters: one layer's gradient exists at a time."""

    scan: jaxprs.Scan
    stacks: dict[int, Stack]  # position in scan.xs -> the layers that it updates
    dense: list[int]  # parameters that all layers share, first used here

    @property
    def stacked(self) -> list[Stack]:
        """The layers that it updates, in the order of the scan's inputs."""
        return list(self.stacks.values())


class TracedLoss(NamedTuple):
    """A loss as segments that run one after the other.

    Parameters are given by their index among the leaves of the tree.
    """

    params: list[jex.Var]
    batch: list[jex.Var]
    segments: list[DenseSegment | LayerScan]
    loss: Atom
    weight: Callable[..., list[Any]] | None  # (*batch) -> [weight of a `WeightedLoss`]
    aux: list[Atom]
    aux_tree: Any
    layer_axes: dict[int, int]  # of the trainable parameters that are stacks
    differentiable: frozenset[jex.Var]  # floating-point, and depend on a trainable parameter
    of_batch: frozenset[jex.Var]  # depend on the batch

    @property
    def stacked(self) -> frozenset[int]:
        """The trainable parameters whose layers are updated one by one."""
        return frozenset(stack.index for segment in self.segments for stack in segment.stacked)

    def differentiates(self, atoms: Sequence[Atom]) -> list[bool]:
        """Returns for each atom whether it has a cotangent."""
        return [isinstance(a, jex.Var) and a in self.differentiable for a in atoms]


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
        loss = stacks.Loss(
            closed, param_vars, {v: i for i, v in enumerate(param_vars) if trainable[i]}, batch_vars
        )
        program, results = _inline(loss, inputs)
        weight = None
        if weighted:
            weight_atom = results.pop(1)
            labels = jaxprs.labels(program, loss.labels)
            _check_weight(jaxprs.label(weight_atom, labels), names)
            weight = jaxprs.as_function(
                closed, jaxprs.live(program, [weight_atom]), batch_vars, [weight_atom]
            )
        program = stacks.scan_parameters(program, results, loss)
    axes, walked = _layers_to_update(program, results[0], loss)
    labels = jaxprs.labels(program, loss.labels)
    of_trainable = dict.fromkeys(loss.trainable, 1)
    reached = jaxprs.labels(program, of_trainable, derivative=True)
    return TracedLoss(
        params=param_vars,
        batch=batch_vars,
        segments=_cut(loss, program, results, walked),
        loss=results[0],
        weight=weight,
        aux=results[1:],
        aux_tree=aux_tree,
        layer_axes=axes,
        differentiable=frozenset(v for v in reached if reached[v] and jaxprs.is_float(v)),
        of_batch=frozenset(v for v in labels if labels[v] & loss.of_batch),
    )


def _inline(loss: stacks.Loss, inputs: Sequence[jex.Var]) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """Replaces calls by their bodies, but of checkpoints only those that a layer scan needs."""
    everything, _ = jaxprs.inline(loss.closed, inputs, jaxprs.is_call)
    moved = stacks.moved_equations(everything, loss)

    def is_needed(jaxpr) -> bool:
        return any(
            is_needed(jaxprs.called_jaxpr(eqn)) if jaxprs.is_call(eqn) else id(eqn.params) in moved
            for eqn in jaxprs.open_jaxpr(jaxpr).eqns
        )

    return jaxprs.inline(
        loss.closed,
        inputs,
        lambda eqn: (
            jaxprs.is_call(eqn)
            and (not jaxprs.is_checkpoint(eqn) or is_needed(jaxprs.called_jaxpr(eqn)))
        ),
    )


def _layers_to_update(
    program: Sequence[jaxprs.Operation], result: Atom, loss: stacks.Loss
) -> tuple[dict[int, int], dict[int, dict[int, Stack]]]:
    """Finds the parameters whose layers can be updated one by one.

    Returns:
      The layer axis of each stack, by index; and for each `Scan`, by `id`, the layers that it
      updates, by their position among its xs.
    """
    active = stacks.active_variables(program, result)
    uses: dict[int, list[tuple[jaxprs.Scan, jaxprs.Layers] | None]] = {}
    for operation in program:
        is_active = not active.isdisjoint(operation.outvars)
        is_scan = isinstance(operation, jaxprs.Scan)
        for layers in operation.layers if is_scan else ():
            if loss.is_trainable(layers.of) and is_active:
                uses.setdefault(loss.trainable[layers.of], []).append((operation, layers))
        others = [*operation.consts, *operation.carry] if is_scan else operation.invars
        for v in jaxprs.variables(others):
            if v in loss.trainable and is_active and not _stops(operation):
                uses.setdefault(loss.trainable[v], []).append(None)
    axes: dict[int, int] = {}
    walked: dict[int, dict[int, Stack]] = {}
    for i, found in uses.items():
        scans = [use for use in found if use is not None]
        if len({layers.axis for _, layers in scans}) != 1:
            continue
        (axis,) = {layers.axis for _, layers in scans}
        axes[i] = axis
        ends = sorted((layers.start, layers.start + scan.length) for scan, layers in scans)
        whole = jaxprs.shape(loss.params[i])[axis]
        starts_after = [0, *(end for _, end in ends)]
        if len(scans) == len(found) and [*(s for s, _ in ends), whole] == starts_after:
            for scan, layers in scans:
                position = [x.key for x in scan.layers].index(layers.key)
                walked.setdefault(id(scan), {})[position] = Stack(i, axis, layers.start)
    return axes, walked


def _stops(operation: jaxprs.Operation) -> bool:
    return not isinstance(operation, jaxprs.Scan) and operation.primitive.name == "stop_gradient"


def _cut(
    loss: stacks.Loss,
    program: Sequence[jaxprs.Operation],
    results: Sequence[Atom],
    walked: Mapping[int, dict[int, Stack]],
) -> list[DenseSegment | LayerScan]:
    """Cuts a program before and after each layer scan.

    Args:
      loss: the inputs of the program.
      program: see `stacks.scan_parameters`.
      results: its results.
      walked: see `_layers_to_update`.
    """
    groups: list[list[jaxprs.Operation]] = [[]]
    for operation in program:
        if isinstance(operation, jaxprs.Scan):
            groups += [[operation], []]
        else:
            groups[-1].append(operation)
    groups = [group for group in groups if group] or [[]]

    used = [
        jaxprs.variables(a for operation in group for a in operation.invars) for group in groups
    ]
    first_use = dict.fromkeys(loss.trainable.values(), 0)  # an unused one has a zero gradient
    for k in reversed(range(len(groups))):
        first_use.update({loss.trainable[v]: k for v in used[k] if v in loss.trainable})

    stacked = {stack.index for found in walked.values() for stack in found.values()}
    segments: list[DenseSegment | LayerScan] = []
    for k, group in enumerate(groups):
        dense = [i for i, first in first_use.items() if first == k and i not in stacked]
        if group and isinstance(group[0], jaxprs.Scan):
            found = walked.get(id(group[0]), {})
            segments.append(LayerScan(group[0], dict(sorted(found.items())), dense))
        else:
            defined = jaxprs.variables(v for eqn in group for v in eqn.outvars)
            later = jaxprs.variables(results).keys() | {v for u in used[k + 1 :] for v in u}
            inputs = [v for v in used[k] if v not in defined]
            outputs = [v for v in defined if v in later]
            function = jaxprs.as_function(loss.closed, group, inputs, outputs)
            segments.append(DenseSegment(function, inputs, outputs, dense))
    return segments


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
