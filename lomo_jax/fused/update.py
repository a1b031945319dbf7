"""Applies an optax transformation to one parameter, a layer of it at a time if it is stacked."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from lomo_jax.fused import jaxprs, parameters
from lomo_jax.fused.explicit import divided_as
from lomo_jax.fused.microbatches import widen
from lomo_jax.fused.rounding import rounds, stochastic_round


class Updater:
    """Updates the leaf `index` of a tree of parameters, a stack of layers if `stacked`.

    `tx` sees trees with the structure and the paths of the whole tree, the other leaves masked by
    `optax.MaskedNode`; of a stack it sees one layer.
    """

    def __init__(
        self, tx: optax.GradientTransformation, treedef: Any, index: int, *, stacked: bool
    ):
        self.tx, self.treedef, self.index, self.stacked = tx, treedef, index, stacked

    def init(self, leaf: Any) -> Any:
        """Returns the state; of a stack with a layer axis in front of every array."""

        def init(leaf):
            state = self.tx.init(_masked(self.treedef, {self.index: leaf}))
            # What is as large as the parameter is divided like it.
            alike = lambda x: divided_as(x, leaf) if jnp.shape(x) == leaf.shape else x  # noqa: E731
            return jax.tree.map(alike, state)

        return (jax.vmap(init) if self.stacked else init)(leaf)

    def apply(
        self,
        grad: jax.Array,
        state: Any,
        leaf: jax.Array,
        key: jax.Array | None = None,
        keep: jax.Array | None = None,
    ) -> tuple[jax.Array, Any]:
        """Updates the parameter, or one layer of it.

        Args:
          grad: the gradient, float32 or wider.
          state: that of this parameter or layer.
          leaf: parameter or layer. Parameter and update are added in float32 or wider.
          key: for stochastic rounding of the sum; None rounds to nearest.
          keep: bool [], True leaves everything as it is; None updates.

        Returns:
          The new leaf and the new state, in the dtypes that they had, divided as they were.
        """
        trees = [_masked(self.treedef, {self.index: x}) for x in (grad, leaf)]
        updates, new_state = self.tx.update(trees[0], state, trees[1])
        wide = widen(leaf)
        wide = wide + self.treedef.flatten_up_to(updates)[self.index].astype(wide.dtype)
        if key is not None and rounds(leaf.dtype):
            new = stochastic_round(wide, leaf.dtype, key)
        else:
            new = wide.astype(leaf.dtype)

        def settle(new, old):
            new = divided_as(new if new.dtype == old.dtype else new.astype(old.dtype), old)
            return new if keep is None else jnp.where(keep, old, new)

        return jax.tree.map(settle, (new, new_state), (leaf, state))


def layer_key(key: jax.Array | None, updater: Updater, i: Any = None) -> jax.Array | None:
    """The key for one parameter, or for layer i of it, from that of the step."""
    if key is None:
        return None
    key = jax.random.fold_in(key, updater.index)
    return key if i is None else jax.random.fold_in(key, i)


def _masked(treedef: Any, leaves: Mapping[int, Any]) -> Any:
    every = [leaves.get(i, optax.MaskedNode()) for i in range(treedef.num_leaves)]
    return jax.tree.unflatten(treedef, every)


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
    leaves, treedef = jax.tree.flatten(params)
    indices = [i for i, is_trainable in enumerate(trainable) if is_trainable]
    # Of a stack tx sees one layer, and gradients in float32.
    shapes = [
        jax.ShapeDtypeStruct(leaves[i].shape[i in stacked :], leaves[i].dtype) for i in indices
    ]
    grads = [jax.eval_shape(widen, x) for x in shapes]

    def tree(values):
        return _masked(treedef, dict(zip(indices, values, strict=True)))

    state, state_def = jax.tree.flatten(jax.eval_shape(lambda x: tx.init(tree(x)), shapes))

    def update(grads, state, params):
        state = jax.tree.unflatten(state_def, state)
        updates, state = tx.update(tree(grads), state, tree(params))
        updates = treedef.flatten_up_to(updates)
        return [updates[i] for i in indices], jax.tree.leaves(state)

    closed = jax.make_jaxpr(update)(grads, state, shapes)
    own = [1 << k for k in range(len(indices))]
    of_state = [0] * len(state)
    while True:
        results = jaxprs.dependence(closed, own + of_state + own)
        of_params, new = results[: len(own)], results[len(own) :]
        grown = [a | b for a, b in zip(of_state, new, strict=True)]
        if grown == of_state:
            break
        of_state = grown
    names = parameters.names(params)
    for i, label, mine in zip(indices, of_params, own, strict=True):
        others = label & ~mine
        if others:
            other = names[indices[others.bit_length() - 1]]
            raise ValueError(
                f"tx updates parameter {names[i]} from {other}: a "
                "transformation that mixes parameters needs all their gradients at once, which the "
                "fused step never has; for clipping by global norm use clip_norm"
            )
