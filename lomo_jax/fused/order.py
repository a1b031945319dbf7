"""Divides the program of a layer into steps: what is computed between two barriers.

XLA schedules by dependence alone. Given the gradients of all parameters of a layer it may compute
all of them before it updates the first parameter, and store the operands of each until then. So a
step ends where a gradient is complete and its parameter is not needed any more: the gradient is
used before anything else is computed. Only the smallest set of values that the rest needs crosses
the barrier: cheap values are computed again. (The CPU compiler removes barriers early, and
schedules freely.)

Where a layer waits for the host or for other devices, each product has a step of its own, and it is
fixed in which step each input is read; see `pipeline`.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs
from lomo_jax.fused.cut import is_cheap, smallest_cut
from lomo_jax.fused.far import Far, LateSum, find_sum, take_gathers

_PRODUCTS = frozenset(
    "conv_general_dilated custom_vjp_call dot_general ragged_dot scan shard_map while".split()  # noqa: SIM905
)
_SMALL = 1  # MiB: what is smaller is read with the first weight of its layer


# What can be read ahead: a variable of `Steps.far`, or, for an int, the state of that input.
Key = jex.Var | int


class Step(NamedTuple):
    """What is evaluated between two barriers."""

    eqns: list[jex.JaxprEqn]
    free: list[jex.Var]  # what they read
    outputs: list[jex.Var]
    carried: list[jex.Var]  # values that later steps need
    ks: list[int]  # inputs whose gradients it computes
    sums: dict[int, LateSum]  # those of which it computes the parts instead
    needs: list[Key]  # what has to have been read
    reads_next: list[Key]  # what it reads of the next layer


class Steps(NamedTuple):
    """A function of a layer, divided into steps with a barrier between them."""

    closed: Any  # the jaxpr that all equations are from
    inputs: dict[jex.Var, int]  # the variable of each input
    far: dict[jex.Var, Far]  # inputs on the host, gathered inputs
    args: list[jex.Var]  # leaves of the other arguments
    grads: list[jaxprs.Atom]
    others: list[jaxprs.Atom]  # leaves of the other results
    tree: Any  # their structure
    steps: list[Step]
    waits: bool  # whether something comes from afar
    late_writes: bool  # whether a layer is written in the step after its update

    @property
    def first(self) -> list[Key]:
        """What has to be read before the first step."""
        return self.steps[0].needs


class TracedLayer(NamedTuple):
    """A function ``(list of inputs, *args) -> (gradients of the first inputs, other results)``."""

    closed: Any  # its jaxpr, whose first variables are the inputs
    num_inputs: int
    num_grads: int
    tree: Any  # the structure of the other results


def trace_layer(
    function: Callable[..., tuple[Sequence[Any], Any]],
    shapes: Sequence[jax.ShapeDtypeStruct],
    args: Any,
) -> TracedLayer:
    """Traces a function of a layer, which `divide` divides.

    Args:
      function: see `TracedLayer`.
      shapes: the shapes of the inputs.
      args: pytree of arrays.
    """
    closed, shape = jax.make_jaxpr(lambda x, a: function(x, *a), return_shape=True)(shapes, args)
    grads, others = shape
    return TracedLayer(closed, len(shapes), len(grads), jax.tree.structure(others))


def divide(
    layer: TracedLayer,
    *,
    on_host: Collection[int] = (),
    kept: Collection[int] = (),
    states_on_host: Collection[int] = (),
    read_ahead: bool = False,
    all_at_once: bool = False,
) -> Steps:
    """Divides a function of a layer into steps.

    A step ends where the gradient of an input exists and the input is not needed any more. Where a
    layer waits for the host or for other devices, each product of an input has its own step too.

    Args:
      layer: the function.
      on_host: the inputs in host memory.
      kept: those of them that are kept from their first use to their last, as inputs with
        gradients always are; others are read again.
      states_on_host: the inputs whose optimizer's state is in host memory.
      read_ahead: whether inputs with gradients and their states are read before the first step, and
        nothing else is done ahead.
      all_at_once: whether all gradients are used together, in the last step.
    """
    closed, num_inputs, num_grads, tree = layer
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    inputs = {v: k for k, v in enumerate(variables[:num_inputs])}
    # Checkpoints are inlined too: the barriers here replace theirs.
    inlined = lambda eqn: eqn.primitive.name in jaxprs.INLINED  # noqa: E731
    eqns, results = jaxprs.inline(closed, variables, inlined)
    is_far = lambda k: k in on_host or (read_ahead and k < num_grads)  # noqa: E731
    far = {v: Far(k, None) for v, k in inputs.items() if is_far(k)}
    near = {v: k for v, k in inputs.items() if not (read_ahead or v in far)}
    eqns, results, gathered = take_gathers(closed, eqns, results, near)
    far |= gathered
    readable = {**inputs, **{v: x.k for v, x in far.items()}}
    eqns, results = _copy_inputs(eqns, results, readable)
    eqns = jaxprs.live(eqns, results)
    grads, others = results[:num_grads], results[num_grads:]
    states = range(len(grads)) if read_ahead else states_on_host
    may_sum_late = not (read_ahead or all_at_once)
    found = {k: find_sum(closed, eqns, results, k) for k in range(len(grads)) if may_sum_late}
    sums = {k: late for k, late in found.items() if late is not None}
    waits = not read_ahead and bool(far or states or sums)
    program = _order(eqns, readable, grads, others, all_at_once)
    if waits:
        # In the last step the last gradients are summed and the last layers written.
        program = _sums_first(_one_product_each(program, readable), sums)
        program.append(_Segment([], []))
    elif not program[-1].eqns and len(program) > 1:
        program = program[:-1]  # a barrier before nothing
    others_in = variables[num_inputs:]
    steps, used = _steps(program, readable, others_in, grads, others, sums)
    steps = _read_in_time(steps, used, far, {*kept, *range(len(grads))}, states, read_ahead)
    return Steps(
        closed,
        inputs,
        far,
        others_in,
        grads,
        others,
        tree,
        steps,
        waits,
        waits and bool(on_host or states_on_host),
    )


def _steps(
    program: Sequence["_Segment"],
    readable: Mapping[jex.Var, int],
    args: Sequence[jex.Var],
    grads: Sequence[jaxprs.Atom],
    others: Sequence[jaxprs.Atom],
    sums: Mapping[int, LateSum],
) -> tuple[list[Step], dict[int, int]]:
    """Returns the steps of a program, and in which of them the gradient of each input is used.

    A gradient is used at the end of the step that forms it. One that is summed late is summed in
    the steps after that, and used at the beginning of the next, or of the last step.

    Args:
      program: its segments.
      readable: variables that are read, and the inputs that they come from.
      args: the other arguments.
      grads: the gradients of the first inputs.
      others: the other results.
      sums: gradients that are sums over devices, by their input.
    """
    steps: list[Step] = []
    known, last = set(args), len(program) - 1
    used: dict[int, int] = {}
    gone: dict[int, int] = {}  # the first step in which an input has been updated
    for n, (eqns, ks) in enumerate(program):
        late = {k: sums[k] for k in ks if k in sums and sums[k].is_in(eqns) and n < last}
        for k in ks:
            used[k] = min(n + 1 + len(late[k].stages), last) if k in late else n
            gone[k] = used[k] + (k not in late)
        updated = {v for v, k in readable.items() if gone.get(k, n + 2) <= n + 1}
        rest = [eqn for later, _ in program[n + 1 :] for eqn in later]
        pending = [grad for k, grad in enumerate(grads) if k not in used]
        so_far = [eqn for before, _ in program[: n + 1] for eqn in before]
        if n < last:
            carried = smallest_cut(so_far, rest, [*pending, *others], readable, updated)
        else:
            carried = list(jaxprs.variables(others))
        outputs = jaxprs.variables([*(grads[k] for k in ks), *carried])
        outputs = [v for v in outputs if v not in known and v not in readable]
        effects = [eqn for eqn in eqns if eqn.effects]
        run = _needed([*so_far, *rest], outputs, {*known, *readable}, effects)
        for late_sum in late.values():
            run, outputs = late_sum.replace(run, outputs)
        defined = jaxprs.variables(v for eqn in run for v in eqn.outvars)
        free = [v for v in jaxprs.operands(run) if v not in defined]
        read = {readable[v] for v in free if v in readable}
        assert all(gone.get(k, n + 1) > n for k in read), "an input is read after its update"
        steps.append(Step(run, free, outputs, carried, ks, late, [], []))
        known = set(carried)
    return steps, used


def _read_in_time(
    steps: Sequence[Step],
    used: Mapping[int, int],
    far: Mapping[jex.Var, Far],
    kept: Collection[int],
    states: Collection[int],
    read_ahead: bool,
) -> list[Step]:
    """Sets what each step needs to have been read, and what it reads of the next layer.

    Args:
      steps: the steps.
      used: in which of them the gradient of each input is used.
      far: inputs that come from afar.
      kept: inputs in host memory that are kept from their first use to their last.
      states: the inputs whose state comes from afar.
      read_ahead: whether everything is read before the first step.
    """
    last = len(steps) - 1
    needs: list[list[Key]] = [[] for _ in steps]
    for v, (k, gather) in far.items():
        at = [n for n, step in enumerate(steps) if v in step.free]
        at += [used[k]] if k in used and gather is None else []
        if at and (read_ahead or jaxprs.mib(v) < _SMALL):
            at = range(max(at) + 1)
        elif at and k in kept and gather is None:
            at = range(min(at), max(at) + 1)
        for n in at:
            needs[n].append(v)
    for k in states:
        for n in range(used[k] + 1) if read_ahead else [used[k]]:
            needs[n].append(k)
    if not read_ahead:
        # One large array beside each product: what else a step needs is read earlier.
        for n in range(last, 0, -1):
            needs[n - 1] += _large(key for key in needs[n] if key not in needs[n - 1])[1:]
    reads_next: list[list[Key]] = [[] for _ in steps]
    if read_ahead:
        reads_next[last] = needs[0]
    else:
        # One large array in each step, the last of them in the last step with a product; but before
        # a layer of the same stack is written.
        large = _large(needs[0])
        at = min([last - 1, *(used[far[v].k] for v in large if far[v].k in used)])
        for v in large:
            reads_next[max(at, 0)].append(v)
            at -= 1
        reads_next[max(at, 0)] += [key for key in needs[0] if key not in large]
    return [
        step._replace(needs=some, reads_next=of_next)
        for step, some, of_next in zip(steps, needs, reads_next, strict=True)
    ]


def _large(keys: Iterable[Key]) -> list[jex.Var]:
    return [v for v in keys if not isinstance(v, int) and jaxprs.mib(v) >= _SMALL]


def _copy_inputs(
    eqns: Sequence[jex.JaxprEqn],
    results: Sequence[jaxprs.Atom],
    readable: Collection[jex.Var],
) -> tuple[list[jex.JaxprEqn], list[jaxprs.Atom]]:
    """Copies results that are inputs: they are read before the inputs are updated."""
    eqns, results = list(eqns), list(results)
    for n, v in enumerate(results):
        if isinstance(v, jex.Var) and v in readable:
            copy, (results[n],) = jaxprs.inline(
                jax.make_jaxpr(jnp.copy)(v.aval), [v], jaxprs.is_call
            )
            eqns += copy
    return eqns, results


def _one_product_each(
    program: Sequence["_Segment"], inputs: Collection[jex.Var]
) -> list["_Segment"]:
    """Divides segments so that each has one product, of an input or for its gradient.

    What has no product joins the segment after it.

    Args:
      program: segments.
      inputs: variables that are read.
    """
    of_inputs = set(inputs)  # and what is computed from inputs alone
    for eqn in (eqn for segment in program for eqn in segment.eqns):
        operands = jaxprs.variables(eqn.invars)
        if is_cheap(eqn) and operands and of_inputs.issuperset(operands):
            of_inputs.update(eqn.outvars)
    pieces, piece = [], _Segment([], [])
    for segment in program:
        if segment.complete and _has_product(segment.eqns) and _has_product(piece.eqns):
            pieces.append(piece)
            piece = _Segment([], [])
        for eqn in segment.eqns:
            reads = not of_inputs.isdisjoint(jaxprs.variables(eqn.invars))
            if reads and _has_product([eqn]) and _has_product(piece.eqns):
                pieces.append(piece)
                piece = _Segment([], [])
            piece = piece._replace(eqns=[*piece.eqns, eqn])
        piece = piece._replace(complete=[*piece.complete, *segment.complete])
        if segment.complete and _has_product(piece.eqns):
            pieces.append(piece)
            piece = _Segment([], [])
    return [*pieces, piece]


def _sums_first(program: Sequence["_Segment"], sums: Mapping[int, LateSum]) -> list["_Segment"]:
    """Moves gradients that are sums over devices before the last product of their input.

    The sum then runs beside that product. What follows the last product joins its segment.

    Args:
      program: the result of `_one_product_each`.
      sums: gradients that are sums over devices, by their input.
    """
    *pieces, rest = program
    for n in range(len(pieces) - 1):
        earlier, later = pieces[n : n + 2]
        if earlier.complete or not any(
            sums[k].is_in(later.eqns) for k in later.complete if k in sums
        ):
            continue
        moved = _needed(earlier.eqns, jaxprs.operands(later.eqns), (), ())
        if not _has_product(moved):
            kept = [eqn for eqn in earlier.eqns if not any(eqn is e for e in moved)]
            pieces[n] = later._replace(eqns=[*moved, *later.eqns])
            pieces[n + 1] = _Segment(kept, [])
    if pieces and not _has_product(rest.eqns):
        last = pieces.pop()
        rest = _Segment([*last.eqns, *rest.eqns], [*last.complete, *rest.complete])
    return [*pieces, rest]


def _has_product(eqns: Sequence[jex.JaxprEqn]) -> bool:
    return any(eqn.primitive.name in _PRODUCTS and not is_cheap(eqn) for eqn in eqns)


class _Segment(NamedTuple):
    """Equations that are evaluated before the next barrier."""

    eqns: list[jex.JaxprEqn]
    complete: list[int]  # inputs whose gradients are used after them


def _order(
    eqns: Sequence[jex.JaxprEqn],
    inputs: Mapping[jex.Var, int],
    grads: Sequence[jaxprs.Atom],
    others: Sequence[jaxprs.Atom],
    all_at_once: bool,
) -> list[_Segment]:
    """Splits a program into segments, each with the gradients that are used after it.

    Equations that only one gradient needs, such as the matrix product that forms it, move behind
    the last use of its input, into a segment of their own.

    Args:
      eqns: the program.
      inputs: variables that are read, and the inputs that they come from.
      grads: the gradients of the first inputs.
      others: the other results.
      all_at_once: whether all gradients are used at once.
    """
    inputs = {v: k for v, k in inputs.items() if k < len(grads)}
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
        if any(v in inputs and label != 1 << inputs[v] for v in operands):
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
        reads = [v for v, of in inputs.items() if of == k]
        needs = jaxprs.variables([*reads, grads[k], *jaxprs.operands(own[1 << k])])
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


def _needed(
    eqns: Sequence[jex.JaxprEqn],
    outputs: Collection[jex.Var],
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
