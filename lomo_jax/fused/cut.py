"""Cuts a traced loss at its layer scans: dense segment, layer scan, dense segment, ..."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs, parameters
from lomo_jax.fused.jaxprs import Atom
from lomo_jax.fused.microbatches import WeightedLoss
from lomo_jax.fused.stacks import Stacks


class Dense(NamedTuple):
    """A piece of the loss without a layer scan: all its gradients exist together."""

    function: Callable[..., list[Any]]  # (*inputs) -> outputs
    inputs: list[jex.Var]
    outputs: list[jex.Var]
    dense: list[int]  # parameters whose first use is here, so that their gradient is complete here

    @property
    def stacked(self) -> list[int]:
        """No parameter is scanned here."""
        return []


class Layers(NamedTuple):
    """A scan over stacked parameters: one layer's gradient exists at a time."""

    scan: jaxprs.Scan
    xs_params: dict[int, int]  # position among scan.xs -> trainable parameter
    dense: list[int]  # parameters that all layers share and whose first use is here

    @property
    def stacked(self) -> list[int]:
        """Parameters that are scanned here, in the order of the scan's inputs."""
        return list(self.xs_params.values())


class Cut(NamedTuple):
    """A loss as pieces that run one after the other."""

    params: list[jex.Var]
    batch: list[jex.Var]
    pieces: list[Dense | Layers]
    loss: Atom
    weight: Callable[..., list[Any]] | None  # (*batch) -> [weight of a `WeightedLoss`]
    aux: list[Atom]
    aux_tree: Any
    differentiable: frozenset[jex.Var]  # floating-point, and reached by a trainable parameter
    of_batch: frozenset[jex.Var]  # reached by the batch

    @property
    def stacked(self) -> frozenset[int]:
        """The trainable parameters that are scanned over."""
        return frozenset(i for piece in self.pieces for i in piece.stacked)

    def differentiates(self, atoms: Sequence[Atom]) -> list[bool]:
        """For each atom: whether it has a cotangent."""
        return [isinstance(a, jex.Var) and a in self.differentiable for a in atoms]


def cut(
    loss_fn: Callable[..., Any],
    params: Any,
    batch: Any,
    *,
    has_aux: bool = False,
    trainable: Sequence[bool],
) -> Cut:
    """Traces `loss_fn(params, batch)` and cuts it at every scan that consumes a parameter.

    Args:
      loss_fn: returns a scalar loss or a `WeightedLoss`, or (either, aux) with `has_aux`.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      batch: likewise.
      has_aux: see `loss_fn`.
      trainable: for each leaf of `params`, whether it has a gradient.

    Raises:
      TypeError: the loss is not a floating-point scalar.
      ValueError: a parameter is used in a way that its layers cannot be updated one by one, or the
        weight of the loss depends on one.
    """
    closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, batch)
    weighted, aux_tree = _check_result(shape, has_aux)
    names = parameters.names(params)
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    param_vars, batch_vars = inputs[: len(names)], inputs[len(names) :]

    stacks = Stacks(names, param_vars, trainable)
    labels = stacks.labels(batch_vars)
    eqns, results = jaxprs.inline(closed, inputs, labels, lambda eqn: stacks.in_call(eqn, labels))
    eqns, results = jaxprs.see_through(eqns, results, param_vars)
    weight = None
    if weighted:
        weight_atom = results.pop(1)
        _check_weight(jaxprs.label(weight_atom, labels), names)
        weight = jaxprs.as_function(
            closed, jaxprs.live(eqns, [weight_atom]), batch_vars, [weight_atom]
        )
    eqns = jaxprs.live(eqns, results)
    scans = stacks.find(eqns, results[0], labels)
    return Cut(
        params=param_vars,
        batch=batch_vars,
        pieces=_pieces(closed, eqns, results, scans, stacks),
        loss=results[0],
        weight=weight,
        aux=results[1:],
        aux_tree=aux_tree,
        differentiable=frozenset(
            v for v, label in labels.items() if label & stacks.trainable_labels and _is_float(v)
        ),
        of_batch=frozenset(v for v, label in labels.items() if label & stacks.batch_label),
    )


def _pieces(closed, eqns, results, scans, stacks: Stacks) -> list[Dense | Layers]:
    groups: list[list[jex.JaxprEqn]] = [[]]
    for eqn in eqns:
        if id(eqn) in scans:
            groups += [[eqn], []]
        else:
            groups[-1].append(eqn)
    groups = [group for group in groups if group] or [[]]

    used = [jaxprs.variables(a for eqn in group for a in eqn.invars) for group in groups]
    first_use = dict.fromkeys(stacks.index.values(), 0)  # one that is not used has a zero gradient
    for k in reversed(range(len(groups))):
        first_use.update({stacks.index[v]: k for v in used[k] if v in stacks.index})

    stacked = {i for xs_params in scans.values() for i in xs_params.values()}
    pieces: list[Dense | Layers] = []
    for k, group in enumerate(groups):
        owned = [i for i, first in first_use.items() if first == k and i not in stacked]
        xs_params = scans.get(id(group[0])) if group else None
        if xs_params is not None:
            pieces.append(Layers(jaxprs.read_scan(group[0]), xs_params, owned))
        else:
            defined = jaxprs.variables(v for eqn in group for v in eqn.outvars)
            later = jaxprs.variables(results).keys() | {v for u in used[k + 1 :] for v in u}
            inputs = [v for v in used[k] if v not in defined]
            outputs = [v for v in defined if v in later]
            function = jaxprs.as_function(closed, group, inputs, outputs)
            pieces.append(Dense(function, inputs, outputs, owned))
    return pieces


def _is_float(var: jex.Var) -> bool:
    return jnp.issubdtype(jaxprs.dtype(var), jnp.inexact)


def _check_result(shape, has_aux: bool) -> tuple[bool, Any]:
    """Raises TypeError if loss_fn does not return what it should.

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
            f"the weight of the loss depends on parameter {names[of_params.bit_length() - 1]}: it "
            "must be known from the batch alone, such as a count of tokens"
        )
