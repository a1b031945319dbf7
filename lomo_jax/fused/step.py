"""fused_step and reference_step."""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused.cut import Cut, cut
from lomo_jax.fused.update import PieceState, Updater, check_independent
from lomo_jax.fused.walk import walk


class StepState(NamedTuple):
    """What a step remembers. A pytree of arrays."""

    pieces: tuple[PieceState, ...]  # in the order in which the loss uses the parameters


class StepOutput(NamedTuple):
    """What a step reports."""

    loss: jax.Array  # [], dtype of the loss; of the parameters before the update
    aux: Any  # what loss_fn returned beside the loss; None without has_aux
    grad_norm: jax.Array | None  # None: the global norm is known only where clipping asks for it
    finite: jax.Array  # bool [], whether the loss is finite


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A training step `(params, state, batch) -> (params, state, StepOutput)`, to be jitted.

    Made by `fused_step` or `reference_step`.
    """

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    has_aux: bool = False

    def init(self, params: Any, batch: Any) -> StepState:
        """Returns the state to start from.

        Args:
          params: pytree of arrays, or of `jax.ShapeDtypeStruct` under `jax.eval_shape`.
          batch: pytree of arrays or of `jax.ShapeDtypeStruct`, of the shapes to come.

        Raises:
          TypeError, ValueError: see `fused_step`.
        """
        return _init_state(params, self._updaters(params, self._cut(params, batch)))

    def __call__(
        self, params: Any, state: StepState, batch: Any
    ) -> tuple[Any, StepState, StepOutput]:
        """Makes one step; see `fused_step`."""
        plan = self._cut(params, batch)
        updaters = self._updaters(params, plan)
        _check_state(state, jax.eval_shape(lambda params: _init_state(params, updaters), params))
        params, states, loss, aux = self._run(plan, updaters, params, state.pieces, batch)
        return params, StepState(tuple(states)), StepOutput(loss, aux, None, jnp.isfinite(loss))

    def _cut(self, params, batch) -> Cut:
        plan = cut(self.loss_fn, params, batch, has_aux=self.has_aux)
        stacked = {i for piece in plan.pieces for i in piece.stacked}
        check_independent(self.tx, params, plan.trainable, stacked)
        return plan

    def _updaters(self, params, plan: Cut) -> list[tuple[Updater, Updater]]:
        treedef = jax.tree.structure(params)
        return [
            (
                Updater(self.tx, treedef, piece.dense),
                Updater(self.tx, treedef, piece.stacked, layered=True),
            )
            for piece in plan.pieces
        ]

    def _run(self, plan, updaters, params, states, batch):
        raise NotImplementedError


class FusedStep(Step):
    """See `fused_step`."""

    def _run(self, plan, updaters, params, states, batch):
        leaves, treedef = jax.tree.flatten(params)
        leaves, states, loss, aux = walk(plan, updaters, leaves, states, jax.tree.leaves(batch))
        params = jax.tree.unflatten(treedef, leaves)
        return params, states, loss, jax.tree.unflatten(plan.aux_tree, aux)


class ReferenceStep(Step):
    """See `reference_step`."""

    def _run(self, plan, updaters, params, states, batch):
        leaves, treedef = jax.tree.flatten(params)
        trainable = [i for i, is_trainable in enumerate(plan.trainable) if is_trainable]

        def loss_of(values):
            merged = list(leaves)
            for i, value in zip(trainable, values, strict=True):
                merged[i] = value
            result = self.loss_fn(jax.tree.unflatten(treedef, merged), batch)
            return result if self.has_aux else (result, None)

        grad = jax.value_and_grad(loss_of, has_aux=True)
        (loss, aux), grads = grad([leaves[i] for i in trainable])
        grads = dict(zip(trainable, grads, strict=True))
        new_leaves, new_states = list(leaves), []
        for pair, pair_state in zip(updaters, states, strict=True):
            new_pair = []
            for updater, state in zip(pair, pair_state, strict=True):
                ids = updater.indices
                new, state = updater.apply_stacked(
                    [grads[i] for i in ids], state, [leaves[i] for i in ids]
                )
                new_pair.append(state)
                for i, leaf in zip(ids, new, strict=True):
                    new_leaves[i] = leaf
            new_states.append(PieceState(*new_pair))
        return jax.tree.unflatten(treedef, new_leaves), new_states, loss, aux


def _init_state(params: Any, updaters: list[tuple[Updater, Updater]]) -> StepState:
    leaves = jax.tree.leaves(params)
    states = [
        PieceState(*(updater.init([leaves[i] for i in updater.indices]) for updater in pair))
        for pair in updaters
    ]
    return StepState(tuple(states))


def _check_state(state: Any, expected: StepState) -> None:
    """Raises ValueError unless `state` has the structure, shapes and dtypes that are expected."""
    fault = "is not of this loss, tx and tree of parameters"
    if jax.tree.structure(state) == jax.tree.structure(expected):
        leaves = jax.tree_util.tree_leaves_with_path(state)
        for (path, leaf), like in zip(leaves, jax.tree.leaves(expected), strict=True):
            found = jax.typeof(leaf)
            if (found.shape, found.dtype) != (like.shape, like.dtype):
                fault = (
                    f"has {found.dtype}{list(found.shape)} at {jax.tree_util.keystr(path)}, not "
                    f"{like.dtype}{list(like.shape)}"
                )
                break
        else:
            return
    raise ValueError(f"state {fault}: make it with step.init(params, batch)")


def fused_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Step:
    """Turns a loss into a training step that never holds the whole gradient.

    The loss is traced and cut at every `jax.lax.scan` that scans over parameters (`nn.scan`,
    `nnx.scan`), its layers. The forward pass keeps the input of each layer. The backward pass takes
    the layers from the last to the first: a layer is computed again, its gradient formed, `tx`
    applied and the layer's parameters written in place before the next gradient exists. Parameters
    outside the layers are updated as soon as their gradient is complete, those used in several
    places once, with the sum.

    Jit the step with parameters and state donated, or the in-place update becomes a copy::

        step = lomo_jax.fused_step(loss_fn, lomo_jax.adalomo(1e-3))
        state = step.init(params, batch)
        train = jax.jit(step, donate_argnums=(0, 1))
        params, state, out = train(params, state, batch)

    The result equals that of `reference_step` up to rounding. A stacked parameter [L, ...] is L
    parameters to `tx`: whatever it computes of a parameter, such as AdaLomo's root mean square, it
    computes of one layer. Its state has the layer axis in front of every array, counts too.
    Callbacks and prints inside layers happen twice: when a layer is computed, and when it is
    computed again.

    Beside parameters and state a step needs the layer inputs, and one layer's parameters, gradient
    and activations a few times over. A model without a layer scan has all its gradients in one
    piece; it depends on XLA how early each is used up.

    Args:
      loss_fn: `(params, batch) -> loss`, or `(loss, aux)` with `has_aux`. The loss is a scalar of
        floating point. A checkpoint around the layers or inside them is allowed and not needed.
        `params` is a pytree of arrays; leaves that are not of floating point stay as they are.
      tx: an optax transformation that updates each parameter from its own gradient, value and
        state. It sees trees with the paths of `params`, in which leaves of other pieces are
        `optax.MaskedNode`. One that draws random numbers from a key in its state, such as
        `optax.add_noise`, draws the same for every layer.
      has_aux: whether `loss_fn` returns something beside the loss.

    Returns:
      A `Step`: `init(params, batch)` makes the state, a call makes one update. New parameters have
      the dtypes of the old ones: update and parameter are added in float32 and rounded once.

    Raises (when the step is traced):
      TypeError: the loss is not a floating-point scalar.
      ValueError: the layers of a stacked parameter cannot be updated one by one (it reaches the
        scan through a cast or transpose, is used outside the scan too, or is scanned inside an
        operation that cannot be cut, such as `cond`); `tx` mixes parameters; the state does not
        fit.

    References:
      Lv et al., `Full Parameter Fine-tuning for Large Language Models with Limited Resources
      <https://arxiv.org/abs/2306.09782>`_, 2023
    """
    return FusedStep(loss_fn, tx, has_aux)


def reference_step(
    loss_fn: Callable[..., Any], tx: optax.GradientTransformation, *, has_aux: bool = False
) -> Step:
    """The plain computation that `fused_step` is measured against.

    Computes the whole gradient with `jax.value_and_grad`, then applies `tx`, to stacked parameters
    under `jax.vmap` over their layers. Arguments, state and results are those of `fused_step`.
    """
    return ReferenceStep(loss_fn, tx, has_aux)
