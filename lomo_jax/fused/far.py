"""What a layer waits for: inputs that come from afar, and gradients that are summed over devices.

A weight in host memory is copied to the device, a sharded weight is gathered, and the gradient of a
sharded weight is summed over the devices. All of them can run beside a product of another weight,
if they are equations of their own. These functions find them in the program of a layer. (A weight
that is in host memory and sharded is copied ahead of time, and gathered where it is used.)
"""

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
from jax.sharding import AxisType, PartitionSpec

from lomo_jax.fused import jaxprs
from lomo_jax.fused.jaxprs import Atom

# Given an operand and the type of the result, there is one result.
_CONVERSIONS = ("convert_element_type", "copy", "copy_p", "name", "reshard")


class Far(NamedTuple):
    """What comes from afar: an input in host memory, or a gathered input."""

    k: int  # the input
    gather: Callable[[jax.Array], jax.Array] | None  # None for an input in host memory


def take_gathers(
    closed: Any,
    eqns: Sequence[jex.JaxprEqn],
    results: Sequence[Atom],
    inputs: Mapping[jex.Var, int],
) -> tuple[list[jex.JaxprEqn], list[Atom], dict[jex.Var, Far]]:
    """Takes the gathers of inputs out of a program.

    Args:
      closed: the jaxpr that the equations are from.
      eqns: the program.
      results: its results.
      inputs: the inputs whose gathers are taken out.

    Returns:
      The program and its results, which use gathered inputs as if they were inputs; and the
      gathered inputs.
    """
    # Each conversion of an input: the input, and the equations that lead to it.
    converted = {v: (v, []) for v in inputs}
    known: dict[tuple[str, jex.Var, Any], jex.Var] = {}
    same: dict[Any, jex.Var] = {}  # variables that have the value of an earlier one
    far: dict[jex.Var, Far] = {}
    rest: list[jex.JaxprEqn] = []
    for old in eqns:
        eqn = old.replace(invars=[a if _is_literal(a) else same.get(a, a) for a in old.invars])
        source = next(iter(jaxprs.variables(eqn.invars)), None)
        if eqn.primitive.name not in _CONVERSIONS or source not in converted:
            rest.append(eqn)
            continue
        (out,) = eqn.outvars
        first = known.setdefault((eqn.primitive.name, source, out.aval), out)
        if first is not out:
            same[out] = first
            continue
        root, chain = converted[source]
        chain = [*chain, eqn]
        if _local_size(out) > _local_size(source):
            gather = jaxprs.as_function(closed, chain, [root], [out])
            far[out] = Far(inputs[root], lambda x, gather=gather: gather(x)[0])
        else:
            converted[out] = root, chain
            rest.append(eqn)
    return rest, [a if _is_literal(a) else same.get(a, a) for a in results], far


def _is_literal(atom: Atom) -> bool:
    return isinstance(atom, jex.Literal)


def _local_size(v: jex.Var) -> int:
    """Returns the number of elements on each device."""
    return math.prod(jaxprs.sharding(v).shard_shape(jaxprs.shape(v)))


class LateSum(NamedTuple):
    """A gradient of which each device computes a part, and the sum over the devices."""

    closed: Any  # the jaxpr that the equations are from
    part: jex.Var  # [*devices, ...], in place of the product's result
    product: jex.JaxprEqn  # the sum of parts
    tail: list[jex.JaxprEqn]  # from the product to the gradient
    grad: Atom

    def is_in(self, eqns: Sequence[jex.JaxprEqn]) -> bool:
        """Returns whether the product and what follows it are among these equations."""
        return {id(self.product), *map(id, self.tail)} <= set(map(id, eqns))

    def replace(
        self, eqns: Sequence[jex.JaxprEqn], outputs: Sequence[jex.Var]
    ) -> tuple[list[jex.JaxprEqn], list[jex.Var]]:
        """Returns equations and outputs with the parts in place of the gradient."""
        inputs = self.product.invars
        closed = jax.make_jaxpr(self._parts)(*(v.aval for v in inputs))
        (*new, last), _ = jaxprs.inline(closed, inputs, lambda eqn: False)
        dropped = {id(self.product), *map(id, self.tail)}
        kept = [eqn for eqn in eqns if id(eqn) not in dropped]
        new = [*kept, *new, last.replace(outvars=[self.part])]
        return new, [self.part if v is self.grad else v for v in outputs]

    def _parts(self, *operands: jax.Array) -> jax.Array:
        params = {**self.product.params, "out_sharding": None}

        def local(*operands):
            return self.product.primitive.bind(*operands, **params)[None]

        return jax.shard_map(
            local,
            in_specs=tuple(_spec(v) for v in self.product.invars),
            out_specs=PartitionSpec(self.names, *_spec(self.product.outvars[0])),
            check_vma=False,
        )(*operands)

    @property
    def stages(self) -> list[Callable[[jax.Array], jax.Array]]:
        """Functions that sum the parts, one after the other, each with one collective.

        The last one returns the gradient, sharded like its parameter.
        """
        (product,) = self.product.outvars
        axes, spec, scattered = self._axes_of_grad(), [*_spec(product)], {}
        for axis, names in zip(axes or [], _spec(self.grad), strict=axes is not None):
            if spec[axis] is None and names and set(_names(names)) <= set(self.names):
                spec[axis] = names
                scattered[axis] = _names(names)
        rest = tuple(n for n in self.names if not any(n in found for found in scattered.values()))

        def scatter(part):
            for axis, names in scattered.items():
                part = jax.lax.psum_scatter(part, names, scatter_dimension=axis + 1, tiled=True)
            return part if rest else part[0]

        in_spec = PartitionSpec(self.names, *_spec(product))
        out_spec = PartitionSpec(rest, *spec) if rest else PartitionSpec(*spec)
        stages = [_local(scatter, in_spec, out_spec)] if scattered else []
        if rest:
            add = lambda part: jax.lax.psum(part[0], rest)  # noqa: E731
            stages.append(_local(add, out_spec if scattered else in_spec, PartitionSpec(*spec)))
        last = stages[-1]
        return [*stages[:-1], lambda x: self._to_grad(last(x))]

    def _to_grad(self, x: jax.Array) -> jax.Array:
        axes = self._axes_of_grad()
        if axes is None:
            inputs = list(self.product.outvars)
            return jaxprs.as_function(self.closed, self.tail, inputs, [self.grad])(x)[0]
        x = jax.lax.transpose(x, axes)
        for eqn in self.tail:
            x = x.astype(jaxprs.dtype(eqn.outvars[0]))
        return jax.sharding.reshard(x, _spec(self.grad))

    @property
    def names(self) -> tuple[str, ...]:
        """The mesh axes that are summed over."""
        return _summed(self.product)

    def _axes_of_grad(self) -> list[int] | None:
        """Returns the product's axis of each axis of the gradient, which is a transpose of it.

        None if the gradient is another function of the product.
        """
        axes = list(range(len(_spec(self.product.outvars[0]))))
        for eqn in self.tail:
            if eqn.primitive.name == "transpose":
                axes = [axes[axis] for axis in eqn.params["permutation"]]
            elif eqn.primitive.name not in _CONVERSIONS:
                return None
        return axes


def _local(function: Callable[..., Any], in_spec: PartitionSpec, out_spec: PartitionSpec) -> Any:
    return jax.shard_map(function, in_specs=in_spec, out_specs=out_spec, check_vma=False)


def find_sum(
    closed: Any, eqns: Sequence[jex.JaxprEqn], results: Sequence[Atom], k: int
) -> LateSum | None:
    """Returns how result k, a gradient, is a sum over devices.

    None if it is none, if it is used for something else too, or under a mesh that is not Explicit.

    Args:
      closed: the jaxpr that the equations are from.
      eqns: a program.
      results: its results.
      k: one of them.
    """
    grad = v = results[k]
    producers = {v: eqn for eqn in eqns for v in eqn.outvars}
    tail: list[jex.JaxprEqn] = []
    while isinstance(v, jex.Var) and v in producers:
        eqn = producers[v]
        users = sum(v in jaxprs.variables(user.invars) for user in eqns)
        if users + sum(v is result for result in results) > 1:
            return None
        if eqn.primitive.name in ("dot_general", "reduce_sum") and _summed(eqn):
            if not _is_natural(eqn):
                return None
            found = LateSum(closed, v, eqn, tail[::-1], grad)
            part = jax.eval_shape(found._parts, *(x.aval for x in eqn.invars))
            return found._replace(part=jex.Var(jax.typeof(part)))
        operands = jaxprs.variables(eqn.invars)
        if len(operands) != 1 or len(eqn.outvars) != 1 or eqn.effects:
            return None
        tail.append(eqn)
        (v,) = operands
    return None


def _summed(product: jex.JaxprEqn) -> tuple[str, ...]:
    """Returns the mesh axes that a product sums over."""
    operand, axes = product.invars[0], _summed_axes(product)[0]
    mesh = jaxprs.sharding(operand).mesh
    # A shard_map needs the mesh of `jax.set_mesh`.
    if set(mesh.axis_types) != {AxisType.Explicit} or jax.sharding.get_abstract_mesh().empty:
        return ()
    names = [name for axis in axes for name in _names(_spec(operand)[axis])]
    return tuple(name for name in names if mesh.shape[name] > 1)


def _summed_axes(product: jex.JaxprEqn) -> Sequence[Sequence[int]]:
    """Returns the axes that are summed over, of each operand."""
    if product.primitive.name == "reduce_sum":
        return [product.params["axes"]]
    return product.params["dimension_numbers"][0]


def _is_natural(product: jex.JaxprEqn) -> bool:
    """Returns whether the result has the other axes of the operands, sharded as they are."""
    names = [
        names
        for operand, axes in zip(product.invars, _summed_axes(product), strict=True)
        for axis, names in enumerate(_spec(operand))
        if axis not in axes
    ]
    return names == list(_spec(product.outvars[0]))


def _spec(v: Atom) -> PartitionSpec:
    return jaxprs.sharding(v).spec


def _names(axis: Any) -> tuple[str, ...]:
    return () if axis is None else axis if isinstance(axis, tuple) else (axis,)
