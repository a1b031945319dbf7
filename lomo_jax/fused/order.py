"""Evaluates a function in the order of its program, and uses each gradient as soon as it exists.

XLA schedules by dependence alone. Given the gradients of all parameters of a layer it may compute
all of them before it updates the first parameter, and store the operands of each until then. Here
everything waits, at an `optimization_barrier`, for the update before it. Only the smallest set of
values that the rest needs crosses the barrier: cheap values are computed again. (The CPU compiler
removes barriers early, and schedules freely.)
"""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from lomo_jax.fused import jaxprs

# XLA fuses these with their users: computing them again is faster than reading them from memory.
_CHEAP = frozenset(
    """abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos div
    eq erf exp exp2 expand_dims expm1 floor ge gt imag integer_pow iota is_finite le log log1p
    logistic lt max min mul name ne neg not or pad pow real reshape rev round rsqrt select_n sign
    sin slice split sqrt square squeeze
    shift_left shift_right_arithmetic shift_right_logical stop_gradient sub tan tanh transpose
    xor""".split()  # noqa: SIM905
) | {"reshard"}  # a gathered weight is large: gather it again
_TABLE = 1024  # elements of an array that it is cheap to gather from, such as a code book
_INFINITE = 2**30  # KiB
_SOURCE, _SINK = 0, 1  # nodes of the flow graph


def evaluate_in_order(
    function: Callable[..., tuple[Sequence[Any], Any]],
    shapes: Sequence[jax.ShapeDtypeStruct],
    args: Any,
    read: Callable[[Any, int], jax.Array],
    use: Callable[[Any, Sequence[int], Sequence[jax.Array]], Any],
    carry: Any,
    *,
    all_at_once: bool = False,
) -> tuple[Any, Any]:
    """Evaluates ``function(inputs, *args)``, and calls `use` with the gradients that it returns.

    Each gradient is used as soon as it exists and its input is not needed any more.

    Args:
      function: ``(list of inputs, *args) -> (gradients of the first inputs, other results)``.
      shapes: the shapes of the inputs.
      args: pytree of arrays.
      read: ``(carry, k)`` returns input k. Called each time that the program needs the input.
      use: ``(carry, ks, gradients)`` uses the gradients of the inputs ks; returns the new carry.
      carry: pytree of arrays that `read` and `use` work on.
      all_at_once: whether to call `use` once, with all gradients.

    Returns:
      The other results, and the last carry.
    """
    closed, shape = jax.make_jaxpr(lambda x, a: function(x, *a), return_shape=True)(shapes, args)
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    # Checkpoints are inlined too: the barriers here replace theirs.
    inlined = lambda eqn: eqn.primitive.name in jaxprs.INLINED  # noqa: E731
    eqns, results = jaxprs.inline(closed, variables, inlined)
    inputs = {v: k for k, v in enumerate(variables[: len(shapes)])}
    env = dict(zip(variables[len(shapes) :], jax.tree.leaves(args), strict=True))
    grads, others = results[: len(shape[0])], results[len(shape[0]) :]
    program = _order(
        jaxprs.live(eqns, results), list(inputs)[: len(grads)], grads, others, all_at_once
    )

    def value(atom):
        if isinstance(atom, jex.Literal):
            return atom.val
        if atom not in inputs:
            return env[atom]
        assert inputs[atom] not in done, "an input is read before its gradient is used"
        return read(carry, inputs[atom])

    done: set[int] = set()
    for number, (segment, ks) in enumerate(program):
        updated = {v for v, k in inputs.items() if k in done or k in ks}
        rest = [eqn for later, _ in program[number + 1 :] for eqn in later]
        pending = [grad for k, grad in enumerate(grads) if k not in done and k not in ks]
        so_far = [eqn for before, _ in program[: number + 1] for eqn in before]
        carried = _smallest_cut(so_far, rest, [*pending, *others], inputs, updated)
        outputs = jaxprs.variables([*(grads[k] for k in ks), *carried])
        outputs = [v for v in outputs if v not in env and v not in inputs]
        effects = [eqn for eqn in segment if eqn.effects]
        run = _needed([*so_far, *rest], outputs, env, effects)
        defined = jaxprs.variables(v for eqn in run for v in eqn.outvars)
        free = [v for v in jaxprs.variables(_operands(run)) if v not in defined]
        evaluate = jaxprs.as_function(closed, run, free, outputs)
        env.update(zip(outputs, evaluate(*map(value, free)), strict=True))
        if ks:
            carry = use(carry, ks, [value(grads[k]) for k in ks])
            done.update(ks)
        if rest:
            env = {v: env[v] for v in carried}
            values, carry = jax.lax.optimization_barrier((list(env.values()), carry))
            env = dict(zip(env, values, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shape[1]), map(value, others)), carry


class _Segment(NamedTuple):
    """Equations that are evaluated before the next barrier."""

    eqns: list[jex.JaxprEqn]
    complete: list[int]  # inputs whose gradients are used after them


def _order(
    eqns: Sequence[jex.JaxprEqn],
    inputs: Sequence[jex.Var],
    grads: Sequence[jaxprs.Atom],
    others: Sequence[jaxprs.Atom],
    all_at_once: bool,
) -> list[_Segment]:
    """Splits a program into segments, each with the gradients that are used after it.

    Equations that only one gradient needs, such as the matrix product that forms it, move behind
    the last use of its input, into a segment of their own.

    Args:
      eqns: the program.
      inputs: the inputs that have gradients.
      grads: their gradients.
      others: the other results.
      all_at_once: whether all gradients are used at once.
    """
    reached = dict.fromkeys(jaxprs.variables(others), 1 << len(grads))
    for k, grad in enumerate(grads):
        reached.update((v, reached.get(v, 0) | 1 << k) for v in jaxprs.variables([grad]))
    own: dict[int, list[jex.JaxprEqn]] = {1 << k: [] for k in range(len(grads))}
    common: list[jex.JaxprEqn] = []
    for eqn in reversed(eqns):
        label = 0
        for v in eqn.outvars:
            label |= reached.get(v, 0)
        operands = jaxprs.variables(eqn.invars)
        # An equation must come before the update of every input that it reads.
        if any(v in operands and label != 1 << k for k, v in enumerate(inputs)):
            label |= 1 << len(grads)
        for v in operands:
            reached[v] = reached.get(v, 0) | label
        own.get(label, common).append(eqn)

    common.reverse()
    time = {v: n for n, eqn in enumerate(common, 1) for v in eqn.outvars}
    for n, eqn in enumerate(common, 1):
        time.update((v, n) for v in jaxprs.variables(eqn.invars) if v in inputs)
    made = {v: n for n, eqn in enumerate(eqns) for v in eqn.outvars}
    groups: dict[int, list[int]] = {}
    made_at = [made.get(v, -1) if isinstance(v, jex.Var) else -1 for v in grads]
    for k in sorted(range(len(grads)), key=made_at.__getitem__):
        needs = jaxprs.variables([inputs[k], grads[k], *_operands(own[1 << k])])
        at = len(common) if all_at_once else max((time.get(v, 0) for v in needs), default=0)
        groups.setdefault(at, []).append(k)

    program, start = [], 0
    for at, ks in sorted(groups.items()):
        if at > start:
            program.append(_Segment(common[start:at], []))
        members = [ks] if all_at_once else [[k] for k in ks]
        program += [_Segment([e for k in m for e in own[1 << k][::-1]], m) for m in members]
        start = at
    return [*program, _Segment(common[start:], [])]


def _operands(eqns: Sequence[jex.JaxprEqn]) -> list[jaxprs.Atom]:
    return [atom for eqn in eqns for atom in eqn.invars]


def _needed(
    eqns: Sequence[jex.JaxprEqn],
    outputs: Sequence[jex.Var],
    known: Collection[jex.Var],
    effects: Sequence[jex.JaxprEqn],
) -> list[jex.JaxprEqn]:
    """Returns the equations that compute `outputs` from `known` variables; and `effects`."""
    needed, found = set(outputs), []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars) or any(eqn is e for e in effects):
            found.append(eqn)
            needed.update(v for v in jaxprs.variables(eqn.invars) if v not in known)
    return found[::-1]


def _smallest_cut(
    so_far: Sequence[jex.JaxprEqn],
    rest: Sequence[jex.JaxprEqn],
    results: Sequence[jaxprs.Atom],
    inputs: Collection[jex.Var],
    updated: Collection[jex.Var],
) -> list[jex.Var]:
    """Returns the smallest set of values from which `rest` and `results` are cheap to compute.

    It is a minimum cut, in the graph of the cheap equations, between the values that were expensive
    to compute and the equations that need them. The capacity of a value is its size.

    Args:
      so_far: equations that have been evaluated.
      rest: equations that have not.
      results: the values needed in the end.
      inputs: variables that can be read at any time.
      updated: the inputs that cannot be read any more.
    """
    from scipy import sparse  # slow to import: only when a step is traced
    from scipy.sparse import csgraph

    cheap = {v: eqn for eqn in [*so_far, *rest] for v in eqn.outvars if _is_cheap(eqn)}
    expensive = [eqn for eqn in rest if not _is_cheap(eqn)]
    late = {v for eqn in expensive for v in eqn.outvars}  # cannot be computed yet
    for eqn in rest:
        if not late.isdisjoint(jaxprs.variables(eqn.invars)):
            late.update(eqn.outvars)
    needed = jaxprs.variables([*results, *_operands(expensive)])
    is_source = lambda v: v in updated or not (v in late or v in inputs)  # noqa: E731
    is_fixed = lambda v: v in late or v in updated  # noqa: E731
    nodes, edges = _flow_graph(needed, cheap, is_source, is_fixed)
    if not edges:
        return []

    rows, columns = zip(*edges, strict=True)
    capacity = np.fromiter(edges.values(), np.int32)
    size = 2 * len(nodes) + 2
    graph = sparse.csr_array((capacity, (rows, columns)), shape=(size, size))
    spare = graph - csgraph.maximum_flow(graph, _SOURCE, _SINK).flow
    spare.eliminate_zeros()
    # Of several minimum cuts, choose the one with the least recomputation.
    near = set(csgraph.breadth_first_order(spare.T.tocsr(), _SINK, return_predecessors=False))
    return [v for v, node in nodes.items() if node + 1 in near and node not in near]


def _flow_graph(
    needed: Iterable[jex.Var],
    cheap: Mapping[jex.Var, jex.JaxprEqn],
    is_source: Callable[[jex.Var], bool],
    is_fixed: Callable[[jex.Var], bool],
) -> tuple[dict[jex.Var, int], dict[tuple[int, int], int]]:
    """Returns the graph of the cheap equations that lead to the variables that are `needed`.

    Args:
      needed: the variables that lead to the sink.
      cheap: the cheap equations, by the variables that they compute.
      is_source: whether a variable that no cheap equation computes comes from the source.
      is_fixed: whether a variable cannot be cut.

    Returns:
      The first of each variable's two nodes, and the capacity of each edge.
    """
    nodes: dict[jex.Var, int] = {}  # a value flows from its node to the next one
    edges: dict[tuple[int, int], int] = {}
    needed = list(needed)
    todo = list(needed)
    while todo:
        v = todo.pop()
        if v in nodes:
            continue
        node = nodes[v] = 2 * len(nodes) + 2
        edges[node, node + 1] = _INFINITE if is_fixed(v) else _size(v)
        if v in cheap:
            todo += jaxprs.variables(cheap[v].invars)
        elif is_source(v):
            edges[_SOURCE, node] = _INFINITE
    edges.update(((nodes[v] + 1, _SINK), _INFINITE) for v in needed)
    for v in nodes.keys() & cheap.keys():
        operands = jaxprs.variables(cheap[v].invars)
        edges.update(((nodes[u] + 1, nodes[v]), _INFINITE) for u in operands)
    return nodes, edges


def _is_cheap(eqn: jex.JaxprEqn) -> bool:
    if eqn.primitive.name == "gather":
        return math.prod(jaxprs.shape(eqn.invars[0])) <= _TABLE
    return eqn.primitive.name in _CHEAP


def _size(var: jex.Var) -> int:
    """Returns the size in KiB, rounded up: a scalar counts too."""
    return 1 + math.prod(jaxprs.shape(var)) * jaxprs.dtype(var).itemsize // 1024
