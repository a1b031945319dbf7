"""Cuts a traced loss at its layer scans: dense segment, layer scan, dense segment, ..."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs
from lomo_jax.fused.jaxprs import Atom


class Dense(NamedTuple):
    """A piece of the loss without a layer scan. Its parameters' gradients exist together."""

    function: Callable[..., list[Any]]  # (*inputs) -> outputs
    inputs: list[jex.Var]
    outputs: list[jex.Var]
    dense: list[int]  # parameters that are used here first, so updated here

    @property
    def stacked(self) -> list[int]:
        return []


class Layers(NamedTuple):
    """A scan over stacked parameters. One layer's gradient exists at a time."""

    scan: jaxprs.Scan
    xs_params: dict[int, int]  # position among scan.xs -> parameter
    inputs: list[jex.Var]
    outputs: list[jex.Var]
    dense: list[int]  # parameters that all layers share and that are used here first

    @property
    def stacked(self) -> list[int]:
        return list(self.xs_params.values())


class Cut(NamedTuple):
    """A loss, cut into `nodes` that run one after the other."""

    params: list[jex.Var]
    batch: list[jex.Var]
    nodes: list[Dense | Layers]
    loss: Atom
    aux: list[Atom]
    aux_tree: Any
    differentiable: frozenset[jex.Var]  # variables that a trainable parameter reaches
    trainable: list[bool]


def cut(loss_fn: Callable, params, batch, *, has_aux: bool) -> Cut:
    """Traces `loss_fn(params, batch)` and cuts it at every scan that consumes a parameter.

    Args:
      loss_fn: returns a scalar loss, or (loss, aux) with `has_aux`.
      params, batch: pytrees of arrays or `jax.ShapeDtypeStruct`.

    Raises:
      TypeError: the loss is not a real floating-point scalar.
      ValueError: the gradient of a stack could only be had for all its layers at once; names the parameter.
    """
    closed, shape = jax.make_jaxpr(loss_fn, return_shape=True)(params, batch)
    loss_shape, aux_tree = _check_output(shape, has_aux)
    leaves = jax.tree_util.tree_leaves_with_path(params)
    names = [jax.tree_util.keystr(path) for path, _ in leaves]
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    param_vars, batch_vars = variables[: len(leaves)], variables[len(leaves) :]
    trainable = [jnp.issubdtype(v.aval.dtype, jnp.inexact) for v in param_vars]

    stacks = _Stacks(names, param_vars, trainable)
    labels = dict(stacks.labels)
    labels.update(dict.fromkeys(batch_vars, stacks.batch_label))
    eqns, results = jaxprs.inline(
        closed, variables, labels, lambda eqn: stacks.inside_call(eqn, labels)
    )
    scans = stacks.find(eqns, results, labels)

    groups: list[list[jex.JaxprEqn]] = [[]]
    for eqn in eqns:
        if id(eqn) in scans:
            groups += [[eqn], []]
        else:
            groups[-1].append(eqn)
    groups = [group for group in groups if group]

    owner = dict.fromkeys(range(len(leaves)), 0)
    index = {v: i for i, v in enumerate(param_vars)}
    used = [{a for e in g for a in e.invars if not isinstance(a, jex.Literal)} for g in groups]
    for k in reversed(range(len(groups))):
        owner.update({index[v]: k for v in used[k] if v in index})
    results_used = {a for a in results if not isinstance(a, jex.Literal)}

    nodes: list[Dense | Layers] = []
    for k, group in enumerate(groups):
        defined = [v for eqn in group for v in eqn.outvars]
        later = results_used.union(*used[k + 1 :])
        inputs = [v for v in _ordered(group) if v not in set(defined)]
        outputs = [v for v in defined if v in later]
        owned = [i for i, k_owner in owner.items() if k_owner == k and trainable[i]]
        xs_params = scans.get(id(group[0]))
        if xs_params is None:
            function = jaxprs.as_function(closed, group, inputs, outputs)
            nodes.append(Dense(function, inputs, outputs, owned))
        else:
            owned = [i for i in owned if i not in xs_params.values()]
            scan = jaxprs.read_scan(group[0])
            nodes.append(Layers(scan, xs_params, inputs, outputs, owned))
    return Cut(
        params=param_vars,
        batch=batch_vars,
        nodes=nodes,
        loss=results[0],
        aux=results[1:],
        aux_tree=aux_tree,
        differentiable=frozenset(
            v
            for v, label in labels.items()
            if label & stacks.param_labels and jnp.issubdtype(v.aval.dtype, jnp.inexact)
        ),
        trainable=trainable,
    )


def _check_output(shape, has_aux: bool):
    if has_aux and not (isinstance(shape, tuple) and len(shape) == 2):
        raise TypeError(f"with has_aux, loss_fn must return (loss, aux), got {shape}")
    loss, aux = shape if has_aux else (shape, None)
    if not hasattr(loss, "dtype"):
        raise TypeError(
            f"loss_fn must return a scalar, got {loss}; pass has_aux=True for (loss, aux)"
        )
    if loss.shape != () or not jnp.issubdtype(loss.dtype, jnp.floating):
        raise TypeError(
            f"loss_fn must return a floating-point scalar, got {loss.dtype}{list(loss.shape)}"
        )
    return loss, jax.tree.structure(aux)


def _ordered(group: Sequence[jex.JaxprEqn]) -> list[jex.Var]:
    operands = (a for eqn in group for a in eqn.invars if not isinstance(a, jex.Literal))
    return list(dict.fromkeys(operands))


class _Stacks:
    """Finds the parameters that are scanned, and refuses what would need their whole gradient."""

    def __init__(self, names, param_vars, trainable):
        self.names, self.param_vars = names, param_vars
        self.index = {v: i for i, v in enumerate(param_vars)}
        self.batch_label = 1 << len(param_vars)
        self.labels = {v: (1 << i) * trainable[i] for i, v in enumerate(param_vars)}
        self.param_labels = sum(self.labels.values())
        self.trainable = trainable

    def inside_call(self, eqn, labels) -> bool:
        """Whether `eqn` is a call that has a layer scan inside."""
        called = jaxprs.called_jaxpr(eqn)
        if called is None:
            return False
        return self._has_scan(called, [jaxprs.label(a, labels) for a in eqn.invars])

    def _has_scan(self, closed, inputs) -> bool:
        env = dict(zip(jaxprs.open_jaxpr(closed).invars, inputs, strict=True))
        for eqn in jaxprs.open_jaxpr(closed).eqns:
            if jaxprs.is_scan(eqn):
                scan = jaxprs.read_scan(eqn)
                if any(self._stack_of(x, env, scan.length) is not None for x in scan.xs):
                    return True
            if self.inside_call(eqn, env):
                return True
            env.update(zip(eqn.outvars, jaxprs.eqn_dependence(eqn, env), strict=True))
        return False

    def _stack_of(self, x: Atom, labels, length: int) -> int | None:
        """The parameter, if any, that scanned input `x` is or is computed from with the batch out of play.

        An axis as long as the scan tells a stack of layers from, say, an embedding that is scanned in chunks.
        """
        label = jaxprs.label(x, labels)
        if label & self.batch_label or not length:
            return None
        for i, v in enumerate(self.param_vars):
            if label >> i & 1 and length in v.aval.shape:
                return i
        return None

    def find(self, eqns, results, labels) -> dict[int, dict[int, int]]:
        """Layer scans by the id of their equation, each with its parameters by position among xs."""
        scans: dict[int, dict[int, int]] = {}
        producers = {v: eqn for eqn in eqns for v in eqn.outvars}
        for eqn in eqns:
            if jaxprs.is_scan(eqn):
                scan = jaxprs.read_scan(eqn)
                xs_params = {}
                for position, x in enumerate(scan.xs):
                    i = self._stack_of(x, labels, scan.length)
                    if i is None:
                        continue
                    if x is not self.param_vars[i]:
                        self._refuse_derived(i, producers[x])
                    xs_params[position] = i
                if xs_params:
                    scans[id(eqn)] = xs_params
                    continue
                self._refuse_indexed(scan)
            self._refuse_nested(eqn, eqn.invars, eqn)
        self._refuse_shared(eqns, results, scans)
        return scans

    def _refuse_derived(self, i, producer):
        op = producer.primitive.name
        raise ValueError(
            f"parameter {self.names[i]} reaches the layer scan through `{op}` of the whole stack: scan the "
            f"parameter itself, layers on axis 0, and apply `{op}` to one layer inside the scanned function"
        )

    def _refuse_shared(self, eqns, results, scans):
        for params in scans.values():
            for i in params.values():
                v = self.param_vars[i]
                users = [e.primitive.name for e in eqns for a in e.invars if a is v]
                users += ["the result" for a in results if a is v]
                if len(users) > 1:
                    users.remove("scan")
                    raise ValueError(
                        f"parameter {self.names[i]} is scanned over its layers and also used by "
                        f"`{users[0]}`: its layers' gradients would have to be kept; give each use a "
                        "parameter of its own"
                    )

    def _refuse_indexed(self, scan):
        """Refuses a loop that picks its layer out of a stack by index."""
        inner = jaxprs.open_jaxpr(scan.body).invars
        for outer, v in zip(scan.consts, inner, strict=False):
            i = self._param(outer)
            if i is None or not outer.aval.shape or outer.aval.shape[0] != scan.length:
                continue
            if any(op == "dynamic_slice" for op in jaxprs.users(scan.body, v)):
                raise ValueError(
                    f"parameter {self.names[i]} is indexed by layer inside a loop: pass it to lax.scan as "
                    "a scanned input (xs) instead"
                )

    def _refuse_nested(self, eqn, operands, top):
        """Refuses a layer scan inside an operation that cannot be cut."""
        for body in jaxprs.bodies(eqn):
            inner = jaxprs.open_jaxpr(body)
            if len(inner.invars) > len(operands):
                continue
            outer = dict(
                zip(inner.invars, operands[len(operands) - len(inner.invars) :], strict=True)
            )
            for e in inner.eqns:
                renamed = [None if isinstance(a, jex.Literal) else outer.get(a) for a in e.invars]
                if jaxprs.is_scan(e):
                    xs = renamed[len(renamed) - len(jaxprs.read_scan(e).xs) :]
                    for x in xs:
                        i = self._param(x)
                        if i is not None:
                            raise ValueError(
                                f"parameter {self.names[i]} is scanned over its layers inside "
                                f"`{top.primitive.name}`, which cannot be cut open: take the layer scan out "
                                "of it"
                            )
                self._refuse_nested(e, renamed, top)

    def _param(self, atom) -> int | None:
        if not isinstance(atom, jex.Var):
            return None
        i = self.index.get(atom)
        return i if i is not None and self.trainable[i] else None
