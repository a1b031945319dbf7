"""What the fused step needs to know about jaxprs: reading, inlining, cutting out, dependence.

The layout of a scan's parameters and the split of closed from open jaxprs differ between the
versions of JAX that lomo_jax supports (0.10 to 0.12); this module is the only one that knows.
"""

import functools
import operator
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp

Atom = jex.Var | jex.Literal

# From JAX 0.12 on a jaxpr holds its own constants, and this name is one that JAX no longer exports.
_ClosedJaxpr: Any = getattr(jex, "ClosedJaxpr", jex.Jaxpr)

# Calls that compute the same thing when their body stands in their place. The fused step recomputes
# layers itself, so a checkpoint around a layer scan has nothing left to add.
INLINED = ("jit", "pjit", "closed_call", "core_call", "remat", "remat2", "checkpoint")


# What returns its operand. A constraint on a whole stack says what its own sharding says.
IDENTITIES = ("copy", "copy_p", "name", "sharding_constraint")


class Scan(NamedTuple):
    """A `lax.scan` equation, taken apart."""

    body: Any  # closed jaxpr: (*consts, *carry, *x) -> (*carry, *y)
    consts: list[Atom]
    carry: list[Atom]
    xs: list[Atom]
    carry_out: list[jex.Var]
    ys: list[jex.Var]
    length: int
    reverse: bool
    unroll: int


def open_jaxpr(closed) -> jex.Jaxpr:
    """The jaxpr of a closed jaxpr; open ones are returned as they are."""
    return getattr(closed, "jaxpr", closed)


def shape(atom: Atom) -> tuple[int, ...]:
    aval: Any = atom.aval
    return aval.shape


def dtype(atom: Atom) -> Any:
    aval: Any = atom.aval
    return aval.dtype


def zeros(var: jex.Var) -> jax.Array:
    """Zeros of the variable's type, which says how they are divided over Explicit axes, too."""
    aval: Any = var.aval
    return jnp.zeros_like(aval)


def variables(atoms: Iterable[Atom]) -> dict[jex.Var, None]:
    """The set of the variables among `atoms`, in order."""
    return dict.fromkeys(a for a in atoms if isinstance(a, jex.Var))


def is_scan(eqn: jex.JaxprEqn) -> bool:
    return eqn.primitive.name == "scan"


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
        xs=operands[num_consts + num_carry :],
        carry_out=results[:num_carry],
        ys=results[num_carry:],
        length=params["length"],
        reverse=params["reverse"],
        unroll=params["unroll"],
    )


def bodies(eqn: jex.JaxprEqn) -> list[Any]:
    """The jaxprs among the parameters of `eqn`."""
    kinds = (_ClosedJaxpr, jex.Jaxpr)
    values = (v if isinstance(v, tuple) else (v,) for v in eqn.params.values())
    return [jaxpr for group in values for jaxpr in group if isinstance(jaxpr, kinds)]


def users(closed, var: jex.Var) -> list[jex.JaxprEqn]:
    """The equations that consume `var` as it is, in calls too."""
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
    """The jaxpr, closed or without constants, that `eqn` could be replaced by, or None."""
    if eqn.primitive.name not in INLINED:
        return None
    return eqn.params.get("jaxpr", eqn.params.get("call_jaxpr"))


def inline(
    closed,
    operands: Sequence[Atom],
    labels: dict[jex.Var, int],
    wanted: Callable[[jex.JaxprEqn], bool],
) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """Puts the bodies of the calls that are `wanted` in their place.

    Args:
      closed: a closed jaxpr.
      operands: the atoms that its inputs are replaced by.
      labels: `dependence` of the variables among `operands`; that of every new variable is added.
      wanted: says of an equation, its operands already replaced and labelled, whether to inline it.

    Returns:
      Equations over fresh variables, and the atoms that the results of `closed` became.
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
            inner, results = inline(called_jaxpr(eqn), eqn.invars, labels, wanted)
            eqns += inner
        else:
            results = [jex.Var(v.aval) for v in old.outvars]
            eqn = eqn.replace(outvars=results)
            labels.update(zip(results, eqn_dependence(eqn, labels), strict=True))
            eqns.append(eqn)
        env.update(zip(old.outvars, results, strict=True))
    return eqns, [read(a) for a in jaxpr.outvars]


def see_through(
    eqns: Sequence[jex.JaxprEqn], results: Sequence[Atom], variables: Iterable[jex.Var]
) -> tuple[list[jex.JaxprEqn], list[Atom]]:
    """Replaces what only copies, names or constrains one of `variables` by that variable.

    Returns:
      The equations that are left, and the results.
    """
    same: dict[Atom, Atom] = {v: v for v in variables}
    kept = []

    def read(atom: Atom) -> Atom:
        return atom if isinstance(atom, jex.Literal) else same.get(atom, atom)

    for eqn in eqns:
        eqn = eqn.replace(invars=list(map(read, eqn.invars)))
        source = eqn.invars[0] if eqn.primitive.name in IDENTITIES else None
        if isinstance(source, jex.Var) and source in same:
            same[eqn.outvars[0]] = source
        else:
            kept.append(eqn)
    return kept, list(map(read, results))


def as_function(template, eqns, inputs: Sequence[jex.Var], outputs: Sequence[Atom]):
    """The function from `inputs` to `outputs` that `eqns`, cut out of `template`, compute."""
    jaxpr = open_jaxpr(template).replace(
        constvars=[], invars=list(inputs), outvars=list(outputs), eqns=list(eqns)
    )
    return jex.jaxpr_as_fun(_ClosedJaxpr(jaxpr, []))


def evaluate_late(function: Callable[..., Any], args: Sequence[Any], zero: Any) -> Any:
    """`function(*args)`, in which arrays of zeros are made from `zero`, a scalar 0.

    Zeros depend on nothing, so XLA makes those of gradients that are summed up, as large as the
    parameters, far too early, and all that look alike at once. `zero` may depend on something.
    """
    closed, result = jax.make_jaxpr(function, return_shape=True)(*args)
    inputs = [jex.Var(v.aval) for v in open_jaxpr(closed).invars]
    eqns, results = inline(closed, inputs, {}, lambda eqn: eqn.primitive.name in ("jit", "pjit"))
    zeros: dict[Any, jex.Var] = {}
    for k, eqn in enumerate(eqns):
        if eqn.primitive.name == "broadcast_in_dim" and _is_zero(eqn.invars[0]):
            var = zeros.setdefault(dtype(eqn.invars[0]), jex.Var(eqn.invars[0].aval))
            eqns[k] = eqn.replace(invars=[var, *eqn.invars[1:]])
    late = as_function(closed, eqns, [*zeros.values(), *inputs], results)
    outputs = late(*(zero.astype(d) for d in zeros), *jax.tree.leaves(args))
    return jax.tree.unflatten(jax.tree.structure(result), outputs)


def _is_zero(atom: Atom) -> bool:
    # A jax.Array may be traced, and is no literal of the program.
    if not isinstance(atom, jex.Literal) or isinstance(atom.val, jax.Array):
        return False
    return shape(atom) == () and bool(atom.val == 0)


def dependence(closed, inputs: Sequence[int]) -> list[int]:
    """Which inputs each output of a closed jaxpr depends on, in value or derivative; never too few.

    Args:
      closed: a closed jaxpr.
      inputs: a set of labels for each input, as the bits of an int.

    Returns:
      The union of the labels that reach each output, likewise.
    """
    jaxpr = open_jaxpr(closed)
    env: dict[jex.Var, int] = dict(zip(jaxpr.invars, inputs, strict=True))
    for eqn in jaxpr.eqns:
        env.update(zip(eqn.outvars, eqn_dependence(eqn, env), strict=True))
    return [label(a, env) for a in jaxpr.outvars]


def live(
    eqns: Sequence[jex.JaxprEqn], results: Sequence[Atom], *, effects: bool = True
) -> list[jex.JaxprEqn]:
    """The equations that `results` need and, with `effects`, those that have side effects."""
    needed, kept = set(variables(results)), []
    for eqn in reversed(eqns):
        if (effects and eqn.effects) or not needed.isdisjoint(eqn.outvars):
            kept.append(eqn)
            needed.update(variables(eqn.invars))
    return kept[::-1]


def label(atom: Atom, env: Mapping[jex.Var, int]) -> int:
    return 0 if isinstance(atom, jex.Literal) else env.get(atom, 0)


def eqn_dependence(eqn: jex.JaxprEqn, env: Mapping[jex.Var, int]) -> list[int]:
    """`dependence` of one equation, given the labels of the variables before it."""
    inputs = [label(a, env) for a in eqn.invars]
    if is_scan(eqn):
        scan = read_scan(eqn)
        num_consts, num_carry = len(scan.consts), len(scan.carry)
        while True:
            outputs = dependence(scan.body, inputs)
            carry = inputs[num_consts : num_consts + num_carry]
            grown = [a | b for a, b in zip(carry, outputs, strict=False)]
            if grown == carry:
                return carry + outputs[num_carry:]
            inputs[num_consts : num_consts + num_carry] = grown
    if called := called_jaxpr(eqn):
        return dependence(called, inputs)
    if eqn.primitive.name == "cond":
        branches = [dependence(branch, inputs[1:]) for branch in eqn.params["branches"]]
        return [
            functools.reduce(operator.or_, outs, inputs[0]) for outs in zip(*branches, strict=True)
        ]
    # Not inside `custom_vjp` and its kin: a derivative may use an input that the value does not.
    return [functools.reduce(operator.or_, inputs, 0)] * len(eqn.outvars)


def changed_carry(scan: Scan) -> list[bool]:
    """Which elements of the carry a scan changes; the others keep their first value."""
    jaxpr = open_jaxpr(scan.body)
    first = len(scan.consts)
    before, after = jaxpr.invars[first : first + len(scan.carry)], jaxpr.outvars[: len(scan.carry)]
    return [a is not b for a, b in zip(before, after, strict=True)]
