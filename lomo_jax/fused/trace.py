"""Traces a loss and cuts it at its layer scans: dense segment, layer scan, dense segment, ..."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, NoReturn

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import arrays, jaxprs
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
    def stacked(self) -> list[int]:
        """No parameter is scanned here."""
        return []


class LayerScan(NamedTuple):
    """A scan over stacked parameters: one layer's gradient exists at a time."""

    scan: jaxprs.Scan
    xs_params: dict[int, int]  # position in scan.xs -> trainable parameter
    dense: list[int]  # parameters that all layers share, first used here

    @property
    def stacked(self) -> list[int]:
        """The trainable parameters that are scanned, in the order of the scan's inputs."""
        return list(self.xs_params.values())


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
    differentiable: frozenset[jex.Var]  # floating-point, and depend on a trainable parameter
    of_batch: frozenset[jex.Var]  # depend on the batch

    @property
    def stacked(self) -> frozenset[int]:
        """The trainable parameters that are scanned."""
        return frozenset(i for segment in self.segments for i in segment.stacked)

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
      ValueError: a stacked parameter is used in a way that needs the gradient of all its layers at
        once, or the weight of the loss depends on a parameter.
    """
    closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, batch)
    weighted, aux_tree = _check_result(shape, has_aux)
    names = arrays.names(params)
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    param_vars, batch_vars = inputs[: len(names)], inputs[len(names) :]

    finder = _LayerScanFinder(names, param_vars, trainable)
    labels = finder.labels(batch_vars)
    eqns, results = jaxprs.inline(
        closed, inputs, labels, lambda eqn: finder.is_call_of_layer_scan(eqn, labels)
    )
    eqns, results = jaxprs.see_through(eqns, results, param_vars)
    weight = None
    if weighted:
        weight_atom = results.pop(1)
        _check_weight(jaxprs.label(weight_atom, labels), names)
        weight = jaxprs.as_function(
            closed, jaxprs.live(eqns, [weight_atom]), batch_vars, [weight_atom]
        )
    eqns = jaxprs.live(eqns, results)
    scans = finder.find(eqns, results[0], labels)
    return TracedLoss(
        params=param_vars,
        batch=batch_vars,
        segments=_cut(closed, eqns, results, scans, finder.trainable),
        loss=results[0],
        weight=weight,
        aux=results[1:],
        aux_tree=aux_tree,
        differentiable=frozenset(
            v for v, label in labels.items() if label & finder.trainable_labels and _is_float(v)
        ),
        of_batch=frozenset(v for v, label in labels.items() if label & finder.batch_label),
    )


def _cut(
    closed: Any,
    eqns: Sequence[jex.JaxprEqn],
    results: Sequence[Atom],
    scans: Mapping[int, dict[int, int]],
    trainable: Mapping[jex.Var, int],
) -> list[DenseSegment | LayerScan]:
    """Cuts equations before and after each layer scan.

    Args:
      closed: the jaxpr that the equations come from.
      eqns: the equations.
      results: the results of the equations.
      scans: by the `id` of a layer scan's equation, see `_LayerScanFinder.find`.
      trainable: the indices of the trainable parameters.
    """
    groups: list[list[jex.JaxprEqn]] = [[]]
    for eqn in eqns:
        if id(eqn) in scans:
            groups += [[eqn], []]
        else:
            groups[-1].append(eqn)
    groups = [group for group in groups if group] or [[]]

    used = [jaxprs.variables(a for eqn in group for a in eqn.invars) for group in groups]
    first_use = dict.fromkeys(trainable.values(), 0)  # an unused one has a zero gradient
    for k in reversed(range(len(groups))):
        first_use.update({trainable[v]: k for v in used[k] if v in trainable})

    stacked = {i for xs_params in scans.values() for i in xs_params.values()}
    segments: list[DenseSegment | LayerScan] = []
    for k, group in enumerate(groups):
        dense = [i for i, first in first_use.items() if first == k and i not in stacked]
        xs_params = scans.get(id(group[0])) if group else None
        if xs_params is not None:
            segments.append(LayerScan(jaxprs.read_scan(group[0]), xs_params, dense))
        else:
            defined = jaxprs.variables(v for eqn in group for v in eqn.outvars)
            later = jaxprs.variables(results).keys() | {v for u in used[k + 1 :] for v in u}
            inputs = [v for v in used[k] if v not in defined]
            outputs = [v for v in defined if v in later]
            function = jaxprs.as_function(closed, group, inputs, outputs)
            segments.append(DenseSegment(function, inputs, outputs, dense))
    return segments


def _is_float(var: jex.Var) -> bool:
    return jnp.issubdtype(jaxprs.dtype(var), jnp.inexact)


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


class _LayerScanFinder:
    """Finds the scans over parameters, and refuses uses that would need a whole stack's gradient.

    Every variable has a label: the set of parameters that it depends on, and whether it depends on
    the batch, as the bits of an int (see `jaxprs.dependence`).
    """

    def __init__(self, names: Sequence[str], params: Sequence[jex.Var], trainable: Sequence[bool]):
        self.names, self.params = names, params
        self.trainable = {v: i for i, v in enumerate(params) if trainable[i]}
        self.frozen = {v: i for i, v in enumerate(params) if not trainable[i]}
        self.trainable_labels = sum(1 << i for i in self.trainable.values())
        self.batch_label = 1 << len(params)

    def labels(self, batch: Sequence[jex.Var]) -> dict[jex.Var, int]:
        """Returns the labels of the inputs of the loss."""
        labels = {v: 1 << i for i, v in enumerate(self.params)}
        labels.update(dict.fromkeys(batch, self.batch_label))
        return labels

    def is_call_of_layer_scan(self, eqn: jex.JaxprEqn, labels: Mapping[jex.Var, int]) -> bool:
        """Returns whether `eqn` is a call, such as `jit`, of a function with a layer scan."""
        called = jaxprs.called_jaxpr(eqn)
        if called is None:
            return False
        jaxpr = jaxprs.open_jaxpr(called)
        env = {v: jaxprs.label(a, labels) for v, a in zip(jaxpr.invars, eqn.invars, strict=True)}
        for inner in jaxpr.eqns:
            if self._is_layer_scan(inner, env) or self.is_call_of_layer_scan(inner, env):
                return True
            env.update(zip(inner.outvars, jaxprs.eqn_dependence(inner, env), strict=True))
        return False

    def find(
        self,
        eqns: Sequence[jex.JaxprEqn],
        loss: Atom,
        labels: Mapping[jex.Var, int],
    ) -> dict[int, dict[int, int]]:
        """Finds the layer scans.

        Returns:
          For each layer scan, by the `id` of its equation, the trainable parameters by their
          position among its xs; none if all its parameters are frozen.

        Raises:
          ValueError: the layers of a parameter cannot be updated one by one.
        """
        scans: dict[int, dict[int, int]] = {}
        producers: dict[Atom, jex.JaxprEqn] = {v: eqn for eqn in eqns for v in eqn.outvars}
        for eqn in eqns:
            found = self._scanned(eqn, labels, self.trainable)
            xs = jaxprs.read_scan(eqn).xs if found else []
            for position, i in found.items():
                if xs[position] is not self.params[i]:
                    self._refuse_derived(i, producers[xs[position]])
            if self._is_layer_scan(eqn, labels):
                scans[id(eqn)] = found
            else:
                self._refuse_hidden(eqn, eqn.invars)
        # Only the loss is differentiated: aux and prints may use a stack in any way.
        for_loss = jaxprs.live(eqns, [loss], effects=False)
        for found in scans.values():
            for i in found.values():
                self._refuse_shared(i, for_loss)
        return scans

    def _is_layer_scan(self, eqn: jex.JaxprEqn, labels: Mapping[jex.Var, int]) -> bool:
        # The backward pass recomputes frozen layers from their inputs too.
        return any(self._scanned(eqn, labels, group) for group in (self.trainable, self.frozen))

    def _scanned(
        self,
        eqn: jex.JaxprEqn,
        labels: Mapping[jex.Var, int],
        params: Mapping[jex.Var, int],
    ) -> dict[int, int]:
        """Returns which of `params` a scan's xs are, or are derived from, by position.

        A value that depends on the batch is an activation. An x is a stack of layers if it is a
        parameter, or derived from one with three axes, or has the shape of one up to the order of
        its axes (a cast, a transpose): an embedding that is scanned in chunks is none of these.
        """
        if not jaxprs.is_scan(eqn):
            return {}
        scan = jaxprs.read_scan(eqn)
        found = {}
        for position, x in enumerate(scan.xs):
            label = jaxprs.label(x, labels)
            if not scan.length or label & self.batch_label:
                continue
            for v, i in params.items():
                shape, x_shape = jaxprs.shape(v), jaxprs.shape(x)
                rearranged = scan.length in shape and sorted(shape) == sorted(x_shape)
                if label >> i & 1 and (x is v or len(shape) > 2 or rearranged):
                    found[position] = i
        return found

    def _refuse_derived(self, i: int, producer: jex.JaxprEqn) -> NoReturn:
        op = producer.primitive.name
        raise ValueError(
            f"parameter {self.names[i]} reaches the layer scan through `{op}` of the whole "
            "stack: scan the parameter itself, layers on axis 0, and apply the operation to one "
            "layer inside the scanned function"
        )

    def _refuse_shared(self, i: int, eqns: Sequence[jex.JaxprEqn]) -> None:
        users = [eqn.primitive.name for eqn in eqns for a in eqn.invars if a is self.params[i]]
        if len(users) > 1:
            users.remove("scan")
            raise ValueError(
                f"parameter {self.names[i]} is scanned over its layers and also used by "
                f"`{users[0]}`, which needs the gradients of all layers at once: give the second "
                "use a parameter of its own, or return what it needs from the scan as ys"
            )

    def _refuse_hidden(
        self, eqn: jex.JaxprEqn, operands: Sequence[Atom | None], inside: str | None = None
    ) -> None:
        """Refuses loops over layers, in `eqn` and in the jaxprs inside it, that cannot be cut.

        Args:
          eqn: an equation of the loss, or of a jaxpr inside it.
          operands: the variables of the loss that its operands are; None for other operands.
          inside: the operation around `eqn` that cannot be cut open, if there is one.
        """
        if jaxprs.is_scan(eqn):
            self._refuse_indexed(eqn, operands)
            scan = jaxprs.read_scan(eqn)
            for i in map(self._param, operands[len(operands) - len(scan.xs) :]):
                if inside and i is not None:
                    raise ValueError(
                        f"parameter {self.names[i]} is scanned over its layers inside `{inside}`, "
                        f"which cannot be cut: move the layer scan out of `{inside}`"
                    )
        if inside is None and jaxprs.called_jaxpr(eqn) is None:
            inside = eqn.primitive.name
        for body in jaxprs.bodies(eqn):
            inner = jaxprs.open_jaxpr(body)
            if len(inner.invars) <= len(operands):
                # A branch of `cond` lacks the first operand.
                env = dict(zip(inner.invars[::-1], operands[::-1], strict=False))
                for e in inner.eqns:
                    outer = [None if isinstance(a, jex.Literal) else env.get(a) for a in e.invars]
                    self._refuse_hidden(e, outer, inside)

    def _refuse_indexed(self, eqn: jex.JaxprEqn, operands: Sequence[Atom | None]) -> None:
        """Refuses a loop whose body indexes layer i of a stack."""
        scan = jaxprs.read_scan(eqn)
        consts = jaxprs.open_jaxpr(scan.body).invars[: len(scan.consts)]
        for i, v in zip(map(self._param, operands), consts, strict=False):
            if i is None or scan.length not in jaxprs.shape(v)[:1]:
                continue
            # A gather from a matrix may as well look up rows of an embedding.
            is_matrix = len(jaxprs.shape(v)) < 3
            lookups = {"dynamic_slice"} if is_matrix else {"dynamic_slice", "gather"}
            if any(
                eqn.primitive.name in lookups and eqn.params["slice_sizes"][0] == 1
                for eqn in jaxprs.users(scan.body, v)
            ):
                raise ValueError(
                    f"parameter {self.names[i]} is indexed by layer inside a loop: make it a "
                    "scanned input of lax.scan (xs) instead"
                )

    def _param(self, atom: Atom | None) -> int | None:
        return self.trainable.get(atom) if isinstance(atom, jex.Var) else None
