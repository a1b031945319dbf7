"""What a walk does with the gradients: measure them, or update parameters from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lomo_jax.fused.microbatches import widen
from lomo_jax.fused.update import Updater, layer_key


def prepare(grad: jax.Array, factor: jax.Array | None) -> jax.Array:
    """The gradient in float32 or wider, times `factor`."""
    grad = widen(grad)
    return grad if factor is None else grad * factor.astype(grad.dtype)


def sum_of_squares(grads: Sequence[jax.Array]) -> jax.Array:
    """Over all elements, float32 []."""
    squares = [jnp.sum(jnp.square(jnp.abs(g))).astype(jnp.float32) for g in grads]
    return sum(squares, start=jnp.float32(0.0))


def all_finite(grads: Sequence[jax.Array]) -> jax.Array:
    """Whether all elements are finite, bool []."""
    return jnp.stack([jnp.isfinite(g).all() for g in grads]).all()


class Measure:
    """Sums the squares of all gradients.

    Args:
      params: leaves of the parameters.
      factor: what gradients are multiplied by, float32 [] or None.
    """

    def __init__(self, params: Sequence[jax.Array], factor: jax.Array | None):
        self.params, self.factor = params, factor
        self.total = jnp.float32(0.0)

    def dense(self, indices: Sequence[int], grads: Sequence[jax.Array]) -> None:
        del indices
        self.total += self._squares(grads)

    def start(self, indices: Sequence[int], first: int) -> jax.Array:
        del indices, first
        return self.total

    def layer(self, carry: jax.Array, indices: Sequence[int], i: jax.Array) -> list[jax.Array]:
        del carry
        return _read([self.params[index] for index in indices], i)

    def visit(self, carry, indices, i, following, grads):
        del indices, i, following
        return carry + self._squares(grads)

    def finish(self, carry: jax.Array, indices: Sequence[int]) -> None:
        del indices
        self.total = carry

    def _squares(self, grads):
        return sum_of_squares([prepare(g, self.factor) for g in grads])


class Update:
    """Updates parameters and their state.

    Args:
      updaters: by the index of the parameter.
      params: leaves of the parameters; replaced one by one in `self.params`.
      states: by the index of the parameter; likewise.
      factor: what gradients are multiplied by, float32 [] or None.
      key: for stochastic rounding, or None.
      finite: bool [], nothing is updated where it is False; None updates always.
      watch: whether the first gradient that is not finite turns `self.finite` False.
    """

    def __init__(
        self,
        updaters: Mapping[int, Updater],
        params: Sequence[jax.Array],
        states: Mapping[int, Any],
        *,
        factor: jax.Array | None = None,
        key: jax.Array | None = None,
        finite: jax.Array | None = None,
        watch: bool = False,
    ):
        self.updaters, self.params, self.states = updaters, list(params), dict(states)
        self.factor, self.key, self.finite, self.watch = factor, key, finite, watch

    def dense(self, indices: Sequence[int], grads: Sequence[jax.Array]) -> None:
        leaves, states, self.finite = self._apply(
            indices,
            grads,
            [self.states[i] for i in indices],
            [self.params[i] for i in indices],
            self.finite,
        )
        self._store(indices, leaves, states)

    def start(self, indices: Sequence[int], first: int) -> Any:
        stacks = [self.params[i] for i in indices], [self.states[i] for i in indices]
        return stacks, _read(stacks, first), self.finite

    def layer(self, carry: Any, indices: Sequence[int], i: jax.Array) -> list[jax.Array]:
        del indices, i
        _, (leaves, _), _ = carry
        return leaves

    def visit(self, carry, indices, i, following, grads):
        stacks, (leaves, states), finite = carry
        leaves, states, finite = self._apply(indices, grads, states, leaves, finite, i)
        stacks = _write(stacks, (leaves, states), i)
        # The next layer is read here, after the write. Read at the top of the loop, the old layer
        # would outlive the write, and XLA would copy the whole stack to keep it.
        return stacks, _read(stacks, following), finite

    def finish(self, carry: Any, indices: Sequence[int]) -> None:
        (leaves, states), _, self.finite = carry
        self._store(indices, leaves, states)

    def _apply(self, indices, grads, states, leaves, finite, i=None):
        grads = [prepare(g, self.factor) for g in grads]
        if self.watch and grads:
            finite &= all_finite(grads)
        keep = None if finite is None else ~finite
        new_leaves, new_states = [], []
        for index, grad, state, leaf in zip(indices, grads, states, leaves, strict=True):
            updater = self.updaters[index]
            key = layer_key(self.key, updater, i)
            leaf, state = updater.apply(grad, state, leaf, key, keep)
            new_leaves.append(leaf)
            new_states.append(state)
        return new_leaves, new_states, finite

    def _store(self, indices, leaves, states):
        for i, leaf, state in zip(indices, leaves, states, strict=True):
            self.params[i], self.states[i] = leaf, state


def _read(stacks: Any, i: Any) -> Any:
    return jax.tree.map(lambda x: jax.lax.dynamic_index_in_dim(x, i, keepdims=False), stacks)


def _write(stacks: Any, layer: Any, i: Any) -> Any:
    write = jax.lax.dynamic_update_index_in_dim
    return jax.tree.map(lambda x, new: write(x, new, i, axis=0), stacks, layer)
