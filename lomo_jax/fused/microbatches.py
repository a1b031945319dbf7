"""Splits a batch into microbatches, and runs pieces of the loss for each of them.

With more than one microbatch, a value that differs between them has an axis of length K in front:
it *varies*. With one, nothing varies, and the pieces run as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lomo_jax.fused import explicit


class WeightedLoss(NamedTuple):
    """A loss that says how much it counts beside those of other microbatches.

    Returned by a loss function in place of the scalar. `fused_step` minimises
    `sum(weight * loss) / sum(weight)` over the microbatches: with the mean over a microbatch's
    tokens and their number, that is the mean over all tokens of the batch, however unevenly padding
    or answers are spread. Where the weight is 0 loss and gradient must be finite: divide by
    `jnp.maximum(number, 1)`.
    """

    loss: jax.Array  # floating-point [], the mean over this microbatch
    weight: jax.Array  # number [], such as the count of tokens; does not depend on parameters


def split(batch: Any, microbatches: int) -> Any:
    """Splits the leading axis of every leaf: [B, ...] -> [K, B // K, ...], `batch[k::K]` at k.

    A scalar goes to every microbatch as it is. A key of `jax.random.key` is split, so that each
    microbatch draws other numbers.

    Raises:
      ValueError: a leaf cannot be split evenly, or none can be split.
    """
    if microbatches == 1:
        return batch

    def split_leaf(path, x):
        x = jnp.asarray(x)
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) and x.ndim == 0:
            return jax.random.split(x, microbatches)
        if x.ndim == 0:
            return jnp.broadcast_to(x, (microbatches,))
        if x.shape[0] % microbatches:
            raise ValueError(
                f"batch leaf {jax.tree_util.keystr(path) or 'batch'} has a leading axis of "
                f"{x.shape[0]}, which does not split into microbatches={microbatches}"
                + ("; is it a key? use jax.random.key" if x.dtype == jnp.uint32 else "")
            )
        # Every K-th row, not K blocks: a batch that is divided among devices stays where it is.
        shape = (x.shape[0] // microbatches, microbatches, *x.shape[1:])
        if (found := explicit.sharding(x)) is not None:
            parts = x.shape[0] // found.shard_shape(x.shape)[0]
            if shape[0] % parts:
                raise ValueError(
                    f"batch leaf {jax.tree_util.keystr(path) or 'batch'} has a leading axis of "
                    f"{x.shape[0]}; microbatches={microbatches} of {shape[0]} are not divided by "
                    f"the {parts} devices that it is divided over"
                )
        first, *others = explicit.spec(x)
        divided = explicit.sharding(x, PartitionSpec(first, None, *others))
        return jax.lax.reshape(x, shape, out_sharding=divided).swapaxes(0, 1)

    if all(jnp.ndim(x) == 0 for x in jax.tree.leaves(batch)):
        raise ValueError(
            f"no leaf of the batch has a leading axis to split into microbatches={microbatches}"
        )
    return jax.tree_util.tree_map_with_path(split_leaf, batch)


def shares(weights: jax.Array | None, microbatches: int, loss_dtype: Any) -> jax.Array:
    """How much of the loss each microbatch makes, [K], from its weight; even for None."""
    dtype = np.promote_types(loss_dtype, np.float32)
    if weights is None:
        return jnp.full(microbatches, 1 / microbatches, dtype)
    weights = jax.lax.stop_gradient(weights.astype(dtype))
    total = weights.sum()
    return weights / jnp.where(total == 0, 1, total)


class Piece(NamedTuple):
    """A function from some values to others, run for each microbatch where they vary."""

    function: Callable[..., Sequence[Any]]
    varies_in: list[bool]
    varies_out: list[bool]

    def run(self, args: Sequence[Any]) -> list[Any]:
        """Returns the outputs."""
        outputs: list[Any] = [None] * len(self.varies_out)
        if not all(self.varies_out):
            outputs = list(self.function(*self._of_one(args)))
        if any(self.varies_out):

            def one(varying):
                return pick(self.function(*merge(args, varying, self.varies_in)), self.varies_out)

            varying = jax.lax.map(one, pick(args, self.varies_in))
            outputs = merge(outputs, varying, self.varies_out)
        return outputs

    def vjp(
        self,
        args: Sequence[Any],
        diff_in: Sequence[bool],
        diff_out: Sequence[bool],
        cotangents: Sequence[jax.Array],
        *,
        run: bool = False,
        kept: tuple[Callable[..., Any], Sequence[Any], Sequence[bool]] | None = None,
    ) -> tuple[list[Any], list[jax.Array]]:
        """Pulls cotangents of the outputs in `diff_out` back to the inputs in `diff_in`.

        A varying input has a cotangent for each microbatch. That of one that does not vary is the
        sum over them, in float32 or wider.

        Args:
          args: the inputs.
          diff_in: which of them to differentiate with respect to.
          diff_out: which outputs have a cotangent.
          cotangents: those.
          run: whether the outputs are wanted too.
          kept: (backward, values, which of them vary) as of `remat.keep`, to start from what an
            earlier run kept; `run` must be False, and the outputs must all vary or none.

        Returns:
          The outputs, if they are wanted, and cotangents of the inputs in `diff_in`.
        """
        each, once = both(diff_out, self.varies_out), both(diff_out, invert(self.varies_out))
        own, shared = pick(self.varies_in, diff_in), pick(invert(self.varies_in), diff_in)
        diff_shared = both(diff_in, invert(self.varies_in))
        outputs: list[Any] = [None] * len(diff_out)
        grads: list[Any] = [None] * len(own)
        backward, values, values_vary = kept or (None, [], [])
        if backward and not any(each):
            return outputs, list(backward(args, values)(list(cotangents)))
        if any(once) or not any(each) or (run and not all(self.varies_out)):
            outputs, vjp = vjp_of(self.function, self._of_one(args), diff_shared, once)
            grads = merge(grads, vjp(pick(cotangents, pick(once, diff_out))), shared)
        if any(each):

            def one(totals, x):
                varying, varying_values, part_cotangents = x
                inputs = merge(args, varying, self.varies_in)
                if backward:
                    outputs = []
                    vjp = backward(inputs, merge(values, varying_values, values_vary))
                else:
                    outputs, vjp = vjp_of(self.function, inputs, diff_in, each)
                part = vjp(part_cotangents)
                totals = list(map(add, totals, pick(part, shared)))
                return totals, (pick(outputs, self.varies_out) if run else [], pick(part, own))

            inputs = pick(args, diff_shared)
            so_far = [
                jnp.zeros_like(x) if g is None else g
                for x, g in zip(inputs, pick(grads, shared), strict=True)
            ]
            xs = (
                pick(args, self.varies_in),
                pick(values, values_vary),
                pick(cotangents, pick(each, diff_out)),
            )
            totals, (varying, part) = jax.lax.scan(one, list(map(widen, so_far)), xs)
            grads = merge(merge(grads, totals, shared), part, own)
            if run:
                outputs = merge(outputs, varying, self.varies_out)
        return outputs, grads

    def _of_one(self, args: Sequence[Any]) -> list[Any]:
        """The inputs of one microbatch: enough for what does not vary; XLA drops the rest."""
        return [x[0] if v else x for x, v in zip(args, self.varies_in, strict=True)]


def vjp_of(
    function: Callable[..., Sequence[Any]],
    args: Sequence[Any],
    diff_in: Sequence[bool],
    diff_out: Sequence[bool],
) -> tuple[list[Any], Callable[[list[jax.Array]], tuple[jax.Array, ...]]]:
    """`jax.vjp` from the inputs in `diff_in` to the outputs in `diff_out`.

    Returns:
      All outputs, and the map from cotangents of these outputs to those of these inputs.
    """
    is_aux = invert(diff_out)

    def active(*inputs):
        outputs = function(*merge(args, inputs, diff_in))
        return pick(outputs, diff_out), pick(outputs, is_aux)

    outputs, vjp, aux = jax.vjp(active, *pick(args, diff_in), has_aux=True)
    return merge(merge([None] * len(diff_out), outputs, diff_out), aux, is_aux), vjp


def widen(x: jax.Array) -> jax.Array:
    """In float32, or its own dtype where that is wider."""
    return x.astype(np.promote_types(x.dtype, np.float32))


def add(a: jax.Array, b: jax.Array) -> jax.Array:
    """The sum in the dtype of `a`."""
    return a + b.astype(a.dtype)


def pick(items: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def both(a: Sequence[bool], b: Sequence[bool]) -> list[bool]:
    return [x and y for x, y in zip(a, b, strict=True)]


def invert(flags: Sequence[bool]) -> list[bool]:
    return [not flag for flag in flags]


def merge(items: Sequence[Any], new: Sequence[Any], flags: Sequence[bool]) -> list[Any]:
    """`items` with the flagged ones replaced by `new`, in order."""
    replacements = iter(new)
    return [next(replacements) if flag else item for item, flag in zip(items, flags, strict=True)]
