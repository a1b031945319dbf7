"""What the step adds to an optax transformation: the loss, Auto axes for products, a warning."""

import collections
import functools
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import optax
from jax.typing import ArrayLike

from lomo_jax.fused import arrays, jaxprs
from lomo_jax.fused.arrays import Params, PyTree, widen

# Products of matrices, and what may contain them.
_PRODUCTS = frozenset(("dot_general", "cond", "scan", "while"))


def with_value(tx: optax.GradientTransformation, value: ArrayLike) -> optax.GradientTransformation:
    """Returns `tx` with the extra argument ``value`` of its update, the loss, float32 []."""
    tx = optax.with_extra_args_support(tx)
    return optax.GradientTransformation(tx.init, functools.partial(tx.update, value=value))


def call(
    tx: optax.GradientTransformation, grads: PyTree, state: PyTree, params: PyTree
) -> tuple[PyTree, PyTree]:
    """Returns ``tx.update(grads, state, params)``, under a mesh of Explicit axes too.

    Optax is written without shardings. Under Explicit axes a product over a sharded dimension, as
    in muon, is an error, so a transformation with products computes with Auto axes.
    """
    if not jax.sharding.get_abstract_mesh().empty:
        args = grads, state, params
        # Without shardings, with which tracing could be that error.
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), args)
        if not _PRODUCTS.isdisjoint(_operations(tx.update, *shapes)):
            specs = jax.tree.map(arrays.partition_spec, (grads, state))
            update: Any = jax.sharding.auto_axes(tx.update, out_sharding=specs)
            return update(*args)
    return tx.update(grads, state, params)


def rule_by_ndim(
    tx: optax.GradientTransformation, params: Params, layer_axes: Mapping[int, Any]
) -> str | None:
    """Returns a warning if `tx` has another rule for a stack than for one of its layers.

    Statistics that are factored in another way are no other rule.

    Args:
      tx: a transformation.
      params: pytree of arrays or `jax.ShapeDtypeStruct`.
      layer_axes: of the parameters that are stacks, by index.
    """
    leaves, treedef = jax.tree.flatten(params)
    names = arrays.names(params)
    found = []
    for i, axes in layer_axes.items():
        whole = jax.ShapeDtypeStruct(leaves[i].shape, leaves[i].dtype)
        kept = np.delete(whole.shape, np.atleast_1d(axes))
        layer = jax.ShapeDtypeStruct(tuple(map(int, kept)), whole.dtype)

        def tree(x, i=i):
            others = [optax.MaskedNode()] * treedef.num_leaves
            return jax.tree.unflatten(treedef, [*others[:i], x, *others[i + 1 :]])

        try:
            differs = _differ(with_value(tx, np.float32(0)), tree, whole, layer)
        except Exception:  # a transformation that takes no stack at all has no rule for it
            continue
        if differs:
            found.append(names[i])
    if not found:
        return None
    return (
        f"tx has another rule for {', '.join(found)} as a whole than for one layer, and it sees "
        "one layer at a time: a rule by ndim, such as a mask of the weight decay or muon's of "
        "matrices, sees no layer axis; a mask or label by path is the same for both"
    )


def _differ(tx: Any, tree: Any, whole: Any, layer: Any) -> bool:
    """Returns whether `tx` masks or updates two shapes of a parameter in different ways."""
    states = [jax.eval_shape(lambda x: tx.init(tree(x)), x) for x in (whole, layer)]
    if _masked_paths(states[0]) != _masked_paths(states[1]):
        return True
    if jax.tree.structure(states[0]) != jax.tree.structure(states[1]):
        return False
    pairs = zip(*map(jax.tree.leaves, states), strict=True)
    if any(
        a.shape != b.shape and (a.shape, b.shape) != (whole.shape, layer.shape) for a, b in pairs
    ):
        return False
    operations = [
        _operations(
            lambda g, s, x: tx.update(tree(g), s, tree(x)), jax.eval_shape(widen, x), state, x
        )
        for x, state in zip((whole, layer), states, strict=True)
    ]
    return operations[0] != operations[1]


def _masked_paths(state: PyTree) -> set[str]:
    leaves = jax.tree_util.tree_leaves_with_path(
        state, is_leaf=lambda x: isinstance(x, optax.MaskedNode)
    )
    return {jax.tree_util.keystr(p) for p, x in leaves if isinstance(x, optax.MaskedNode)}


def _operations(update: Any, *args: PyTree) -> collections.Counter[str]:
    """Counts the operations of an update, by name; not those that only fit shapes together."""
    closed = jax.make_jaxpr(update)(*args)
    inputs = list(jaxprs.open_jaxpr(closed).invars)
    eqns, _ = jaxprs.inline(closed, inputs, jaxprs.is_call)
    fitting = ("broadcast_in_dim", "reshape", "squeeze")
    names = [eqn.primitive.name for eqn in eqns]
    return collections.Counter(name for name in names if name not in fitting)
