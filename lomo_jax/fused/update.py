"""Uses gradients: applies an optax transformation to parameters and layers, or sums squares."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lomo_jax.fused import arrays, jaxprs
from lomo_jax.fused.arrays import Params, Position, PyTree, match_memory, reshard_like, widen
from lomo_jax.fused.trace import Stack
from lomo_jax.fused.tx import call, with_value


class Updater:
    """Updates the leaf `index` of a tree of parameters, a stack of layers if it has `layer_axes`.

    `tx` sees trees with the structure and the paths of the whole tree, the other leaves masked by
    `optax.MaskedNode`. Of a stack it sees one layer.
    """

    def __init__(
        self,
        tx: optax.GradientTransformation,
        treedef: Any,
        index: int,
        layer_axes: tuple[int, ...] = (),
    ):
        self.tx, self.treedef, self.index, self.layer_axes = tx, treedef, index, layer_axes

    def with_value(self, loss: jax.Array) -> "Updater":
        """Returns an updater that passes the loss, float32 [], to `tx` as its ``value``."""
        return Updater(with_value(self.tx, loss), self.treedef, self.index, self.layer_axes)

    def init(self, leaf: jax.Array) -> PyTree:
        """Returns the optimizer's first state; for a stack with the layer axes in front."""

        def init(leaf):
            state = self.tx.init(_masked(self.treedef, {self.index: leaf}))
            # A statistic with the shape of the parameter is sharded like it.
            shard = lambda x: reshard_like(x, leaf) if jnp.shape(x) == leaf.shape else x  # noqa: E731
            return jax.tree.map(shard, state)

        for axis in reversed(self._vmap_axes):
            init = jax.vmap(init, axis)
        return init(leaf)

    @property
    def _vmap_axes(self) -> list[int]:
        """The layer axes, each without those before it."""
        axes = self.layer_axes
        return [axis - sum(a < axis for a in axes[:k]) for k, axis in enumerate(axes)]

    def apply(
        self,
        grad: jax.Array,
        state: PyTree,
        leaf: jax.Array,
        key: jax.Array | None = None,
        skip_update: jax.Array | None = None,
    ) -> tuple[jax.Array, PyTree]:
        """Updates the parameter, or one layer of it.

        Args:
          grad: the gradient, float32 or wider.
          state: the optimizer's state for this parameter or layer.
          leaf: the parameter or layer. It is added to its update in float32 or wider.
          key: for stochastic rounding of the sum; None rounds to nearest.
          skip_update: bool [], whether to return `leaf` and `state` unchanged; None for never.

        Returns:
          The new leaf and the new state, with dtypes and shardings as before.
        """
        trees = [_masked(self.treedef, {self.index: x}) for x in (grad, leaf)]
        updates, new_state = call(self.tx, trees[0], state, trees[1])
        wide = widen(leaf)
        wide = wide + self.treedef.flatten_up_to(updates)[self.index].astype(wide.dtype)
        if key is not None and must_round(leaf.dtype):
            new = stochastic_round(wide, leaf.dtype, key)
        else:
            new = wide.astype(leaf.dtype)

        def settle(new, old):
            new = reshard_like(new if new.dtype == old.dtype else new.astype(old.dtype), old)
            return new if skip_update is None else jnp.where(skip_update, old, new)

        return jax.tree.map(settle, (new, new_state), (leaf, state))

    def apply_whole(
        self,
        grad: jax.Array,
        state: PyTree,
        leaf: jax.Array,
        key: jax.Array | None = None,
        skip_update: jax.Array | None = None,
        start: int = 0,
    ) -> tuple[jax.Array, PyTree]:
        """Updates the parameter, all its layers at once, or those from `start` on.

        Args:
          grad: see `apply`; of a stack with the layer axes where the parameter has them.
          state: see `apply`; of a stack with the layer axes in front.
          leaf: see `apply`.
          key: of the step.
          skip_update: bool [], or [L] for each layer of a stack with one layer axis.
          start: the index of the first layer of `leaf`, in a stack with one layer axis.
        """
        each = skip_update is not None and skip_update.ndim > 0

        def apply(grad, state, leaf, skip_update, *position):
            return self.apply(grad, state, leaf, self.key(key, position), skip_update)

        indices = [start + jnp.arange(leaf.shape[axis]) for axis in self.layer_axes]
        for k, axis in reversed(list(enumerate(self._vmap_axes))):
            counted = [0 if n == k else None for n in range(len(indices))]
            in_axes = (axis, 0, axis, 0 if each else None, *counted)
            apply = jax.vmap(apply, in_axes, (axis, 0))
        return apply(grad, state, leaf, skip_update, *indices)

    def key(self, key: jax.Array | None, position: Sequence[Any] = ()) -> jax.Array | None:
        """Returns the key for this parameter, or for one layer of it, given the key of the step."""
        for i in (self.index, *position):
            key = None if key is None else jax.random.fold_in(key, i)
        return key


class Layer(NamedTuple):
    """The layer of an outer scan in which gradients are used."""

    stacks: dict[int, Stack]  # parameters of which the layers are layers of this layer
    indices: tuple[jax.Array, ...]  # of this layer, see `Position.of`

    def at(self, i: Any) -> tuple[Any, ...]:
        """Returns the indices of layer i of this layer."""
        return *self.indices, i

    def enter(self, stacks: Sequence[Stack], i: jax.Array) -> "Layer":
        """Returns layer i of this layer."""
        return Layer({stack.index: stack for stack in stacks}, self.at(i))


class Update:
    """A `backward.Consumer` that updates the parameters and the optimizer's state.

    Args:
      updaters: by the index of the parameter.
      params: leaves of the parameters. `self.params` has the new ones after the backward pass.
      states: the optimizer's states by the index of the parameter. `self.states` has the new ones
        after the backward pass.
      factor: multiplies gradients before the update, float32 []; None for 1.
      key: for stochastic rounding, or None.
      finite: bool [], False skips every update; None never skips.
      stop_at_overflow: whether the first gradient that is not finite sets `self.finite` to False
        and so skips the rest of the updates.
    """

    writes = True

    def __init__(
        self,
        updaters: Mapping[int, Updater],
        params: Sequence[jax.Array],
        states: Mapping[int, PyTree],
        *,
        factor: jax.Array | None = None,
        key: jax.Array | None = None,
        finite: jax.Array | None = None,
        stop_at_overflow: bool = False,
    ):
        self.updaters, self.params, self.states = updaters, list(params), dict(states)
        self.factor, self.key, self.finite = factor, key, finite
        self.stop_at_overflow = stop_at_overflow
        self.layer = Layer({}, ())

    @jax.named_scope("update")  # separates it from the gradient in a profile
    def use_dense(
        self, indices: Sequence[int], grads: Sequence[jax.Array], others: dict[Any, jax.Array]
    ) -> dict[Any, jax.Array]:
        olds = [(self.params[i], self.states[i]) for i in indices]
        stacks = [self.layer.stacks.get(i) for i in indices]
        at = self.layer.indices
        read = [
            arrays.to_device(pair) if stack is None else _read(pair, stack, at)
            for pair, stack in zip(olds, stacks, strict=True)
        ]
        parameters = [stack or i for stack, i in zip(stacks, indices, strict=True)]
        news, self.finite = self._apply(parameters, grads, read, self.finite, at)
        news = [
            match_memory(new, old) if stack is None else _write(old, new, stack, at)
            for new, old, stack in zip(news, olds, stacks, strict=True)
        ]
        # XLA may keep old, gradient and new ones until the end of the step.
        keys = list(others)
        news, values = jax.lax.optimization_barrier((news, list(others.values())))
        others = dict(zip(keys, values, strict=True))
        self._store(indices, news)
        return others

    @property
    def needs_whole_layer(self) -> bool:
        # An overflow in any gradient of a layer skips the update of the whole layer.
        return self.stop_at_overflow

    def states_on_host(self, stacks: Sequence[Stack]) -> list[int]:
        states = [jax.tree.leaves(self.states[stack.index]) for stack in stacks]
        return [k for k, leaves in enumerate(states) if any(map(arrays.is_on_host, leaves))]

    def init_carry(self, stacks: Sequence[Stack]) -> PyTree:
        pairs = [(self.params[stack.index], self.states[stack.index]) for stack in stacks]
        return pairs, self.finite

    def read_layer(self, carry: PyTree, stacks: Sequence[Stack], k: int, i: jax.Array) -> jax.Array:
        pairs, _ = carry
        return arrays.read_layer(pairs[k][0], stacks[k].places, self.layer.at(i))

    def read_state(self, carry: PyTree, stacks: Sequence[Stack], k: int, i: jax.Array) -> PyTree:
        pairs, _ = carry
        position = _position(pairs[k][0], stacks[k], self.layer.at(i))
        in_state = [arrays.Place()] * len(position)
        return jax.tree.map(lambda x: arrays.read_layer(x, in_state, position), pairs[k][1])

    @jax.named_scope("update")
    def use_layer(
        self,
        carry: PyTree,
        stacks: Sequence[Stack],
        ks: Sequence[int],
        i: jax.Array,
        grads: Sequence[jax.Array],
        params: Mapping[int, jax.Array],
        states: Mapping[int, PyTree],
    ) -> tuple[PyTree, PyTree]:
        pairs, finite = carry
        olds = [
            (
                params[k] if k in params else self.read_layer(carry, stacks, k, i),
                states[k] if k in states else self.read_state(carry, stacks, k, i),
            )
            for k in ks
        ]
        at = self.layer.at(i)
        news, finite = self._apply([stacks[k] for k in ks], grads, olds, finite, at)
        return (pairs, finite), news

    @jax.named_scope("update")
    def write_layer(
        self, carry: PyTree, stacks: Sequence[Stack], ks: Sequence[int], i: jax.Array, news: PyTree
    ) -> PyTree:
        pairs, finite = carry
        pairs = list(pairs)
        for k, new in zip(ks, news, strict=True):
            pairs[k] = _write(pairs[k], new, stacks[k], self.layer.at(i))
        return pairs, finite

    def store(self, carry: PyTree, stacks: Sequence[Stack]) -> None:
        news, self.finite = carry
        self._store([stack.index for stack in stacks], news)

    def enter(self, carry: PyTree, stacks: Sequence[Stack], i: jax.Array) -> "Update":
        inner = copy.copy(self)
        inner.params, inner.states = list(self.params), dict(self.states)
        inner.layer = self.layer.enter(stacks, i)
        inner.store(carry, stacks)
        return inner

    def leave(self, inner: "Update", stacks: Sequence[Stack]) -> PyTree:
        pairs = [(inner.params[stack.index], inner.states[stack.index]) for stack in stacks]
        return pairs, inner.finite

    def _apply(
        self,
        parameters: Sequence[int | Stack],
        grads: Sequence[jax.Array],
        olds: Sequence[tuple[jax.Array, PyTree]],
        finite: jax.Array | None,
        at: Sequence[jax.Array],
    ) -> tuple[list[tuple[jax.Array, PyTree]], jax.Array | None]:
        """Returns new pairs (parameter, state) for `olds`, and whether all was finite so far.

        Args:
          parameters: indices of whole parameters, or stacks of which one layer is updated.
          grads: their gradients.
          olds: pairs (parameter, state), or those of the layer.
          finite: whether all was finite before, or None.
          at: the layer, see `Position.of`.
        """
        grads = [scale_gradient(g, self.factor) for g in grads]
        if self.stop_at_overflow and grads:
            finite = all_finite(grads) if finite is None else finite & all_finite(grads)
        skip_update = None if finite is None else ~finite
        news = []
        for parameter, grad, (leaf, state) in zip(parameters, grads, olds, strict=True):
            if isinstance(parameter, Stack):
                updater = self.updaters[parameter.index]
                key = updater.key(self.key, _position(self.params[updater.index], parameter, at))
                new = updater.apply(grad, state, leaf, key, skip_update)
            else:
                new = self.updaters[parameter].apply_whole(grad, state, leaf, self.key, skip_update)
            news.append(new)
        return news, finite

    def _store(self, indices: Sequence[int], news: Sequence[tuple[jax.Array, PyTree]]) -> None:
        for i, (leaf, state) in zip(indices, news, strict=True):
            self.params[i], self.states[i] = leaf, state


class SumOfSquares:
    """A `backward.Consumer` that sums the squares of all gradients, and changes nothing.

    Args:
      params: leaves of the parameters.
      factor: multiplies gradients before, float32 []; None for 1.
    """

    writes, needs_whole_layer = False, False

    def __init__(self, params: Sequence[jax.Array], factor: jax.Array | None):
        self.params, self.factor = params, factor
        self.total = jnp.float32(0.0)
        self.layer = Layer({}, ())

    def use_dense(
        self, indices: Sequence[int], grads: Sequence[jax.Array], others: dict[Any, jax.Array]
    ) -> dict[Any, jax.Array]:
        del indices
        self.total += self._of(grads)
        return others

    def states_on_host(self, stacks: Sequence[Stack]) -> list[int]:
        del stacks
        return []

    def init_carry(self, stacks: Sequence[Stack]) -> PyTree:
        return [None] * len(stacks), self.total

    def read_layer(self, carry: PyTree, stacks: Sequence[Stack], k: int, i: jax.Array) -> jax.Array:
        del carry
        return arrays.read_layer(self.params[stacks[k].index], stacks[k].places, self.layer.at(i))

    def read_state(self, carry: PyTree, stacks: Sequence[Stack], k: int, i: jax.Array) -> None:
        del carry, stacks, k, i

    def use_layer(
        self,
        carry: PyTree,
        stacks: Sequence[Stack],
        ks: Sequence[int],
        i: jax.Array,
        grads: Sequence[jax.Array],
        params: Mapping[int, jax.Array],
        states: Mapping[int, PyTree],
    ) -> tuple[PyTree, None]:
        del stacks, ks, i, params, states
        nothing, total = carry
        return (nothing, total + self._of(grads)), None

    def write_layer(
        self, carry: PyTree, stacks: Sequence[Stack], ks: Sequence[int], i: jax.Array, news: PyTree
    ) -> PyTree:
        del stacks, ks, i, news
        return carry

    def store(self, carry: PyTree, stacks: Sequence[Stack]) -> None:
        del stacks
        _, self.total = carry

    def enter(self, carry: PyTree, stacks: Sequence[Stack], i: jax.Array) -> "SumOfSquares":
        inner = copy.copy(self)
        inner.store(carry, stacks)
        inner.layer = self.layer.enter(stacks, i)
        return inner

    def leave(self, inner: "SumOfSquares", stacks: Sequence[Stack]) -> PyTree:
        return [None] * len(stacks), inner.total

    def _of(self, grads: Sequence[jax.Array]) -> jax.Array:
        return sum_of_squares([scale_gradient(g, self.factor) for g in grads])


def scale_gradient(grad: jax.Array, factor: jax.Array | None) -> jax.Array:
    """Returns the gradient in float32 or wider, times `factor`."""
    grad = widen(grad)
    return grad if factor is None else grad * factor.astype(grad.dtype)


def sum_of_squares(grads: Sequence[jax.Array]) -> jax.Array:
    """Sums the squares of all elements, float32 []."""
    squares = [jnp.sum(jnp.square(jnp.abs(g))).astype(jnp.float32) for g in grads]
    return sum(squares, start=jnp.float32(0.0))


def all_finite(grads: Sequence[jax.Array]) -> jax.Array:
    """Returns whether all elements are finite, bool []."""
    return jnp.stack([jnp.isfinite(g).all() for g in grads]).all()


def _position(leaf: jax.Array, stack: Stack, at: Sequence[Any]) -> list[Any]:
    """Returns the index of a layer along each layer axis of its parameter."""
    starts, _, dropped = Position.of(leaf.shape, stack.places, at)
    axes = arrays.layer_axes(leaf.ndim, stack.places) or ()
    assert sorted(axes) == dropped, "a group of layers is updated as a layer"
    return [starts[axis] for axis in axes]


def _read(
    pair: tuple[jax.Array, PyTree], stack: Stack, at: Sequence[Any]
) -> tuple[jax.Array, PyTree]:
    """Returns a layer of a parameter and of its state, on the device."""
    leaf, state = pair
    position = _position(leaf, stack, at)
    in_state = [arrays.Place()] * len(position)
    layers = jax.tree.map(lambda x: arrays.read_layer(x, in_state, position), state)
    return arrays.read_layer(leaf, stack.places, at), layers


def _write(
    pair: tuple[jax.Array, PyTree],
    layer: tuple[jax.Array, PyTree],
    stack: Stack,
    at: Sequence[Any],
) -> tuple[jax.Array, PyTree]:
    """Writes a layer of a parameter and of its state, in the memory that they are in."""
    (leaf, state), (new, new_state) = pair, match_memory(layer, pair)
    position = _position(leaf, stack, at)
    in_state = [arrays.Place()] * len(position)
    write = lambda x, new: arrays.write_layer(x, new, in_state, position)  # noqa: E731
    return arrays.write_layer(leaf, new, stack.places, at), jax.tree.map(write, state, new_state)


def _masked(treedef: Any, leaves: Mapping[int, Any]) -> PyTree:
    every = [leaves.get(i, optax.MaskedNode()) for i in range(treedef.num_leaves)]
    return jax.tree.unflatten(treedef, every)


def check_independent(
    tx: optax.GradientTransformation,
    params: Params,
    trainable: Sequence[bool],
    layer_axes: Mapping[int, tuple[int, ...]],
) -> None:
    """Raises ValueError if `tx` updates one parameter from the gradient or value of another.

    The check looks at how the results of `tx.update` depend on its arguments, in the same step or,
    through the state, in a later one.
    """
    leaves, treedef = jax.tree.flatten(params)
    indices = [i for i, is_trainable in enumerate(trainable) if is_trainable]
    # tx sees one layer of a stack, and gradients in float32.
    shapes = [
        jax.ShapeDtypeStruct(_layer_shape(leaves[i], layer_axes.get(i, ())), leaves[i].dtype)
        for i in indices
    ]
    grads = [jax.eval_shape(widen, x) for x in shapes]

    def tree(values):
        return _masked(treedef, dict(zip(indices, values, strict=True)))

    first_state = jax.eval_shape(lambda x: tx.init(tree(x)), shapes)
    state, state_def = jax.tree.flatten(first_state)
    tx = with_value(tx, np.float32(0))

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
    names = arrays.names(params)
    for i, label, mine in zip(indices, of_params, own, strict=True):
        others = label & ~mine
        if others:
            other = names[indices[others.bit_length() - 1]]
            raise ValueError(
                f"tx updates parameter {names[i]} from {other}: a transformation that mixes "
                "parameters needs all their gradients at once, and the fused step never has them; "
                + _instead_of_mixing(first_state)
            )


def _instead_of_mixing(state: PyTree) -> str:
    """Returns what to do in place of a transformation that mixes parameters."""
    is_of_finite = lambda x: isinstance(x, optax.ApplyIfFiniteState)  # noqa: E731
    if any(map(is_of_finite, jax.tree.leaves(state, is_leaf=is_of_finite))):
        return (
            "in place of apply_if_finite use loss_scale=DynamicLossScale(), which skips steps that "
            "are not finite, or look at StepOutput.finite"
        )
    return "to clip by the global norm use clip_norm"


def _layer_shape(x: Any, axes: Sequence[int]) -> tuple[int, ...]:
    return tuple(size for axis, size in enumerate(x.shape) if axis not in axes)


def must_round(dtype: jax.typing.DTypeLike) -> bool:
    """Returns whether `dtype` has less precision than float32."""
    return jnp.finfo(dtype).nmant < jnp.finfo(jnp.float32).nmant


def stochastic_round(x: jax.Array, dtype: jax.typing.DTypeLike, key: jax.Array) -> jax.Array:
    """Rounds up or down at random, so that the mean of the result is `x`.

    The probability of each neighbour in `dtype` is proportional to the distance from the other one;
    numbers that `dtype` can represent do not change. Two exceptions: below the normal range of
    float16 the mean differs from `x` by up to ``2**-13`` of the distance between the neighbours,
    and bfloat16 numbers below ``2**-119`` are rounded to nearest, since float32 cannot represent
    that distance.

    Args:
      x: float32 [...].
      dtype: bfloat16, float16 or another dtype with less precision than float32.
      key: a key of `jax.random`.

    Returns:
      `dtype` [...].

    References:
      Gupta et al., `Deep Learning with Limited Numerical Precision
      <https://arxiv.org/abs/1502.02551>`_, 2015
    """
    info, wide = jnp.finfo(dtype), jnp.finfo(jnp.float32)
    exponent_bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0x7F800000)
    power = jax.lax.bitcast_convert_type(exponent_bits, jnp.float32)  # of two, at most |x|
    # x is divided by powers of two, and the quotient has no more bits than float32: both are exact.
    spacing = jnp.maximum(power * jnp.float32(info.eps), jnp.float32(info.smallest_subnormal))
    # As many random bits as are dropped: with one more, their sum with x would be rounded.
    dropped = wide.nmant - info.nmant
    bits = jax.random.bits(key, x.shape, jnp.uint16, out_sharding=arrays.explicit_sharding(x))
    bits >>= 16 - dropped
    threshold = bits.astype(jnp.float32) * jnp.float32(2.0**-dropped)
    rounded = jnp.floor(x / spacing + threshold) * spacing
    is_exact = jnp.isfinite(x) & (spacing >= wide.tiny)
    return jnp.where(is_exact, rounded, x).astype(dtype)
