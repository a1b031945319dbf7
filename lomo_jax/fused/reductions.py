"""Moves reductions over the layers of a stack, such as a norm in a penalty, into its scan.

The scan reduces each layer by itself. What is left outside is to reduce over the results, of which
each layer has one.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs, layer_axis
from lomo_jax.fused.arrays import Place
from lomo_jax.fused.flags import split
from lomo_jax.fused.jaxprs import Atom, Layers, Operation, Scan
from lomo_jax.fused.prelude import Context, Loss, Prelude, move_to_front


class _Part(NamedTuple):
    """A part of a reduction over the layers of a stack: those that one scan reads."""

    eqn: jex.JaxprEqn
    layers: Layers  # the first one of them, in the operand
    result: jex.Var  # [L, ...], reduced over all axes but that of the layers


def move_into_scans(program: Sequence[Operation], loss: Loss) -> list[Operation]:
    """Moves reductions over the layers of a scanned stack into the scan."""
    context = Context.of(program, loss)
    scans = [operation for operation in program if isinstance(operation, Scan)]
    parts: dict[int, list[_Part]] = {}
    reductions: dict[int, list[Operation]] = {}
    for eqn in program:
        if isinstance(eqn, Scan) or eqn.primitive.name not in layer_axis.REDUCTIONS:
            continue
        for axis in eqn.params["axes"]:
            found = _scans_of(eqn, axis, scans, context)
            if found:
                results = [jex.Var(_stack_type(eqn.outvars[0], scan.length)) for scan, _ in found]
                for (scan, layers), result in zip(found, results, strict=True):
                    parts.setdefault(id(scan), []).append(_Part(eqn, layers, result))
                reductions[id(eqn)] = _reduce(eqn, results)
                break
    new: list[Operation] = []
    for operation in program:
        if isinstance(operation, Scan) and id(operation) in parts:
            new += _with_reductions(operation, parts[id(operation)], context)
        else:
            new += reductions.get(id(operation), [operation])
    return new


def _scans_of(
    eqn: jex.JaxprEqn, axis: int, scans: Sequence[Scan], context: Context
) -> list[tuple[Scan, Layers]]:
    """Finds the scans that read the layers that a reduction is computed from.

    Returns:
      Scans, each with the first layer that it reads; none unless they read all layers.
    """
    operand, start = eqn.invars[0], 0
    found: list[tuple[Scan, Layers]] = []
    while start < jaxprs.shape(operand)[axis]:
        layers = Layers(operand, Place(axis, start))
        prelude = Prelude(context)
        prelude.add(layers)
        sources = [source for source, _ in prelude.sources.values()]
        keys = {source.key for source in sources if context.is_param(source.of)}
        if not any(context.loss.is_trainable(source.of) for source in sources):
            return []
        others = [*prelude.shared, *(s.of for s in sources if s.key not in keys)]
        earlier = jaxprs.live(context.program, others)
        scan = next(
            (
                scan
                for scan in scans
                if keys.issubset(x.key for x in scan.layers)
                and all(scan is not operation for operation in earlier)
                and not jaxprs.follows(scan, eqn, context.program)
            ),
            None,
        )
        if scan is None:
            return []
        found.append((scan, layers))
        start += scan.length
    return found


def _reduce(eqn: jex.JaxprEqn, results: Sequence[jex.Var]) -> list[Operation]:
    """Returns the equations that reduce the results of layers to the result of `eqn`."""
    join = lambda *parts: jnp.concatenate(parts)  # noqa: E731
    eqns: list[Operation] = []
    atoms: list[Atom] = list(results)
    if len(results) > 1:
        closed = jax.make_jaxpr(join)(*(v.aval for v in results))
        joined, atoms = jaxprs.inline(closed, results, jaxprs.is_call)
        eqns += joined
    return [*eqns, eqn.replace(invars=atoms, params=eqn.params | {"axes": (0,)})]


def _with_reductions(scan: Scan, reductions: Sequence[_Part], context: Context) -> list[Operation]:
    """Returns a scan that also reduces each layer, after equations that compute its inputs."""
    prelude = Prelude(context)
    outputs = []
    for eqn, first, _ in reductions:
        value, of_layer = prelude.add(first), jex.Var(eqn.outvars[0].aval)
        prelude.eqns.append(eqn.replace(invars=[value], outvars=[of_layer]))
        outputs.append(of_layer)
    before: list[Operation] = []
    layers = {x.key: x for x in scan.layers}
    for source, _ in prelude.sources.values():
        if source.key not in layers:
            eqns, layers[source.key] = move_to_front(source, scan.length)
            before += eqns
    compute = prelude.function(scan.body, outputs)
    parts = [scan.consts, prelude.shared, scan.carry, layers]

    def body(*args):
        consts, shared, carry, xs = split(args, parts)
        by_key = dict(zip(layers, xs, strict=True))
        own = [by_key[x.key] for x in scan.layers]
        results = jex.jaxpr_as_fun(scan.body)(*consts, *carry, *own)
        return [*results, *compute([by_key[key] for key in prelude.sources], shared)]

    new = scan._replace(
        consts=[*scan.consts, *prelude.shared],
        layers=list(layers.values()),
        ys=[*scan.ys, *(part.result for part in reductions)],
    )
    return [*before, jaxprs.with_body(new, body)]


def _stack_type(var: jex.Var, length: int) -> Any:
    """Returns the type of `length` values of the type of a variable."""
    stack = lambda x: jnp.broadcast_to(x, (length, *x.shape))  # noqa: E731
    return jaxprs.open_jaxpr(jax.make_jaxpr(stack)(var.aval)).outvars[0].aval
