"""Rewrites the program of a loss so that its layer scans consume parameters themselves.

People do things to a stack of layers before they scan it: they cast it, mask it, transpose it,
merge an adapter. Where that keeps the layers apart it moves into the scan, and the scan then reads
layer i of each parameter where it is. The gradient of layer i reaches the parameter in the loop.

The rewriting goes from the last scan of the program to the first:

* A loop that indexes a stack with its counter becomes a scan over the stack.
* Operations between a parameter and the scan move into the scan.
* Scans of the same layers that do not depend on each other become one scan.
* A sum over the layers of a stack, such as a penalty or a norm, moves into the scan of the stack.
"""

import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import jax
import jax.extend.core as jex

from lomo_jax.fused import jaxprs
from lomo_jax.fused.flags import scatter, select, split, zip_not
from lomo_jax.fused.jaxprs import Atom, Layers, Operation, Scan
from lomo_jax.fused.prelude import Context, Loss, Prelude, move_to_front
from lomo_jax.fused.reductions import move_into_scans


def inline_calls(loss: Loss, inputs: Sequence[jex.Var]) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """Replaces calls by their bodies. Of checkpoints, only those that a layer scan needs.

    Args:
      loss: whose jaxpr it is.
      inputs: the variables that replace the inputs of the jaxpr.

    Returns:
      Equations, and the atoms that are the results.
    """
    everything, _ = jaxprs.inline(loss.closed, inputs, jaxprs.is_call)
    moved = moved_equations(everything, loss)

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


def scan_parameters(
    program: Sequence[Operation], results: Sequence[Atom], roots: Sequence[Atom], loss: Loss
) -> list[Operation]:
    """Rewrites a program so that its layer scans consume parameters.

    Args:
      program: equations.
      results: the results of the program.
      roots: those that have a cotangent.
      loss: the inputs of the program.

    Returns:
      The new program, in which each layer scan is a `Scan`.
    """
    context = Context.of(program, loss)
    rewritten: list[Operation] = []
    for operation in reversed(jaxprs.live(program, results)):
        new = None
        if not isinstance(operation, Scan) and jaxprs.is_scan(operation):
            new = _pull_into(context.read_scan(operation), context)
        rewritten += [operation] if new is None else new[::-1]
    program = jaxprs.live(rewritten[::-1], results)
    program = _merge(program, roots, loss)
    return jaxprs.live(jaxprs.sort(move_into_scans(program, loss)), results)


def moved_equations(program: Sequence[jex.JaxprEqn], loss: Loss) -> set[int]:
    """Returns the `id` of the params of each layer scan, and of what moves into one."""
    context = Context.of(program, loss)
    found = set()
    for eqn in filter(jaxprs.is_scan, program):
        scan = context.read_scan(eqn)
        if reaching := _reaching(scan, context):
            prelude = Prelude(context)
            for layers in select(scan.layers, reaching):
                prelude.add(layers)
            found |= {id(eqn.params), *(id(moved.params) for moved in prelude.moved)}
    return found


class Source(NamedTuple):
    """Layers that a scan reads, or computes in front of its body."""

    scan: Operation
    layers: Layers
    producer: Operation | None  # None for an input of the loss


def scan_sources(program: Sequence[Operation], loss: Loss) -> list[Source]:
    """Follows what each scan reads back to operations that cannot run on one layer alone.

    Args:
      program: the result of `scan_parameters`.
      loss: the inputs of the program.
    """
    context = Context.of(program, loss)
    found = []
    for operation in program:
        if not (isinstance(operation, Scan) or jaxprs.is_scan(operation)):
            continue
        scan = operation if isinstance(operation, Scan) else jaxprs.read_scan(operation)
        prelude = Prelude(context)
        for layers in scan.layers:
            prelude.add(layers)
        for layers, _ in prelude.sources.values():
            is_literal = isinstance(layers.of, jex.Literal)
            producer = None if is_literal else context.producers.get(layers.of)
            found.append(Source(operation, layers, producer))
    return found


def _reaching(scan: Scan, context: Context) -> list[bool]:
    """Returns which of the xs of a scan are computed layer by layer from a parameter.

    Returns:
      A flag for each x; an empty list if there is none.
    """
    flags = [_reaches(layers, scan, context) for layers in scan.layers]
    return flags if any(flags) else []


def _reaches(layers: Layers, scan: Scan, context: Context) -> bool:
    if not scan.length or not context.depends_on_params(layers.of):
        return False
    prelude = Prelude(context)
    prelude.add(layers)
    params = [s for s, _ in prelude.sources.values() if context.is_param(s.of)]
    # Positions of a sequence may be scanned too, with an embedding of each added: only a stack of
    # matrices is told apart from it.
    if context.depends_on_batch(layers.of):
        params = [source for source in params if _rank(source.of) > 2]
    # A group of layers is scanned inside. Otherwise it may be rows of one matrix.
    is_group = any(source.place.size > 1 for source in params)
    return bool(params) and (not is_group or _scans_x(scan, layers))


def _scans_x(scan: Scan, layers: Layers) -> bool:
    """Returns whether the body of a scan has a layer scan over the x that `layers` are."""
    if not jaxprs.has_scan(scan.body):
        return False
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(scan.body).invars]
    x = inputs[len(inputs) - len(scan.layers) + [s.key for s in scan.layers].index(layers.key)]
    inner = Loss(scan.body, [x], {x: 0}, [v for v in inputs if v is not x])
    operations, results = inline_calls(inner, inputs)
    operations = scan_parameters(operations, results, results, inner)
    return any(
        isinstance(operation, Scan) and any(s.of is x for s in operation.layers)
        for operation in operations
    )


def _rank(atom: Atom) -> int:
    return sum(size > 1 for size in jaxprs.shape(atom))


def _pull_into(scan: Scan, context: Context) -> list[Operation] | None:
    """Moves the operations between parameters and a scan into the scan.

    Returns:
      Equations that compute the other inputs of the scan, and the scan; None if no parameter is
      scanned.
    """
    reaching = _reaching(scan, context)
    if not reaching:
        return None
    direct = [layers for layers in scan.layers if context.is_param(layers.of)]
    if direct == select(scan.layers, reaching) and len({x.key for x in direct}) == len(direct):
        return [scan]
    prelude = Prelude(context)
    reached = select(scan.layers, reaching)
    values = [prelude.add(layers) for layers in reached]
    others = select(scan.layers, zip_not(reaching))
    before: list[Operation] = []
    sources = []
    for layers, _ in prelude.sources.values():
        if not context.is_param(layers.of):
            eqns, layers = move_to_front(layers, scan.length)
            before += eqns
        sources.append(layers)
    compute = prelude.function(scan.body, values)

    def body(*args):
        args = split(args, [scan.consts, prelude.shared, scan.carry, others, sources])
        consts, shared, carry, other_xs, source_xs = args
        pulled = compute(source_xs, shared)
        pulled = [jax.lax.squeeze(x, [y.place.axis]) for x, y in zip(pulled, reached, strict=True)]
        xs = scatter(reaching, pulled, reaching)
        xs = scatter(xs, other_xs, zip_not(reaching))
        return jex.jaxpr_as_fun(scan.body)(*consts, *carry, *xs)

    consts = [*scan.consts, *prelude.shared]
    return [
        *before,
        jaxprs.with_body(scan._replace(consts=consts, layers=[*others, *sources]), body),
    ]


def _merge(program: Sequence[Operation], roots: Sequence[Atom], loss: Loss) -> list[Operation]:
    """Makes one scan of those that scan the same layers and do not depend on each other."""
    program = list(program)
    pairs = itertools.combinations(_active_scans(program, roots), 2)
    for a, b in pairs:
        keys = {x.key for x in a.layers if loss.is_trainable(x.of)}
        alike = (a.length, a.reverse) == (b.length, b.reverse)
        if (
            alike
            and not keys.isdisjoint(x.key for x in b.layers)
            and not jaxprs.follows(b, a, program)
        ):
            program = [op for op in program if op is not a and op is not b]
            program = jaxprs.sort([*program, _merged(a, b)])
            return _merge(program, roots, loss)
    return program


def _merged(a: Scan, b: Scan) -> Scan:
    layers = {x.key: x for x in [*a.layers, *b.layers]}
    parts = [a.consts, b.consts, a.carry, b.carry, layers]

    def body(*args):
        a_consts, b_consts, a_carry, b_carry, xs = split(args, parts)
        by_key = dict(zip(layers, xs, strict=True))
        outputs = [
            jex.jaxpr_as_fun(scan.body)(*consts, *carry, *(by_key[x.key] for x in scan.layers))
            for scan, consts, carry in ((a, a_consts, a_carry), (b, b_consts, b_carry))
        ]
        (a_out, a_ys), (b_out, b_ys) = (
            split(x, [scan.carry, scan.ys]) for scan, x in zip((a, b), outputs, strict=True)
        )
        return [*a_out, *b_out, *a_ys, *b_ys]

    merged = a._replace(
        consts=[*a.consts, *b.consts],
        carry=[*a.carry, *b.carry],
        layers=list(layers.values()),
        carry_out=[*a.carry_out, *b.carry_out],
        ys=[*a.ys, *b.ys],
    )
    return jaxprs.with_body(merged, body)


def _active_scans(program: Sequence[Operation], roots: Sequence[Atom]) -> list[Scan]:
    active = active_variables(program, roots)
    return [
        operation
        for operation in program
        if isinstance(operation, Scan) and not active.isdisjoint(operation.outvars)
    ]


def active_variables(program: Sequence[Operation], roots: Iterable[Atom]) -> set[jex.Var]:
    """Returns the variables that may have a cotangent: the derivative of `roots` reaches them."""
    active = set(filter(jaxprs.is_float, jaxprs.variables(roots)))
    for operation in reversed(program):
        if not stops(operation) and not active.isdisjoint(operation.outvars):
            active.update(filter(jaxprs.is_float, jaxprs.variables(operation.invars)))
    return active


def stops(operation: Operation) -> bool:
    """Returns whether the derivative of an operation is zero."""
    return not isinstance(operation, Scan) and operation.primitive.name == "stop_gradient"
