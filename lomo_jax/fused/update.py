"""Applies an optax transformation to some of the parameters, each layer of a stack for itself."""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused import jaxprs


class PieceState(NamedTuple):
    """State of `tx` for the parameters of one piece of the loss."""

    dense: Any  # of those that are not stacked; None if there are none
    layers: Any  # of the stacked ones, with a layer axis in front; None if there are none


class Updater:
    """`tx` for the leaves `indices` of a tree of parameters, stacks of layers if `layered`.

    `tx` sees trees with the structure and the paths of the whole tree, the other leaves masked by
    `optax.MaskedNode`.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        treedef: Any,
        indices: Sequence[int],
        *,
        layered: bool = False,
    ):
        self.tx, self.treedef, self.indices, self.layered = tx, treedef, indices, layered

    def init(self, leaves: Sequence[Any]) -> Any:
        """Returns the state for `leaves`, one for each index; None if there is none."""
        if not self.indices:
            return None
        return (jax.vmap(self._init) if self.layered else self._init)(leaves)

    def apply(
        self, grads: Sequence[jax.Array], state: Any, leaves: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], Any]:
        """Updates dense parameters, or one layer: returns leaves in their dtype, and the state."""
        if not self.indices:
            return [], state
        updates, state = self.tx.update(self._tree(grads), state, self._tree(leaves))
        # By index and not in the order of the tree: a scan may take its parameters in any order.
        updates = self.treedef.flatten_up_to(updates)
        pairs = zip(self.indices, leaves, strict=True)
        return [_add(leaf, updates[i]) for i, leaf in pairs], state

    def apply_stacked(
        self, grads: Sequence[jax.Array], state: Any, leaves: Sequence[jax.Array]
    ) -> tuple[list[jax.Array], Any]:
        """`apply`, to all layers at once if they are stacked."""
        apply = jax.vmap(self.apply) if self.layered and self.indices else self.apply
        return apply(grads, state, leaves)

    def _init(self, leaves):
        return self.tx.init(self._tree(leaves))

    def _tree(self, leaves):
        masked: list[Any] = [optax.MaskedNode()] * self.treedef.num_leaves
        for i, leaf in zip(self.indices, leaves, strict=True):
            masked[i] = leaf
        return jax.tree.unflatten(self.treedef, masked)


def _add(param: jax.Array, update: jax.Array) -> jax.Array:
    """Their sum in float32 or wider, rounded once, to the dtype of the parameter."""
    wide = param.dtype if param.dtype.itemsize > 4 else jnp.float32
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def check_independent(
    tx: optax.GradientTransformation,
    params: Any,
    trainable: Sequence[bool],
    stacked: Collection[int],
) -> None:
    """Raises ValueError if `tx` updates one parameter from the gradient or value of another.

    What counts is how the results of `tx.update` depend on its arguments, in the same step or
    through the state in a later one.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    indices = [i for i, is_trainable in enumerate(trainable) if is_trainable]
    names = [jax.tree_util.keystr(leaves[i][0]) for i in indices]
    # Of a stack tx sees one layer.
    shapes = [
        jax.ShapeDtypeStruct(leaves[i][1].shape[i in stacked :], leaves[i][1].dtype)
        for i in indices
    ]
    updater = Updater(tx, jax.tree.structure(params), indices)
    state, state_def = jax.tree.flatten(jax.eval_shape(updater.init, shapes))

    def update(grads, state, params):
        return jax.tree.leaves(updater.apply(grads, jax.tree.unflatten(state_def, state), params))

    closed = jax.make_jaxpr(update)(shapes, state, shapes)
    own = [1 << k for k in range(len(indices))]
    of_state = [0] * len(state)
    while True:
        results = jaxprs.dependence(closed, own + of_state + own)
        of_params, new = results[: len(own)], results[len(own) :]
        grown = [a | b for a, b in zip(of_state, new, strict=True)]
        if grown == of_state:
            break
        of_state = grown
    for name, label, mine in zip(names, of_params, own, strict=True):
        others = label & ~mine
        if others:
            raise ValueError(
                f"tx updates parameter {name} from {names[others.bit_length() - 1]}: a "
                "transformation that mixes parameters needs all their gradients at once, which the "
                "fused step never has; for clipping by global norm use clip_norm"
            )
