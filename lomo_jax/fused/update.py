"""Applies an optax transformation to some of the parameters, each layer of a stack for itself."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused import jaxprs


class Updater:
    """`tx` for the leaves `indices` of a tree of parameters, which are stacks of layers if `layered`.

    `tx` sees trees with the structure and the paths of the whole tree, the other leaves `optax.MaskedNode`.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        treedef,
        indices: Sequence[int],
        *,
        layered: bool = False,
    ):
        self.tx, self.treedef, self.indices, self.layered = tx, treedef, indices, layered

    def init(self, leaves: Sequence[Any]) -> optax.OptState | None:
        """State for `leaves`, in the order of the indices, None for none; that of stacks has a layer axis 0."""
        if not self.indices:
            return None
        init = jax.vmap(self._init) if self.layered else self._init
        return init(leaves)

    def apply(self, grads, state, leaves) -> tuple[list[jax.Array], optax.OptState | None]:
        """One update of dense parameters or of one layer: new leaves, in their dtype, and new state."""
        if not self.indices:
            return [], state
        params = self._tree(leaves)
        updates, state = self.tx.update(self._tree(grads), state, params)
        return [_add(p, u) for p, u in zip(leaves, jax.tree.leaves(updates), strict=True)], state

    def apply_stack(self, grads, state, leaves):
        """`apply`, of all layers at once if these are stacks."""
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
    """Their sum, rounded once from at least float32 to the dtype of the parameter."""
    wide = jnp.promote_types(param.dtype, jnp.float32)
    return (param.astype(wide) + update.astype(wide)).astype(param.dtype)


def check_independent(tx: optax.GradientTransformation, params, trainable: Sequence[bool]) -> None:
    """Raises ValueError if `tx` updates one parameter from the gradient or value of another.

    Looks at what the results of `tx.update` depend on, through its state too, not at names.
    """
    leaves = jax.tree_util.tree_leaves_with_path(params)
    indices = [i for i, is_trainable in enumerate(trainable) if is_trainable]
    shapes = [jax.ShapeDtypeStruct(leaves[i][1].shape, leaves[i][1].dtype) for i in indices]
    updater = Updater(tx, jax.tree.structure(params), indices)
    state, state_def = jax.tree.flatten(jax.eval_shape(updater.init, shapes))
    closed = jax.make_jaxpr(
        lambda g, s, p: jax.tree.leaves(updater.apply(g, jax.tree.unflatten(state_def, s), p))
    )(shapes, state, shapes)
    n = len(indices)
    own = [1 << i for i in range(n)]
    state_labels = [0] * len(state)
    while True:  # what the state remembers of one step reaches the parameters in the next
        results = jaxprs.dependence(closed, own + state_labels + own)
        grown = [a | b for a, b in zip(state_labels, results[n:], strict=True)]
        if grown == state_labels:
            break
        state_labels = grown
    names = [jax.tree_util.keystr(leaves[i][0]) for i in indices]
    for i, label in enumerate(results[:n]):
        others = label & ~own[i]
        if others:
            other = names[others.bit_length() - 1]
            raise ValueError(
                f"tx updates parameter {names[i]} from {other}: a transformation that mixes parameters needs "
                "all their gradients at once; for clipping by global norm use clip_norm"
            )
