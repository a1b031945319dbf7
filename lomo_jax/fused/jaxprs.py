"""Reads and rewrites jaxprs: splits scans, inlines calls, extracts functions, finds dependence.

The parameters of a scan and the split into closed and open jaxprs differ between the versions of
JAX that lomo_jax supports (0.10 to 0.12). Only this module depends on the version.
"""

import functools
import math
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax.sharding import NamedSharding

from lomo_jax.fused.arrays import Place, read_layer
from lomo_jax.fused.flags import scatter, select

Atom = jex.Var | jex.Literal

# From JAX 0.12 on every jaxpr holds its own constants, and JAX no longer exports this name.
_ClosedJaxpr: Any = getattr(jex, "ClosedJaxpr", jex.Jaxpr)

# Calls that may be replaced by their body. A checkpoint around a layer scan is among them: the
# backward pass recomputes the layers anyway.
_CHECKPOINTS = ("remat", "remat2", "checkpoint")
INLINED = ("jit", "pjit", "closed_call", "core_call", *_CHECKPOINTS)


class Layers(NamedTuple):
    """Layers of a stack: layer i is the part ``place`` says of the array `of`."""

    of: Atom
    place: Place = Place()

    @property
    def key(self) -> tuple[int, Place]:
        """Equal for equal layers; a literal cannot be hashed."""
        return id(self.of), self.place

    def is_in_front(self, length: int) -> bool:
        """Returns whether they are all of a stack of `length` layers on axis 0."""
        return self.place == Place() and shape(self.of)[0] == length


class Scan(NamedTuple):
    """A `lax.scan` equation, or one that scans layers in other places than axis 0 too."""

    body: Any  # closed jaxpr: (*consts, *carry, *x) -> (*carry, *y)
    consts: list[Atom]
    carry: list[Atom]
    layers: list[Layers]  # x i is layer i of these
    carry_out: list[jex.Var]
    ys: list[jex.Var]
    length: int
    reverse: bool
    unroll: int

    @property
    def xs(self) -> list[Atom]:
        """The arrays whose layers are scanned."""
        return [layers.of for layers in self.layers]

    @property
    def invars(self) -> list[Atom]:
        return [*self.consts, *self.carry, *self.xs]

    @property
    def outvars(self) -> list[jex.Var]:
        return [*self.carry_out, *self.ys]

    @property
    def effects(self) -> Any:
        return open_jaxpr(self.body).effects


# A program is a list of these. In the program of a loss every layer scan is a `Scan`.
Operation = jex.JaxprEqn | Scan


def open_jaxpr(closed) -> jex.Jaxpr:
    """Returns the jaxpr inside a closed jaxpr; an open jaxpr is returned as it is."""
    return getattr(closed, "jaxpr", closed)


def shape(atom: Atom) -> tuple[int, ...]:
    aval: Any = atom.aval
    return aval.shape


def dtype(atom: Atom) -> Any:
    aval: Any = atom.aval
    return aval.dtype


def sharding(atom: Atom) -> NamedSharding:
    """Returns the sharding of a value over the mesh under which it was traced."""
    aval: Any = atom.aval
    return aval.sharding


def mib(atom: Atom, *, wide: bool = False) -> float:
    """Returns the MiB of an array; `wide`: with at least 4 bytes an element."""
    itemsize = dtype(atom).itemsize
    return math.prod(shape(atom)) * (max(itemsize, 4) if wide else itemsize) / 2**20


def zeros(var: jex.Var) -> jax.Array:
    """Returns zeros of the variable's type, which includes its sharding over Explicit axes."""
    aval: Any = var.aval
    return jnp.zeros_like(aval)


def variables(atoms: Iterable[Atom]) -> dict[jex.Var, None]:
    """Returns the variables among `atoms` as an ordered set."""
    return dict.fromkeys(a for a in atoms if isinstance(a, jex.Var))


def operands(eqns: Iterable[Any]) -> dict[jex.Var, None]:
    """Returns the variables that equations read, as an ordered set."""
    return variables(atom for eqn in eqns for atom in eqn.invars)


def is_float(atom: Atom) -> bool:
    return jnp.issubdtype(dtype(atom), jnp.inexact)


def is_scan(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name == "scan"


def has_scan(closed) -> bool:
    """Returns whether there is a scan in a jaxpr or in a call inside it."""
    return any(
        is_scan(eqn) or (is_call(eqn) and has_scan(called_jaxpr(eqn)))
        for eqn in open_jaxpr(closed).eqns
    )


def read_scan(eqn: jex.JaxprEqn) -> Scan:
    params = eqn.params
    if "ft_in" in params:
        num_consts, num_carry, _ = (len(part) for part in params["ft_in"].unpack())
    else:
        num_consts, num_carry = params["num_consts"], params["num_carry"]
    operands, results = list(eqn.invars), list(eqn.outvars)
    return Scan(
        body=params["jaxpr"],
        consts=operands[:num_consts],
        carry=operands[num_consts : num_consts + num_carry],
        layers=[Layers(x) for x in operands[num_consts + num_carry :]],
        carry_out=results[:num_carry],
        ys=results[num_carry:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )


def with_body(scan: Scan, body: Callable[..., Any]) -> Scan:
    """Returns the scan with another body, and without the consts that the body does not use."""

    def layer(x: Layers) -> Any:
        return jax.eval_shape(lambda of: read_layer(of, [x.place], [0]), x.of.aval)

    xs = list(map(layer, scan.layers))
    closed = jax.make_jaxpr(body)(*(a.aval for a in [*scan.consts, *scan.carry]), *xs)
    jaxpr = open_jaxpr(closed)
    used = variables(a for eqn in jaxpr.eqns for a in eqn.invars)
    used |= variables(jaxpr.outvars)
    is_used = [v in used for v in jaxpr.invars[: len(scan.consts)]]
    if not all(is_used):
        consts = select(scan.consts, is_used)

        def smaller(*args):
            used = scatter([None] * len(is_used), args[: len(consts)], is_used)
            return body(*used, *args[len(consts) :])

        return with_body(scan._replace(consts=consts), smaller)
    return scan._replace(body=closed)


def bodies(eqn: jex.JaxprEqn) -> list[Any]:
    """Returns the jaxprs among the parameters of `eqn`."""
    kinds = (_ClosedJaxpr, jex.Jaxpr)
    values = (v if isinstance(v, tuple) else (v,) for v in eqn.params.values())
    return [jaxpr for group in values for jaxpr in group if isinstance(jaxpr, kinds)]


def users(closed, var: jex.Var) -> list[jex.JaxprEqn]:
    """Returns the equations with `var` itself as an operand, also those inside calls."""
    found = []
    for eqn in open_jaxpr(closed).eqns:
        for i, operand in enumerate(eqn.invars):
            if operand is var:
                called = called_jaxpr(eqn)
                if called is None:
                    found.append(eqn)
                else:
                    found += users(called, open_jaxpr(called).invars[i])
    return found


def called_jaxpr(eqn: jex.JaxprEqn):
    """Returns the jaxpr, closed or without constants, that may replace `eqn`, or None."""
    if eqn.primitive.name not in INLINED:
        return None
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def is_call(eqn: jex.JaxprEqn) -> bool:
    """Returns whether `eqn` is a call, such as `jit`, that its body may replace."""
    return called_jaxpr(eqn) is not None


def is_checkpoint(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name in _CHECKPOINTS


def inline(
    closed,
    operands: Sequence[Atom],
    wanted: Callable[[jex.JaxprEqn], bool],
) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """Replaces calls by their bodies.

    Args:
      closed: a closed jaxpr.
      operands: the atoms that replace its inputs.
      wanted: whether to inline an equation, whose operands are already replaced.

    Returns:
      Equations over fresh variables, and the atoms that replace the results of `closed`.
    """
    jaxpr = open_jaxpr(closed)
    env: dict[jex.Var, Atom] = dict(zip(jaxpr.invars, operands, strict=True))
    for var, value in zip(jaxpr.constvars, getattr(closed, "consts", ()), strict=True):
        env[var] = jex.Literal(value, var.aval)
    eqns: list[jex.JaxprEqn] = []

    def read(atom: Atom) -> Atom:
        return atom if isinstance(atom, jex.Literal) else env[atom]

    for old in jaxpr.eqns:
        eqn = old.replace(invars=[read(a) for a in old.invars])
        if wanted(eqn):
            inner, results = inline(called_jaxpr(eqn), eqn.invars, wanted)
            eqns += inner
        else:
            results = [jex.Var(v.aval) for v in old.outvars]
            eqns.append(eqn.replace(outvars=results))
        env.update(zip(old.outvars, results, strict=True))
    return eqns, [read(a) for a in jaxpr.outvars]


def as_function(template, eqns, inputs: Sequence[jex.Var], outputs: Sequence[Atom]):
    """Returns `eqns`, cut out of the jaxpr `template`, as a function from `inputs` to `outputs`."""
    jaxpr = open_jaxpr(template).replace(
        constvars=[], invars=list(inputs), outvars=list(outputs), eqns=list(eqns)
    )
    return jex.jaxpr_as_fun(_ClosedJaxpr(jaxpr, []))


def evaluate_late(function: Callable[..., Any], args: Sequence[Any], zero: Any) -> Any:
    """Returns ``function(*args)``, with its arrays of zeros broadcast from the scalar `zero`.

    XLA allocates zeros far too early, since they depend on nothing, and shares those of one shape:
    among them the start of every summed gradient, as large as a parameter. Pass a `zero` that
    depends on something.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs = [jex.Var(v.aval) for v in open_jaxpr(closed).invars]
    eqns, results = inline(closed, inputs, lambda eqn: eqn.primitive.name in ("jit", "pjit"))
    zeros: dict[Any, jex.Var] = {}
    for k, eqn in enumerate(eqns):
        if eqn.primitive.name == "broadcast_in_dim" and _is_zero(eqn.invars[0]):
            var = zeros.setdefault(dtype(eqn.invars[0]), jex.Var(eqn.invars[0].aval))
            eqns[k] = eqn.replace(invars=[var, *eqn.invars[1:]])
    late = as_function(closed, eqns, [*zeros.values(), *inputs], results)
    outputs = late(*(zero.astype(d) for d in zeros), *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(result), outputs)


def _is_zero(atom: Atom) -> bool:
    # A jax.Array may be traced: its value is unknown.
    if not isinstance(atom, jex.Literal) or isinstance(atom.val, jax.Array):
        return False
    return shape(atom) == () and bool(atom.val == 0)


def dependence(closed, inputs: Sequence[int], *, derivative: bool = False) -> list[int]:
    """Returns which inputs each output depends on; never too few.

    Args:
      closed: a closed jaxpr.
      inputs: for each input a set of labels, as the bits of an int.
      derivative: whether `stop_gradient` ends a dependence. Otherwise an output depends on an input
        in value or derivative.

    Returns:
      For each output the union of the labels of the inputs that it depends on.
    """
    jaxpr = open_jaxpr(closed)
    env = dict(zip(jaxpr.invars, inputs, strict=True))
    env = labels(jaxpr.eqns, env, derivative=derivative)
    return [label(a, env) for a in jaxpr.outvars]


def live(program: Sequence[Any], results: Sequence[Atom]) -> list[Any]:
    """Returns the operations that `results` need, and those with side effects."""
    needed, found = set(variables(results)), []
    for operation in reversed(program):
        if operation.effects or not needed.isdisjoint(operation.outvars):
            found.append(operation)
            needed.update(variables(operation.invars))
    return found[::-1]


def sort(program: Sequence[Operation]) -> list[Operation]:
    """Moves every operation behind those whose results it needs; otherwise keeps the order."""
    producers = {v: operation for operation in program for v in operation.outvars}
    ordered: dict[int, Operation] = {}
    for operation in program:
        stack = [operation]
        while stack:
            top = stack[-1]
            missing = [producers[v] for v in variables(top.invars) if v in producers]
            missing = [p for p in missing if id(p) not in ordered]
            if missing and id(top) not in ordered:
                stack += missing
            else:
                ordered[id(stack.pop())] = top
    return list(ordered.values())


def labels(
    program: Iterable[Operation], inputs: Mapping[jex.Var, int], *, derivative: bool = False
) -> dict[jex.Var, int]:
    """Returns the label of every variable of a program, given those of its inputs."""
    env = dict(inputs)
    for operation in program:
        outputs = operation_dependence(operation, env, derivative=derivative)
        env.update(zip(operation.outvars, outputs, strict=True))
    return env


def label(atom: Atom, env: Mapping[jex.Var, int]) -> int:
    return 0 if isinstance(atom, jex.Literal) else env.get(atom, 0)


def operation_dependence(
    operation: Operation, env: Mapping[jex.Var, int], *, derivative: bool = False
) -> list[int]:
    """Returns the `dependence` of one operation, given the labels of earlier variables."""
    inputs = [label(a, env) for a in operation.invars]
    if isinstance(operation, Scan) or is_scan(operation):
        scan = operation if isinstance(operation, Scan) else read_scan(operation)
        num_consts, num_carry = len(scan.consts), len(scan.carry)
        while True:
            outputs = dependence(scan.body, inputs, derivative=derivative)
            carry = inputs[num_consts : num_consts + num_carry]
            grown = [a | b for a, b in zip(carry, outputs, strict=False)]
            if grown == carry:
                return carry + outputs[num_carry:]
            inputs[num_consts : num_consts + num_carry] = grown
    if called := called_jaxpr(operation):
        return dependence(called, inputs, derivative=derivative)
    name = operation.primitive.name
    if name == "cond":
        branches = [
            dependence(branch, inputs[1:], derivative=derivative)
            for branch in operation.params["branches"]
        ]
        return [
            functools.reduce(operator.or_, outs, inputs[0]) for outs in zip(*branches, strict=True)
        ]
    if derivative and name == "stop_gradient":
        return [0]
    # `custom_vjp` and its kin are not opened: a derivative may use inputs that the value ignores.
    return [functools.reduce(operator.or_, inputs, 0)] * len(operation.outvars)


def changed_carry(scan: Scan) -> list[bool]:
    """Returns for each element of the carry whether the scan changes it."""
    jaxpr = open_jaxpr(scan.body)
    first = len(scan.consts)
    before, after = jaxpr.invars[first : first + len(scan.carry)], jaxpr.outvars[: len(scan.carry)]
    return [a is not b for a, b in zip(before, after, strict=True)]


def follows(b: Any, a: Any, program: Iterable[Operation]) -> bool:
    """Returns whether operation `b` needs a result of operation `a`, which is earlier."""
    reached = set(a.outvars)
    for operation in program:
        if not reached.isdisjoint(variables(operation.invars)):
            if operation is b:
                return True
            reached.update(operation.outvars)
    return False
