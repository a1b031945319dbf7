"""Makes a loop that indexes stacks with its counter, `w[i]`, a scan over these stacks.

A counter is any integer that the loop computes from constants: the index of `fori_loop`, a layer of
`jnp.arange(L)`, or what the loop adds to its carry. NumPy counts, because the loss may be traced
for devices that are not present.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer

from lomo_jax.fused import jaxprs
from lomo_jax.fused.arrays import Place
from lomo_jax.fused.jaxprs import Atom, Layers, Operation, Scan


def scan_indexed(scan: Scan, is_stack: Sequence[bool], producers: Mapping[Any, Operation]) -> Scan:
    """Scans the stacks that the body of a loop indexes with the loop's counter.

    Args:
      scan: the loop.
      is_stack: for each of its consts, whether it may be scanned.
      producers: the operations around the loop, by the variables that they compute.
    """
    is_indexed = [
        flag
        and {"dynamic_slice", "gather"}.issuperset(
            eqn.primitive.name for eqn in jaxprs.users(scan.body, v)
        )
        for v, flag in zip(jaxprs.open_jaxpr(scan.body).invars, is_stack, strict=False)
    ]
    if not any(is_indexed):
        return scan
    variables = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(scan.body).invars]
    eqns, results = jaxprs.inline(scan.body, variables, jaxprs.is_call)
    stacks = {
        v: atom for v, atom, flag in zip(variables, scan.consts, is_indexed, strict=False) if flag
    }
    reads = [eqn for eqn in eqns if not stacks.keys().isdisjoint(jaxprs.variables(eqn.invars[:1]))]
    indices = jaxprs.variables(a for eqn in reads for a in eqn.invars[1:])
    values = _count(scan, variables, eqns, results, list(indices), producers)
    found = {
        eqn.outvars[0]: layers
        for eqn in reads
        for v in jaxprs.variables(eqn.invars[:1])
        if (layers := _layers(eqn, stacks[v], values, scan.length))
    }
    if not found:
        return scan
    rest = [eqn for eqn in eqns if eqn.outvars[0] not in found]
    function = jaxprs.as_function(
        scan.body, jaxprs.live(rest, results), [*variables, *found], results
    )

    def body(*args):
        layers = [
            x if x.shape == jaxprs.shape(v) else jax.lax.expand_dims(x, [layers.place.axis])
            for x, (v, layers) in zip(args[len(variables) :], found.items(), strict=True)
        ]
        return function(*args[: len(variables)], *layers)

    return jaxprs.with_body(scan._replace(layers=[*scan.layers, *found.values()]), body)


def _layers(
    eqn: jex.JaxprEqn, stack: Atom, values: Mapping[Atom, np.ndarray], length: int
) -> Layers | None:
    """Returns the layers that a loop reads in turn with `eqn`; None if it reads something else.

    Args:
      eqn: reads a part of `stack` in the body of the loop.
      stack: an array.
      values: the known values of integers in the loop, [L, ...].
      length: L, of the loop.
    """
    whole, sizes = jaxprs.shape(stack), eqn.params["slice_sizes"]
    axes = [d for d, size in enumerate(sizes) if size != whole[d]]
    if len(axes) != 1 or sizes[axes[0]] != 1:
        return None
    (axis,) = axes
    if eqn.primitive.name == "gather":
        numbers, index = eqn.params["dimension_numbers"], eqn.invars[1]
        one_layer = (*whole[:axis], *whole[axis + 1 :])
        if numbers.start_index_map != (axis,) or jaxprs.shape(eqn.outvars[0]) != one_layer:
            return None
    else:
        index = eqn.invars[1 + axis]
    if isinstance(index, jex.Literal) or index not in values:
        return None
    index = values[index].reshape(length)
    start = int(index[0])
    if np.array_equal(index, start + np.arange(length)) and 0 <= start <= whole[axis] - length:
        return Layers(stack, Place(axis, start))
    return None


def _count(
    scan: Scan,
    variables: Sequence[jex.Var],
    eqns: Sequence[jex.JaxprEqn],
    results: Sequence[Atom],
    wanted: Sequence[jex.Var],
    producers: Mapping[Any, Operation],
) -> dict[Atom, np.ndarray]:
    """Computes integers of a loop, step by step.

    Args:
      scan: the loop.
      variables: inputs of its body.
      eqns: equations of its body.
      results: results of its body.
      wanted: integers in the body.
      producers: the operations around the loop.

    Returns:
      The values of those of `wanted` that depend on constants only, in the order of the scan's
      layers, [L, ...].
    """
    outside: dict[Any, np.ndarray | None] = {}
    start = {
        v: _value(atom, producers, outside) for v, atom in zip(variables, scan.invars, strict=True)
    }
    first = len(scan.consts)
    carry, xs = variables[first : first + len(scan.carry)], variables[first + len(scan.carry) :]
    inside = {v: eqn for eqn in eqns for v in eqn.outvars}
    steps = range(scan.length)[:: -1 if scan.reverse else 1]
    found: dict[jex.Var, list[Any]] = {v: [] for v in wanted}
    for i in steps:
        known = start | {v: x[i] for v in xs if (x := start[v]) is not None}
        for v, values in list(found.items()):
            value = _value(v, inside, known)
            if value is None:
                del found[v]
            values.append(value)
        if not found:
            break
        for v, following in zip(carry, results, strict=False):
            start[v] = _value(following, inside, known)
    return {v: np.stack(values)[:: steps.step] for v, values in found.items()}


def _value(
    atom: Atom, producers: Mapping[Any, Operation], known: dict[Any, np.ndarray | None]
) -> np.ndarray | None:
    """Computes an integer; returns None if it depends on more than constants.

    Args:
      atom: the integer, or an array of them.
      producers: the operations of its program, by the variables that they compute.
      known: what is known of other variables; the result is added.
    """
    if not any(jnp.issubdtype(jaxprs.dtype(atom), kind) for kind in (jnp.integer, jnp.bool)):
        return None
    if isinstance(atom, jex.Literal):
        return None if isinstance(atom.val, Tracer) else np.asarray(atom.val)
    if atom not in known:
        eqn = producers.get(atom)
        known[atom] = None
        if isinstance(eqn, jex.JaxprEqn) and eqn.primitive.name in _OPERATIONS:
            operands = [_value(a, producers, known) for a in eqn.invars]
            if not any(x is None for x in operands):
                result = _OPERATIONS[eqn.primitive.name](eqn.params, *operands)
                known[atom] = np.asarray(result, jaxprs.dtype(atom)).reshape(jaxprs.shape(atom))
    return known[atom]


def _elementwise(function):
    return lambda _, *operands: function(*operands)


def _iota(params: Mapping[str, Any]) -> np.ndarray:
    return np.indices(params["shape"])[params["dimension"]]


def _broadcast_in_dim(params: Mapping[str, Any], x: np.ndarray) -> np.ndarray:
    sizes = dict(zip(params["broadcast_dimensions"], x.shape, strict=True))
    shape = params["shape"]
    return np.broadcast_to(x.reshape([sizes.get(d, 1) for d in range(len(shape))]), shape)


# Integers, as jax.lax computes them. The caller makes a result's shape and dtype right.
_OPERATIONS = {
    "iota": _iota,
    "broadcast_in_dim": _broadcast_in_dim,
    **dict.fromkeys(
        ("reshape", "squeeze", "expand_dims", "convert_element_type", "copy", "stop_gradient"),
        _elementwise(np.asarray),
    ),
    **{
        name: _elementwise(function)
        for name, function in {
            "add": np.add,
            "sub": np.subtract,
            "mul": np.multiply,
            "div": lambda x, y: (x - np.fmod(x, y)) // y,  # rounds towards zero
            "rem": np.fmod,
            "neg": np.negative,
            "abs": np.abs,
            "sign": np.sign,
            "max": np.maximum,
            "min": np.minimum,
            "clamp": lambda low, x, high: np.clip(x, low, high),
            "eq": np.equal,
            "ne": np.not_equal,
            "lt": np.less,
            "le": np.less_equal,
            "gt": np.greater,
            "ge": np.greater_equal,
            "and": np.bitwise_and,
            "or": np.bitwise_or,
            "not": np.invert,
            "select_n": lambda which, *cases: np.choose(which.astype(int), cases),
        }.items()
    },
}
