"""Runs a cut loss forward and back, updating each parameter once its gradient is complete."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core as jex
import jax.numpy as jnp

from lomo_jax.fused import jaxprs
from lomo_jax.fused.cut import Cut, Dense, Layers
from lomo_jax.fused.update import PieceState, Updater


class Environment(dict):
    """Values of variables."""

    def read(self, atoms: Sequence[jaxprs.Atom]) -> list[Any]:
        return [a.val if isinstance(a, jex.Literal) else self[a] for a in atoms]


class Cotangents(dict):
    """Cotangents of variables, summed as they come, gone when they are taken."""

    def add(self, variables: Sequence[Any], values: Sequence[jax.Array]) -> None:
        for var, value in zip(variables, values, strict=True):
            self[var] = self[var] + value if var in self else value

    def take(self, variables: Sequence[jex.Var]) -> list[jax.Array]:
        return [
            self.pop(v) if v in self else jnp.zeros(jaxprs.shape(v), jaxprs.dtype(v))
            for v in variables
        ]


def walk(
    cut: Cut,
    updaters: Sequence[tuple[Updater, Updater]],
    params: Sequence[jax.Array],
    states: Sequence[PieceState],
    batch: Sequence[jax.Array],
) -> tuple[list[jax.Array], list[PieceState], jax.Array, list[jax.Array]]:
    """One fused step.

    Args:
      cut: the loss.
      updaters: for each piece, the updater of its dense and that of its stacked parameters.
      params: leaves of the parameters.
      states: for each piece, the states of its updaters.
      batch: leaves of the batch.

    Returns:
      New leaves of the parameters, new states, the loss, leaves of aux.
    """
    env = Environment(zip([*cut.params, *cut.batch], [*params, *batch], strict=True))
    pullbacks = [
        _dense(cut, piece, env) if isinstance(piece, Dense) else _layers(cut, piece, env)
        for piece in cut.pieces
    ]
    loss, *aux = env.read([cut.loss, *cut.aux])

    cotangents = Cotangents()
    if cut.differentiates([cut.loss])[0]:
        cotangents.add([cut.loss], [jnp.ones_like(loss)])
    new_params, new_states = list(params), list(states)
    for k in reversed(range(len(cut.pieces))):
        piece, (dense, stacked), state = cut.pieces[k], updaters[k], states[k]
        stack, layers_state = pullbacks[k](
            cotangents, stacked, [params[i] for i in piece.stacked], state.layers
        )
        grads = cotangents.take([cut.params[i] for i in piece.dense])
        leaves, dense_state = dense.apply(grads, state.dense, [params[i] for i in piece.dense])
        for i, leaf in zip([*piece.stacked, *piece.dense], [*stack, *leaves], strict=True):
            new_params[i] = leaf
        new_states[k] = PieceState(dense_state, layers_state)
    return new_params, new_states, loss, aux


def _dense(cut: Cut, piece: Dense, env: Environment) -> Callable:
    args = env.read(piece.inputs)
    diff_in = cut.differentiates(piece.inputs)
    # The last piece is walked back at once, with what its forward pass computed; an earlier one
    # computes it again when its turn comes.
    if piece is cut.pieces[-1]:
        is_loss = [v is cut.loss for v in piece.outputs]
        diff_out = _both(is_loss, cut.differentiates(piece.outputs))
        outputs, vjp = _vjp(piece.function, args, diff_in, diff_out)
    else:
        outputs, vjp = piece.function(*args), None
    env.update(zip(piece.outputs, outputs, strict=True))

    def pullback(cotangents: Cotangents, updater: Updater, stack, state):
        del updater
        reached = [v in cotangents for v in piece.outputs]
        if any(reached):
            back = vjp or _vjp(piece.function, args, diff_in, reached)[1]
            grads = back(cotangents.take(_pick(piece.outputs, reached)))
            cotangents.add(_pick(piece.inputs, diff_in), grads)
        return stack, state

    return pullback


def _layers(cut: Cut, piece: Layers, env: Environment) -> Callable:
    scan = piece.scan
    body = jex.jaxpr_as_fun(scan.body)
    consts, init, xs = env.read(scan.consts), env.read(scan.carry), env.read(scan.xs)
    changed = jaxprs.changed_carry(scan)

    def forward(carry, x):
        results = body(*consts, *carry, *x)
        carry_out, y = results[: len(init)], results[len(init) :]
        return carry_out, (y, _pick(carry, changed))

    # Of the forward pass the input of each layer is kept, and nothing else.
    carry_out, (ys, layer_inputs) = jax.lax.scan(
        forward, init, xs, scan.length, scan.reverse, scan.unroll
    )
    env.update(zip([*scan.carry_out, *scan.ys], [*carry_out, *ys], strict=True))

    is_param = [k in piece.xs_params for k in range(len(xs))]
    is_other = [not p for p in is_param]
    diff_consts = cut.differentiates(scan.consts)
    diff_carry = cut.differentiates(scan.carry_out)
    diff_xs = cut.differentiates(scan.xs)
    diff_others = _both(diff_xs, is_other)
    first, step = (0, 1) if scan.reverse else (scan.length - 1, -1)

    def pullback(cotangents: Cotangents, updater: Updater, stack, state):
        diff_ys = [v in cotangents for v in scan.ys]

        def layer_back(carry, x):
            i, stack, state, layer, layer_state, ct_carry, ct_consts = carry
            changed_inputs, others, ct_ys = x
            inputs = _merge(init, changed_inputs, changed)
            layer_xs = _merge(_merge(xs, layer, is_param), others, is_other)
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
            # The next layer is read here, after the write. Read at the top of the body, the old
            # layer would outlive the write, and XLA would copy the whole stack to keep it.
            i = jnp.clip(i + step, 0, scan.length - 1)
            layer, layer_state = _read((stack, state), i)
            carry = (i, stack, state, layer, layer_state, ct_carry, ct_consts)
            return carry, _pick(ct_xs, diff_others)

        carry = (
            jnp.int32(first),
            stack,
            state,
            *_read((stack, state), first),
            cotangents.take(_pick(scan.carry_out, diff_carry)),
            [jnp.zeros_like(c) for c in _pick(consts, diff_consts)],
        )
        ct_ys = cotangents.take(_pick(scan.ys, diff_ys))
        back_xs = (layer_inputs, _pick(xs, is_other), ct_ys)
        carry, ct_others = jax.lax.scan(
            layer_back, carry, back_xs, scan.length, reverse=not scan.reverse
        )
        _, stack, state, _, _, ct_carry, ct_consts = carry
        cotangents.add(_pick(scan.consts, diff_consts), ct_consts)
        cotangents.add(_pick(scan.xs, diff_others), ct_others)
        # A carry that parameters reach may start from something that they do not, such as zeros.
        starts = _pick(scan.carry, diff_carry)
        reached = cut.differentiates(starts)
        cotangents.add(_pick(starts, reached), _pick(ct_carry, reached))
        return stack, state

    return pullback


def _vjp(
    function: Callable[..., list[Any]],
    args: Sequence[Any],
    diff_in: Sequence[bool],
    diff_out: Sequence[bool],
) -> tuple[list[Any], Callable[[list[jax.Array]], tuple[jax.Array, ...]]]:
    """`jax.vjp` from the inputs in `diff_in` to the outputs in `diff_out`.

    Returns:
      All outputs, and the map from cotangents of these outputs to those of these inputs.
    """
    is_aux = [not d for d in diff_out]

    def active(*inputs):
        outputs = function(*_merge(args, inputs, diff_in))
        return _pick(outputs, diff_out), _pick(outputs, is_aux)

    outputs, vjp, aux = jax.vjp(active, *_pick(args, diff_in), has_aux=True)
    return _merge(_merge([None] * len(diff_out), outputs, diff_out), aux, is_aux), vjp


def _pick(items: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def _both(a: Sequence[bool], b: Sequence[bool]) -> list[bool]:
    return [x and y for x, y in zip(a, b, strict=True)]


def _merge(items: Sequence[Any], new: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """`items` with the flagged ones replaced by `new`, in order."""
    replacements = iter(new)
    return [next(replacements) if flag else item for item, flag in zip(items, flags, strict=True)]


def _read(stacks: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)


def _write(stacks: Any, layer: Any, i: Any) -> Any:
    write = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, new: write(x, new, i, axis=0), stacks, layer)
