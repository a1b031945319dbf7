"""Finds the smallest set of values from which the rest of a program is cheap to compute."""

import math
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence

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


def smallest_cut(
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

    cheap = {v: eqn for eqn in [*so_far, *rest] for v in eqn.outvars if is_cheap(eqn)}
    expensive = [eqn for eqn in rest if not is_cheap(eqn)]
    late = {v for eqn in expensive for v in eqn.outvars}  # cannot be computed yet
    for eqn in rest:
        if not late.isdisjoint(jaxprs.variables(eqn.invars)):
            late.update(eqn.outvars)
    needed = jaxprs.variables([*results, *jaxprs.operands(expensive)])
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


def is_cheap(eqn: jex.JaxprEqn) -> bool:
    """Returns whether computing an equation again is faster than reading its results."""
    name = eqn.primitive.name
    if name == "gather":
        return math.prod(jaxprs.shape(eqn.invars[0])) <= _TABLE
    if name == "shard_map" or name in jaxprs.INLINED:  # such as the mask of attention
        return all(map(is_cheap, jaxprs.open_jaxpr(eqn.params["jaxpr"]).eqns))
    return name in _CHEAP


def _size(var: jex.Var) -> int:
    """Returns the size in KiB, rounded up: a scalar counts too."""
    return 1 + math.prod(jaxprs.shape(var)) * jaxprs.dtype(var).itemsize // 1024
