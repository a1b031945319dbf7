"""Splits a batch into microbatches, and runs functions on each of them.

With K > 1 microbatches, a value that differs between them *varies*: it has an axis [K] in front.
With one microbatch nothing varies, and functions run as they are.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import PartitionSpec

from lomo_jax.fused.arrays import PyTree, add, explicit_sharding, partition_spec, widen
from lomo_jax.fused.flags import Flags, scatter, select, zip_and, zip_not


class WeightedLoss(NamedTuple):
    """A loss and its weight among the losses of other microbatches.

    A loss function may return it in place of the scalar. `fused_step` then minimises
    ``sum(weight * loss) / sum(weight)`` over the microbatches. With the mean over a microbatch's
    tokens and their number, this is the mean over all tokens of the batch, however unevenly padding
    is spread. Where the weight is 0 loss and gradient must still be finite: divide by
    ``jnp.maximum(number, 1)``.

    Example:
      >>> import jax.numpy as jnp, lomo_jax
      >>> def loss_fn(params, batch):
      ...     total = batch["mask"].sum()
      ...     loss = jnp.vdot((params * batch["x"]) ** 2, batch["mask"]) / jnp.maximum(total, 1)
      ...     return lomo_jax.WeightedLoss(loss, total)
      >>> batch = {"x": jnp.arange(4.0), "mask": jnp.array([1.0, 0.0, 1.0, 1.0])}
      >>> step = lomo_jax.fused_step(loss_fn, lomo_jax.lomo(0.1), microbatches=2)
      >>> params = jnp.float32(1.0)
      >>> _, _, out = step(params, step.init(params, batch), batch)
      >>> round(float(out.loss), 4)  # (0 + 4 + 9) / 3
      4.3333
    """

    loss: jax.Array  # floating-point [], the mean over this microbatch
    weight: jax.Array  # real [], such as the number of tokens; must not depend on parameters


def split(batch: PyTree, microbatches: int) -> PyTree:
    """Splits the leading axis of every leaf: [B, ...] -> [K, B // K, ...].

    Microbatch k has the rows ``k, k + K, ...``. A scalar goes to every microbatch. A key of
    `jax.random.key` is split, so that each microbatch draws other numbers.

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
        name = f"batch leaf {jax.tree_util.keystr(path) or 'batch'}"
        if x.shape[0] % microbatches:
            raise ValueError(
                f"{name} has a leading axis of {x.shape[0]}, which does not split into "
                f"microbatches={microbatches}"
                + ("; is it a key? use jax.random.key" if x.dtype == jnp.uint32 else "")
            )
        # Every K-th row rather than K blocks: no row of a sharded batch moves to another device.
        shape = (x.shape[0] // microbatches, microbatches, *x.shape[1:])
        if (found := explicit_sharding(x)) is not None:
            shards = x.shape[0] // found.shard_shape(x.shape)[0]
            if shape[0] % shards:
                raise ValueError(
                    f"{name} has a leading axis of {x.shape[0]}: each of microbatches="
                    f"{microbatches} has {shape[0]} rows, not a multiple of the {shards} devices "
                    "that the axis is sharded over"
                )
        first, *others = partition_spec(x)
        sharding = explicit_sharding(x, PartitionSpec(first, None, *others))
        return jax.lax.reshape(x, shape, out_sharding=sharding).swapaxes(0, 1)

    if all(jnp.ndim(x) == 0 for x in jax.tree.leaves(batch)):
        raise ValueError(
            f"no leaf of the batch has a leading axis to split into microbatches={microbatches}"
        )
    return jax.tree_util.tree_map_with_path(split_leaf, batch)


def shares(weights: jax.Array | None, microbatches: int, loss_dtype: Any) -> jax.Array:
    """Returns each microbatch's share of the loss, [K], from its weight; equal shares for None."""
    dtype = np.promote_types(loss_dtype, np.float32)
    if weights is None:
        return jnp.full(microbatches, 1 / microbatches, dtype)
    weights = jax.lax.stop_gradient(weights.astype(dtype))
    total = weights.sum()
    return weights / jnp.where(total == 0, 1, total)


class Microbatched(NamedTuple):
    """A function that runs once for each microbatch where its values vary, and once where not."""

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
                return select(
                    self.function(*scatter(args, varying, self.varies_in)), self.varies_out
                )

            varying = jax.lax.map(one, select(args, self.varies_in))
            outputs = scatter(outputs, varying, self.varies_out)
        return outputs

    def vjp(
        self,
        args: Sequence[Any],
        diff_in: Flags,
        diff_out: Flags,
        cotangents: Sequence[jax.Array],
        *,
        run: bool = False,
        residuals: tuple[Callable[..., Any], Sequence[Any], Flags] | None = None,
    ) -> tuple[list[Any], list[jax.Array]]:
        """Pulls cotangents of the outputs in `diff_out` back to the inputs in `diff_in`.

        A varying input gets a cotangent for each microbatch. Another input gets the sum over the
        microbatches, in float32 or wider.

        Args:
          args: the inputs.
          diff_in: which of them to differentiate with respect to.
          diff_out: which outputs have a cotangent.
          cotangents: the cotangents of these outputs.
          run: whether to return the outputs too.
          residuals: (backward, values, which of them vary) of a forward pass, see
            `forward.save_residuals`: start from these values instead of `args`. Then `run` must be
            False, and all outputs vary or none does.

        Returns:
          The outputs (None without `run`), and the cotangents of the inputs in `diff_in`.
        """
        each, once = zip_and(diff_out, self.varies_out), zip_and(diff_out, zip_not(self.varies_out))
        own, shared = select(self.varies_in, diff_in), select(zip_not(self.varies_in), diff_in)
        diff_shared = zip_and(diff_in, zip_not(self.varies_in))
        outputs: list[Any] = [None] * len(diff_out)
        grads: list[Any] = [None] * len(own)
        backward, values, values_vary = residuals or (None, [], [])
        if backward and not any(each):
            return outputs, list(backward(args, values)(list(cotangents)))
        if any(once) or not any(each) or (run and not all(self.varies_out)):
            outputs, vjp = vjp_of(self.function, self._of_one(args), diff_shared, once)
            grads = scatter(grads, vjp(select(cotangents, select(once, diff_out))), shared)
        if any(each):

            def one(totals, x):
                varying, varying_values, part_cotangents = x
                inputs = scatter(args, varying, self.varies_in)
                if backward:
                    outputs = []
                    vjp = backward(inputs, scatter(values, varying_values, values_vary))
                else:
                    outputs, vjp = vjp_of(self.function, inputs, diff_in, each)
                part = vjp(part_cotangents)
                totals = list(map(add, totals, select(part, shared)))
                return totals, (select(outputs, self.varies_out) if run else [], select(part, own))

            inputs = select(args, diff_shared)
            so_far = [
                jnp.zeros_like(x) if g is None else g
                for x, g in zip(inputs, select(grads, shared), strict=True)
            ]
            xs = (
                select(args, self.varies_in),
                select(values, values_vary),
                select(cotangents, select(each, diff_out)),
            )
            totals, (varying, part) = jax.lax.scan(one, list(map(widen, so_far)), xs)
            grads = scatter(scatter(grads, totals, shared), part, own)
            if run:
                outputs = scatter(outputs, varying, self.varies_out)
        return outputs, grads

    def _of_one(self, args: Sequence[Any]) -> list[Any]:
        """Returns the inputs of one microbatch: enough for the outputs that do not vary."""
        return [x[0] if v else x for x, v in zip(args, self.varies_in, strict=True)]


def vjp_of(
    function: Callable[..., Sequence[Any]],
    args: Sequence[Any],
    diff_in: Flags,
    diff_out: Flags,
) -> tuple[list[Any], Callable[[list[jax.Array]], tuple[jax.Array, ...]]]:
    """Applies `jax.vjp` from the inputs in `diff_in` to the outputs in `diff_out`.

    Returns:
      All outputs, and the function from cotangents of outputs to cotangents of inputs.
    """
    is_aux = zip_not(diff_out)

    def active(*inputs):
        outputs = function(*scatter(args, inputs, diff_in))
        return select(outputs, diff_out), select(outputs, is_aux)

    outputs, vjp, aux = jax.vjp(active, *select(args, diff_in), has_aux=True)
    return scatter(scatter([None] * len(diff_out), outputs, diff_out), aux, is_aux), vjp
