"""Follows the layer axis through operations: which of them act on each layer of a stack alone.

An operation that keeps the layers of a stack apart can run on one layer as well as on all of them.
To run it on one layer its equation stays as it is, apart from sizes: the layer axis has size 1. The
rules here are those of `jax.vmap`, read backwards: given the layer axis of the result, each says
where the layer axis of every operand is.
"""

import itertools
import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.extend.core as jex

from lomo_jax.fused import jaxprs

_ELEMENTWISE = frozenset(
    """abs acos acosh add add_any and asin asinh atan atan2 atanh cbrt ceil
    clamp convert_element_type copy copy_p cos cosh digamma div eq eq_to erf erf_inv erfc exp exp2
    expm1 floor ge gt imag integer_pow is_finite le le_to lgamma log log1p logistic lt lt_to max min
    mul name ne neg nextafter not or pow real reduce_precision rem reshard round rsqrt
    select_n shift_left shift_right_arithmetic shift_right_logical sharding_constraint sign sin sinh
    sqrt square stop_gradient sub tan tanh xor""".split()  # noqa: SIM905
)
REDUCTIONS = frozenset(
    "reduce_sum reduce_max reduce_min reduce_prod reduce_and reduce_or reduce_xor".split()  # noqa: SIM905
)
_CUMULATIVE = frozenset("cumsum cumprod cummax cummin cumlogsumexp".split())  # noqa: SIM905


class LayerOperand(NamedTuple):
    """The layers of an operand that the layers of a result are computed from."""

    axis: int
    start: int = 0
    scale: int = 1  # layer i of the result needs [start + i * scale, start + (i + 1) * scale)


# For each operand its layers, or None if every layer needs all of it.
Operands = Sequence[LayerOperand | None]


def operands(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    """Returns which layers of the operands a layer of `result` is computed from.

    Args:
      eqn: an equation.
      result: one of its results.
      axis: the layer axis of `result`.

    Returns:
      For each operand its layers, or None if one layer of the result may need several layers of
      an operand, or if the operation is not known here.
    """
    name = eqn.primitive.name
    if name in _ELEMENTWISE:
        rule: Callable[..., Operands | None] = _elementwise
    elif name in REDUCTIONS or name in ("argmax", "argmin"):
        rule = _reduction
    elif name in _CUMULATIVE:
        rule = _cumulative
    elif name in _RULES:
        rule = _RULES[name]
    else:
        return None
    return rule(eqn, result, axis)


def for_one_layer(eqn: jex.JaxprEqn, axis: int, size: int) -> dict[str, Any]:
    """Returns the parameters of `eqn` for one layer.

    Args:
      eqn: an equation.
      axis: the layer axis of its result.
      size: of one layer along this axis.
    """
    name, params = eqn.primitive.name, eqn.params
    if name in ("broadcast_in_dim", "iota"):
        return params | {"shape": _replace(params["shape"], axis, size)}
    if name == "reshape":
        return params | {"new_sizes": _replace(params["new_sizes"], axis, size)}
    if name == "slice":
        edited = {
            "start_indices": _replace(params["start_indices"], axis, 0),
            "limit_indices": _replace(params["limit_indices"], axis, size),
        }
        return params | edited
    if name == "dynamic_slice":
        return params | {"slice_sizes": _replace(params["slice_sizes"], axis, size)}
    if name == "scan":
        return params | {"length": size, "unroll": 1}
    return params


def _elementwise(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands:
    rank = len(jaxprs.shape(result))
    return [LayerOperand(axis) if len(jaxprs.shape(a)) == rank else None for a in eqn.invars]


def _reduction(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands:
    del result
    return [LayerOperand(_kept(eqn, eqn.params["axes"])[axis])]


def _cumulative(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    return None if eqn.params["axis"] == axis else [LayerOperand(axis)]


def _bitcast_convert_type(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    same_width = jaxprs.shape(result) == jaxprs.shape(eqn.invars[0])
    return [LayerOperand(axis)] if same_width else None


def _broadcast_in_dim(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands:
    dimensions, size = eqn.params["broadcast_dimensions"], jaxprs.shape(result)[axis]
    others: Operands = [None] * (len(eqn.invars) - 1)
    if axis in dimensions:
        source = dimensions.index(axis)
        if jaxprs.shape(eqn.invars[0])[source] == size:
            return [LayerOperand(source), *others]
    return [None, *others]


def _transpose(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands:
    del result
    return [LayerOperand(eqn.params["permutation"][axis])]


def _reshape(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    if eqn.params.get("dimensions") is not None or len(eqn.invars) > 1:
        return None
    old, new = jaxprs.shape(eqn.invars[0]), jaxprs.shape(result)
    before = _product(new[:axis])
    for source, size in enumerate(old):
        if _product(old[:source]) == before:
            if size == new[axis]:
                return [LayerOperand(source)]
            # An axis that is split, such as [layers, ...] into [stages, layers of a stage, ...].
            sizes = itertools.accumulate(new[axis:], operator.mul)
            if new[axis] > 1 and size in sizes:
                return [LayerOperand(source, scale=size // new[axis])]
    return None


def _squeeze(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands:
    del result
    return [LayerOperand(_kept(eqn, eqn.params["dimensions"])[axis])]


def _dot_general(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands:
    del result
    contracted, batch = eqn.params["dimension_numbers"]
    if axis < len(batch[0]):
        return [LayerOperand(batch[0][axis]), LayerOperand(batch[1][axis])]
    free = [
        [d for d in range(len(jaxprs.shape(a))) if d not in (*contracted[side], *batch[side])]
        for side, a in enumerate(eqn.invars)
    ]
    axis -= len(batch[0])
    if axis < len(free[0]):
        return [LayerOperand(free[0][axis]), None]
    return [None, LayerOperand(free[1][axis - len(free[0])])]


def _concatenate(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    if eqn.params["dimension"] == axis:
        return None
    return [LayerOperand(axis)] * len(eqn.invars)


def _split(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    return None if eqn.params["axis"] == axis else [LayerOperand(axis)]


def _pad(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    is_padded = any(eqn.params["padding_config"][axis])
    return None if is_padded else [LayerOperand(axis), None]


def _slice(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    strides = eqn.params["strides"]
    if strides is not None and strides[axis] != 1:
        return None
    return [LayerOperand(axis, eqn.params["start_indices"][axis])]


def _dynamic_slice(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    if jaxprs.shape(eqn.invars[0])[axis] != jaxprs.shape(result)[axis]:
        return None
    return [LayerOperand(axis), *[None] * (len(eqn.invars) - 1)]


def _dynamic_update_slice(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    if jaxprs.shape(eqn.invars[1])[axis] != jaxprs.shape(result)[axis]:
        return None
    return [LayerOperand(axis), LayerOperand(axis), *[None] * (len(eqn.invars) - 2)]


def _rev(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    return None if axis in eqn.params["dimensions"] else [LayerOperand(axis)]


def _iota(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    return None if eqn.params["dimension"] == axis else [None] * len(eqn.invars)


def _sort(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    return None if eqn.params["dimension"] == axis else [LayerOperand(axis)] * len(eqn.invars)


def _stack(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    del result
    new = eqn.params["axis"]
    return None if new == axis else [LayerOperand(axis - (axis > new))] * len(eqn.invars)


def _top_k(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    last = len(jaxprs.shape(result)) - 1
    return None if eqn.params.get("axis", last) % (last + 1) == axis else [LayerOperand(axis)]


def _map(eqn: jex.JaxprEqn, result: jex.Var, axis: int) -> Operands | None:
    """`jax.lax.map` over layers: a scan without a carry."""
    scan = jaxprs.read_scan(eqn)
    if axis or scan.carry or result not in scan.ys:
        return None
    return [*[None] * len(scan.consts), *[LayerOperand(0)] * len(scan.xs)]


_RULES: dict[str, Callable[..., Operands | None]] = {
    "bitcast_convert_type": _bitcast_convert_type,
    "broadcast_in_dim": _broadcast_in_dim,
    "concatenate": _concatenate,
    "dot_general": _dot_general,
    "dynamic_slice": _dynamic_slice,
    "dynamic_update_slice": _dynamic_update_slice,
    "iota": _iota,
    "pad": _pad,
    "reshape": _reshape,
    "rev": _rev,
    "scan": _map,
    "slice": _slice,
    "sort": _sort,
    "split": _split,
    "squeeze": _squeeze,
    "stack": _stack,
    "top_k": _top_k,
    "transpose": _transpose,
}


def _kept(eqn: jex.JaxprEqn, removed: Sequence[int]) -> list[int]:
    """Returns the axes of the operand that the result has too."""
    return [d for d in range(len(jaxprs.shape(eqn.invars[0]))) if d not in removed]


def _product(sizes: Sequence[int]) -> int:
    product = 1
    for size in sizes:
        product *= size
    return product


def _replace(values: Sequence[int], index: int, value: int) -> tuple[int, ...]:
    return (*values[:index], value, *values[index + 1 :])
