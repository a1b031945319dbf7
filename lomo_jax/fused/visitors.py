"""What a walk does with the gradients: measure them, or update parameters from them."""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from lomo_jax.fused import offload
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

    together = False

    def __init__(self, params: Sequence[jax.Array], factor: jax.Array | None):
        self.params, self.factor = params, factor
        self.total = jnp.float32(0.0)

    def dense(self, indices: Sequence[int], grads: Sequence[jax.Array]) -> None:
        del indices
        self.total += self._squares(grads)

    def start(self, indices: Sequence[int], first: int, ahead: bool) -> Any:
        del indices, first, ahead  # it changes nothing that it reads
        return self.total

    def layer(self, carry: jax.Array, indices: Sequence[int], k: int, i: jax.Array) -> jax.Array:
        del carry
        return _read(self.params[indices[k]], i)

    def visit(self, carry, indices, ks, i, grads):
        del indices, ks, i
        return carry + self._squares(grads)

    def advance(self, carry: jax.Array, following: jax.Array) -> jax.Array:
        del following
        return carry

    def finish(self, carry: jax.Array) -> jax.Array:
        return carry

    def store(self, result: jax.Array, indices: Sequence[int]) -> None:
        del indices
        self.total = result

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

    @jax.named_scope("update")  # so that a profile tells it from the gradient
    def dense(self, indices: Sequence[int], grads: Sequence[jax.Array]) -> None:
        olds = [(self.params[i], self.states[i]) for i in indices]
        news, self.finite = self._apply(indices, grads, offload.to_device(olds), self.finite)
        self._store(indices, offload.beside(news, olds))

    @property
    def together(self) -> bool:
        """One gradient of a layer that is not finite stops the update of the whole layer."""
        return self.watch

    def start(self, indices: Sequence[int], first: int, ahead: bool) -> Any:
        stacks = [(self.params[i], self.states[i]) for i in indices]
        return stacks, _read(stacks, first) if ahead else None, self.finite

    def layer(self, carry: Any, indices: Sequence[int], k: int, i: jax.Array) -> jax.Array:
        del indices
        stacks, layers, _ = carry
        return _read(stacks[k][0], i) if layers is None else layers[k][0]

    @jax.named_scope("update")
    def visit(self, carry, indices, ks, i, grads):
        stacks, layers, finite = carry
        olds = [_read(stacks[k], i) if layers is None else layers[k] for k in ks]
        news, finite = self._apply([indices[k] for k in ks], grads, olds, finite, i)
        stacks = list(stacks)
        for k, new in zip(ks, news, strict=True):
            stacks[k] = _write(stacks[k], new, i)
        return stacks, layers, finite

    def advance(self, carry: Any, following: jax.Array) -> Any:
        stacks, layers, finite = carry
        return stacks, layers if layers is None else _read(stacks, following), finite

    def finish(self, carry: Any) -> Any:
        stacks, _, finite = carry
        return stacks, finite

    def store(self, result: Any, indices: Sequence[int]) -> None:
        news, self.finite = result
        self._store(indices, news)

    def _apply(self, indices, grads, olds, finite, i=None):
        """Returns new pairs of parameter and state for the `olds`, and whether all was finite."""
        grads = [prepare(g, self.factor) for g in grads]
        if self.watch and grads:
            finite &= all_finite(grads)
        keep = None if finite is None else ~finite
        news = []
        for index, grad, (leaf, state) in zip(indices, grads, olds, strict=True):
            updater = self.updaters[index]
            key = layer_key(self.key, updater, i)
            news.append(updater.apply(grad, state, leaf, key, keep))
        return news, finite

    def _store(self, indices, news):
        for i, (leaf, state) in zip(indices, news, strict=True):
            self.params[i], self.states[i] = leaf, state


def _read(stacks: Any, i: Any) -> Any:
    """Layer i, on the device."""
    read = jax.lax.dynamic_index_in_dim
    return offload.to_device(jax.tree.map(lambda x: read(x, i, keepdims=False), stacks))


def _write(stacks: Any, layer: Any, i: Any) -> Any:
    write = jax.lax.dynamic_update_index_in_dim
    layer = offload.beside(layer, stacks)
    return jax.tree.map(lambda x, new: write(x, new, i, axis=0), stacks, layer)
