"""Runs a cut loss forward and back, updating every parameter as soon as its gradient is complete."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs
from lomo_jax.fused.cut import Cut, Dense, Layers
from lomo_jax.fused.update import Updater


class Environment(dict):
    """Values of variables."""

    def read(self, atom: jaxprs.Atom):
        return atom.val if isinstance(atom, jex.Literal) else self[atom]


class Cotangents(dict):
    """Cotangents of variables, summed as they come, gone once they are taken."""

    def add(self, atoms: Sequence[jaxprs.Atom], values: Sequence[jax.Array]):
        for var, value in zip(atoms, values, strict=True):
            self[var] = self[var] + value if var in self else value

    def take(self, variables: Sequence[jex.Var]) -> list[jax.Array]:
        return [
            self.pop(v) if v in self else jnp.zeros(v.aval.shape, v.aval.dtype) for v in variables
        ]


def walk(cut: Cut, updaters, params: Sequence, states: Sequence, batch: Sequence):
    """One fused step.

    Args:
      cut: the loss.
      updaters: for each node, the `Updater` of its dense and the one of its stacked parameters.
      params: leaves of the parameters.
      states: for each node, the states of its updaters; those of stacked parameters have a layer axis in front.
      batch: leaves of the batch.

    Returns:
      New leaves of the parameters, new states, the loss, leaves of aux.
    """
    env = Environment(zip([*cut.params, *cut.batch], [*params, *batch], strict=True))
    pullbacks = []
    for node in cut.nodes:
        forward = _dense if isinstance(node, Dense) else _layers
        pullbacks.append(forward(cut, node, env))
    loss, aux = env.read(cut.loss), [env.read(a) for a in cut.aux]

    cotangents = Cotangents()
    if cut.loss in cut.differentiable:
        cotangents.add([cut.loss], [jnp.ones_like(loss)])
    params, new_states = list(params), []
    for node, pullback, (dense, stacked), (dense_state, stacked_state) in reversed(
        list(zip(cut.nodes, pullbacks, updaters, states, strict=True))
    ):
        stack = [params[i] for i in node.stacked]
        stack, stacked_state = pullback(cotangents, stacked, stack, stacked_state)
        grads = cotangents.take([cut.params[i] for i in node.dense])
        leaves = [params[i] for i in node.dense]
        leaves, dense_state = dense.apply(grads, dense_state, leaves)
        for i, leaf in zip([*node.stacked, *node.dense], [*stack, *leaves], strict=True):
            params[i] = leaf
        new_states.insert(0, type(states[0])(dense_state, stacked_state))
    return params, new_states, loss, aux


def _dense(cut: Cut, node: Dense, env: Environment) -> Callable:
    args = [env[v] for v in node.inputs]
    diff_in = [v in cut.differentiable for v in node.inputs]
    diff_out = [v in cut.differentiable for v in node.outputs]
    # The last segment is walked back at once; an earlier one is recomputed rather than remembered.
    is_last = node is cut.nodes[-1]
    if is_last:
        outputs, vjp = _vjp(node.function, args, diff_in, diff_out)
    else:
        outputs, vjp = node.function(*args), None
    env.update(zip(node.outputs, outputs, strict=True))

    def pullback(cotangents: Cotangents, updater: Updater, stack, state):
        variables = [v for v, d in zip(node.outputs, diff_out, strict=True) if d]
        if any(v in cotangents for v in variables):
            back = vjp or _vjp(node.function, args, diff_in, diff_out)[1]
            inputs = [v for v, d in zip(node.inputs, diff_in, strict=True) if d]
            cotangents.add(inputs, back(cotangents.take(variables)))
        return stack, state

    return pullback


def _layers(cut: Cut, node: Layers, env: Environment) -> Callable:
    scan, body = node.scan, jex.jaxpr_as_fun(node.scan.body)
    num_consts, num_carry = len(scan.consts), len(scan.carry)
    consts = [env.read(a) for a in scan.consts]
    init = [env.read(a) for a in scan.carry]
    xs = [env.read(a) for a in scan.xs]
    kept = jaxprs.changed_carry(scan)

    def forward(carry, x):
        results = body(*consts, *carry, *x)
        return results[:num_carry], (results[num_carry:], _pick(carry, kept))

    # What is kept of the forward pass is the input of each layer, and nothing else.
    final, (ys, layer_inputs) = jax.lax.scan(
        forward, init, xs, scan.length, scan.reverse, scan.unroll
    )
    env.update(zip([*scan.carry_out, *scan.ys], [*final, *ys], strict=True))

    def pullback(cotangents: Cotangents, updater: Updater, stack, state):
        is_param = [k in node.xs_params for k in range(len(xs))]
        diff_consts = [a in cut.differentiable for a in scan.consts]
        diff_carry = [v in cut.differentiable for v in scan.carry_out]
        diff_xs = [a in cut.differentiable for a in scan.xs]
        diff_ys = [v in cotangents for v in scan.ys]
        other_xs = _pick(xs, [not p for p in is_param])
        diff_other = [d for d, p in zip(diff_xs, is_param, strict=True) if not p]
        step_back = 1 if scan.reverse else -1
        first = 0 if scan.reverse else scan.length - 1

        def layer_back(carry, x):
            i, stack, state, layer, layer_state, ct_carry, ct_consts = carry
            inputs, others, ct_ys = x
            inputs = _merge(init, inputs, kept)
            layer_xs = _merge(_merge(is_param, layer, is_param), others, [not p for p in is_param])
            _, vjp = _vjp(
                body,
                [*consts, *inputs, *layer_xs],
                [*diff_consts, *diff_carry, *diff_xs],
                [*diff_carry, *diff_ys],
            )
            grads = iter(vjp([*ct_carry, *ct_ys]))
            ct_consts = [c + next(grads) for c in ct_consts]
            ct_carry = [next(grads) for _ in ct_carry]
            ct_xs = [next(grads) if d else None for d in diff_xs]
            layer, layer_state = updater.apply(_pick(ct_xs, is_param), layer_state, layer)
            stack, state = _write((stack, state), (layer, layer_state), i)
            # Reading the next layer here, after the write, lets XLA update the stack in place: read at the top
            # of the body, the old layer outlives the write and the whole stack is copied.
            i = i + step_back
            layer, layer_state = _read((stack, state), jnp.clip(i, 0, scan.length - 1))
            carry = (i, stack, state, layer, layer_state, ct_carry, ct_consts)
            ct_others = [g for g, p in zip(ct_xs, is_param, strict=True) if not p and g is not None]
            return carry, ct_others

        ct_carry = cotangents.take(_pick(scan.carry_out, diff_carry))
        ct_consts = [jnp.zeros_like(c) for c in _pick(consts, diff_consts)]
        ct_ys = cotangents.take(_pick(scan.ys, diff_ys))
        layer, layer_state = _read((stack, state), first)
        carry = (jnp.int32(first), stack, state, layer, layer_state, ct_carry, ct_consts)
        carry, ct_others = jax.lax.scan(
            layer_back, carry, (layer_inputs, other_xs, ct_ys), scan.length, not scan.reverse
        )
        _, stack, state, _, _, ct_carry, ct_consts = carry
        for atoms, flags, values in [
            (scan.carry, diff_carry, ct_carry),
            (scan.consts, diff_consts, ct_consts),
            (_pick(scan.xs, [not p for p in is_param]), diff_other, ct_others),
        ]:
            pairs = zip(_pick(atoms, flags), values, strict=True)
            reached = [(a, g) for a, g in pairs if a in cut.differentiable]
            cotangents.add(*zip(*reached)) if reached else None
        return stack, state

    return pullback


def _vjp(function: Callable, args: Sequence, diff_in: Sequence[bool], diff_out: Sequence[bool]):
    """`jax.vjp` between some of the inputs and some of the outputs of `function`.

    Returns:
      All outputs, and the map from cotangents of the outputs in `diff_out` to those of the inputs in `diff_in`.
    """

    def active(*inputs):
        outputs = function(*_merge(args, inputs, diff_in))
        return _pick(outputs, diff_out), _pick(outputs, [not d for d in diff_out])

    outputs, vjp, rest = jax.vjp(active, *_pick(args, diff_in), has_aux=True)
    blank: list[Any] = [None] * len(diff_out)
    return _merge(_merge(blank, outputs, diff_out), rest, [not d for d in diff_out]), vjp


def _pick(items: Sequence, flags: Sequence[bool]) -> list:
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def _merge(items: Sequence, replacements: Sequence, flags: Sequence[bool]) -> list:
    """`items`, with those that are flagged replaced in order."""
    new = iter(replacements)
    return [next(new) if flag else item for item, flag in zip(items, flags, strict=True)]


def _read(stacks, i):
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)


def _write(stacks, layer, i):
    return jax.tree.map(
        lambda x, new: jax.lax.dynamic_update_index_in_dim(x, new, i, 0), stacks, layer
    )
