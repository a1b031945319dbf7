"""fused_step and reference_step."""

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused.cut import Cut, cut
from lomo_jax.fused.update import Updater, check_independent
from lomo_jax.fused.walk import walk


class PieceState(NamedTuple):
    """State of `tx` for the parameters of one piece of the loss."""

    dense: optax.OptState | None  # of those that are not stacked, None if there are none
    layers: optax.OptState | None  # of the stacked ones, every array with the layer axis in front


class StepState(NamedTuple):
    """What a step remembers."""

    pieces: tuple[PieceState, ...]  # in the order in which the forward pass meets them


class StepOutput(NamedTuple):
    """What a step reports."""

    loss: jax.Array  # [], in the dtype of the loss, of the parameters before the update
    aux: Any  # what loss_fn returned beside the loss, None without has_aux
    grad_norm: jax.Array | None  # float32 [], None: only known where it is needed, for clipping
    finite: jax.Array  # bool [], whether the loss is finite


class Step(Protocol):
    """`(params, state, batch) -> (params, state, StepOutput)`, with `init(params, batch) -> state`."""

    def __call__(self, params, state: StepState, batch) -> tuple[Any, StepState, StepOutput]: ...

    def init(self, params, batch) -> StepState: ...


def fused_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Step:
    return _FusedStep(loss_fn, tx, has_aux)


def reference_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Step:
    return _ReferenceStep(loss_fn, tx, has_aux)


class _FusedStep:
    def __init__(self, loss_fn, tx, has_aux):
        self.loss_fn, self.tx, self.has_aux = loss_fn, tx, has_aux

    def init(self, params, batch) -> StepState:
        pieces = self._updaters(self._cut(params, batch), params)
        leaves = jax.tree.leaves(params)
        return StepState(
            tuple(
                PieceState(*(u.init([leaves[i] for i in u.indices]) for u in piece))
                for piece in pieces
            )
        )

    def __call__(self, params, state: StepState, batch) -> tuple[Any, StepState, StepOutput]:
        plan = self._cut(params, batch)
        updaters = self._updaters(plan, params)
        params, pieces, loss, aux = self._run(plan, updaters, params, state.pieces, batch)
        return params, StepState(tuple(pieces)), StepOutput(loss, aux, None, jnp.isfinite(loss))

    def _cut(self, params, batch) -> Cut:
        plan = cut(self.loss_fn, params, batch, has_aux=self.has_aux)
        check_independent(self.tx, params, plan.trainable)
        return plan

    def _updaters(self, plan: Cut, params) -> list[tuple[Updater, Updater]]:
        treedef = jax.tree.structure(params)
        return [
            (
                Updater(self.tx, treedef, node.dense),
                Updater(self.tx, treedef, node.stacked, layered=True),
            )
            for node in plan.nodes
        ]

    def _run(self, plan, updaters, params, states, batch):
        leaves, treedef = jax.tree.flatten(params)
        leaves, states, loss, aux = walk(plan, updaters, leaves, states, jax.tree.leaves(batch))
        params = jax.tree.unflatten(treedef, leaves)
        return params, states, loss, jax.tree.unflatten(plan.aux_tree, aux)


class _ReferenceStep(_FusedStep):
    def _run(self, plan, updaters, params, states, batch):
        leaves, treedef = jax.tree.flatten(params)

        def loss_of(trainable):
            new = iter(trainable)
            merged = [next(new) if t else p for p, t in zip(leaves, plan.trainable, strict=True)]
            result = self.loss_fn(jax.tree.unflatten(treedef, merged), batch)
            return result if self.has_aux else (result, None)

        trainable = [i for i, t in enumerate(plan.trainable) if t]
        (loss, aux), grads = jax.value_and_grad(loss_of, has_aux=True)(
            [leaves[i] for i in trainable]
        )
        grads = dict(zip(trainable, grads, strict=True))
        new_leaves, new_states = list(leaves), []
        for piece, piece_state in zip(updaters, states, strict=True):
            new_state = []
            for updater, state in zip(piece, piece_state, strict=True):
                ids = updater.indices
                new, state = updater.apply_stack(
                    [grads[i] for i in ids], state, [leaves[i] for i in ids]
                )
                new_state.append(state)
                for i, leaf in zip(ids, new, strict=True):
                    new_leaves[i] = leaf
            new_states.append(PieceState(*new_state))
        return jax.tree.unflatten(treedef, new_leaves), new_states, loss, aux
