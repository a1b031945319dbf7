"""Evaluates a function in the order of its program, and uses up gradients as they come.

XLA schedules by dependence alone. Given the gradients of all parameters of a layer it may compute
them all before it updates the first, and it keeps what each of them needs until then. Here
everything waits, at an `optimization_barrier`, for the update before it, and what waits is the
least from which the rest can be computed: intermediate values that are cheap to compute are
computed again. (The CPU compiler removes barriers early, and schedules as it likes.)
"""

import math
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import numpy as np

from lomo_jax.fused import jaxprs

# XLA fuses these with what uses them: to compute them again takes less time than to read them.
_CHEAP = frozenset(
    """abs add add_any and broadcast_in_dim ceil clamp concatenate convert_element_type copy cos div
    eq erf exp exp2 expand_dims expm1 floor ge gt imag integer_pow iota is_finite le log log1p
    logistic lt max min mul name ne neg not or pad pow real reshape rev round rsqrt select_n sign
    sin slice split sqrt square squeeze stop_gradient sub tan tanh transpose xor""".split()  # noqa: SIM905
) | {"reshard"}  # a weight that several devices share is gathered again: it is large
_INFINITE = 2**30  # KiB


def evaluate_in_order(
    function: Callable[..., tuple[Sequence[Any], Any]],
    shapes: Sequence[jax.ShapeDtypeStruct],
    args: Any,
    read: Callable[[Any, int], jax.Array],
    use: Callable[[Any, Sequence[int], Sequence[jax.Array]], Any],
    carry: Any,
    *,
    together: bool = False,
) -> tuple[Any, Any]:
    """`function(inputs, *args)`, which returns gradients of some inputs and other results.

    Each gradient is used up as soon as it is there and its input is needed no more.

    Args:
      function: `(list of inputs, *args) -> (gradients of the first inputs, others)`.
      shapes: of the inputs.
      args: pytree of arrays.
      read: `(carry, k)` returns input k; called each time that the program comes to need it.
      use: `(carry, ks, gradients)` takes the gradients of the inputs ks; returns the new carry.
      carry: what `read` and `use` work on, a pytree of arrays.
      together: whether all gradients are to be used at once.

    Returns:
      The other results, and the last carry.
    """
    closed, shape = jax.make_jaxpr(lambda x, a: function(x, *a), return_shape=True)(shapes, args)
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    # Checkpoints are opened, too: the barriers here do what theirs are for.
    inlined = lambda eqn: eqn.primitive.name in jaxprs.INLINED  # noqa: E731
    eqns, results = jaxprs.inline(closed, variables, {}, inlined)
    inputs = {v: k for k, v in enumerate(variables[: len(shapes)])}
    env = dict(zip(variables[len(shapes) :], jax.tree.leaves(args), strict=True))
    grads, others = results[: len(shape[0])], results[len(shape[0]) :]
    program = _order(
        jaxprs.live(eqns, results), list(inputs)[: len(grads)], grads, others, together
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
        gone = {v for v, k in inputs.items() if k in done or k in ks}
        rest = [eqn for later, _ in program[number + 1 :] for eqn in later]
        pending = [grad for k, grad in enumerate(grads) if k not in done and k not in ks]
        so_far = [eqn for before, _ in program[: number + 1] for eqn in before]
        kept = _cut(so_far, rest, [*pending, *others], inputs, gone)
        outputs = jaxprs.variables([*(grads[k] for k in ks), *kept])
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
            env = {v: env[v] for v in kept}
            values, carry = jax.lax.optimization_barrier((list(env.values()), carry))
            env = dict(zip(env, values, strict=True))
    return jax.tree.unflatten(jax.tree.structure(shape[1]), map(value, others)), carry


class _Segment(NamedTuple):
    """Equations that are evaluated together."""

    eqns: list[jex.JaxprEqn]
    complete: list[int]  # inputs whose gradients are used after them


def _order(eqns, inputs, grads, others, together) -> list[_Segment]:
    """Divides a program into segments, each with the gradients that are used after it.

    What only one gradient needs, such as the product that makes it, is taken out and put behind the
    last use of its input, in a segment of its own.

    Args:
      eqns: the program.
      inputs: those that have gradients.
      grads: their gradients.
      others: the other results.
      together: whether all gradients are used at once.
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
        # It must come before the use of the gradients of all inputs that it reads.
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
    for k in sorted(range(len(grads)), key=lambda k: made.get(grads[k], -1)):
        needs = jaxprs.variables([inputs[k], grads[k], *_operands(own[1 << k])])
        at = len(common) if together else max((time.get(v, 0) for v in needs), default=0)
        groups.setdefault(at, []).append(k)

    program, start = [], 0
    for at, ks in sorted(groups.items()):
        if at > start:
            program.append(_Segment(common[start:at], []))
        members = [ks] if together else [[k] for k in ks]
        program += [_Segment([e for k in m for e in own[1 << k][::-1]], m) for m in members]
        start = at
    return [*program, _Segment(common[start:], [])]


def _operands(eqns: Sequence[jex.JaxprEqn]) -> list[jaxprs.Atom]:
    return [atom for eqn in eqns for atom in eqn.invars]


def _needed(eqns, outputs, known, effects) -> list[jex.JaxprEqn]:
    """Those of `eqns` that `outputs` are computed by, given what is known; and `effects`."""
    needed, kept = set(outputs), []
    for eqn in reversed(eqns):
        if not needed.isdisjoint(eqn.outvars) or any(eqn is e for e in effects):
            kept.append(eqn)
            needed.update(v for v in jaxprs.variables(eqn.invars) if v not in known)
    return kept[::-1]


def _cut(
    so_far: Sequence[jex.JaxprEqn],
    rest: Sequence[jex.JaxprEqn],
    results: Sequence[jaxprs.Atom],
    inputs: Collection[jex.Var],
    gone: Collection[jex.Var],
) -> list[jex.Var]:
    """The smallest set of values from which `rest` and `results` can be computed cheaply.

    It is a minimum cut between what has been computed at some expense and what needs it, in the
    graph of the cheap equations, every value as wide as it is large.

    Args:
      so_far: equations that have been evaluated.
      rest: equations that have not.
      results: what is needed in the end.
      inputs: variables that can be read at any time.
      gone: those of them that can be read no more.
    """
    from scipy import sparse  # slow to import: not before a step is traced
    from scipy.sparse import csgraph

    cheap = {v: eqn for eqn in [*so_far, *rest] for v in eqn.outvars if _is_cheap(eqn)}
    expensive = [eqn for eqn in rest if not _is_cheap(eqn)]
    late = {v for eqn in expensive for v in eqn.outvars}  # what cannot be computed yet
    for eqn in rest:
        if not late.isdisjoint(jaxprs.variables(eqn.invars)):
            late.update(eqn.outvars)

    source, sink = 0, 1
    nodes: dict[jex.Var, int] = {}  # a value goes from its node to the next
    edges: dict[tuple[int, int], int] = {}
    needed = jaxprs.variables([*results, *_operands(expensive)])
    todo = list(needed)
    while todo:
        v = todo.pop()
        if v in nodes:
            continue
        node = nodes[v] = 2 * len(nodes) + 2
        edges[node, node + 1] = _INFINITE if v in late or v in gone else _size(v)
        if v in cheap:
            todo += jaxprs.variables(cheap[v].invars)
        elif v in gone or not (v in late or v in inputs):
            edges[source, node] = _INFINITE
    edges.update(((nodes[v] + 1, sink), _INFINITE) for v in needed)
    for v in nodes.keys() & cheap.keys():
        operands = jaxprs.variables(cheap[v].invars)
        edges.update(((nodes[u] + 1, nodes[v]), _INFINITE) for u in operands)
    if not edges:
        return []

    rows, columns = zip(*edges, strict=True)
    capacity = np.fromiter(edges.values(), np.int32)
    size = 2 * len(nodes) + 2
    graph = sparse.csr_array((capacity, (rows, columns)), shape=(size, size))
    spare = graph - csgraph.maximum_flow(graph, source, sink).flow
    spare.eliminate_zeros()
    # Of several smallest cuts, the one that leaves the least to compute.
    near = set(csgraph.breadth_first_order(spare.T.tocsr(), sink, return_predecessors=False))
    return [v for v, node in nodes.items() if node + 1 in near and node not in near]


def _is_cheap(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name in _CHEAP


def _size(var: jex.Var) -> int:
    """In KiB, rounded up: a scalar counts, too."""
    return 1 + math.prod(jaxprs.shape(var)) * jaxprs.dtype(var).itemsize // 1024
