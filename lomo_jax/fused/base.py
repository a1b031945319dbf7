"""The base class of the fused step and the reference step: options, state, output, checks."""

import dataclasses
import inspect
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from lomo_jax import _validate
from lomo_jax.fused import arrays, microbatches
from lomo_jax.fused.arrays import Params, PyTree, is_on_host, match_memory, to_device, to_host
from lomo_jax.fused.explain import Explanation, explain
from lomo_jax.fused.options import (
    MAX_LOSS_SCALE,
    MIN_LOSS_SCALE,
    REMAT_POLICIES,
    ROUNDINGS,
    DynamicLossScale,
    LossScaleState,
    Offload,
)
from lomo_jax.fused.trace import TracedLoss, trace
from lomo_jax.fused.update import Updater, check_independent


class StepState(NamedTuple):
    """The state of a step: a pytree of arrays."""

    # The optimizer's state of each trainable parameter, by the parameter's name, such as
    # "layers/attention/query". For a stacked parameter every array has a layer axis in front.
    optimizer: dict[str, PyTree]
    loss_scale: LossScaleState | None  # None unless the loss scale is dynamic
    rounding: jax.Array | None  # uint32 [2], data of a random key; None unless it is stochastic


class StepOutput(NamedTuple):
    """The output of a step, besides parameters and state."""

    loss: jax.Array  # [], dtype of the loss, computed with the parameters before the update
    # The second result of loss_fn. With K > 1 microbatches every leaf has an axis [K] in front.
    # None without has_aux.
    aux: PyTree
    grad_norm: jax.Array | None  # float32 [], before clipping; None unless clip_norm is set
    # bool [], whether the loss is finite and, if clip_norm is set or the loss scale is dynamic, the
    # gradient too.
    finite: jax.Array


class TracedStep(NamedTuple):
    """A step for parameters and a batch of known shapes."""

    loss: TracedLoss
    names: list[str]  # of the leaves of the parameters
    updaters: dict[int, Updater]  # of the trainable parameters, by index

    def with_value(self, loss: jax.Array, share: jax.Array) -> "TracedStep":
        """Returns a step whose updaters pass the loss to `tx`.

        Args:
          loss: [], or [K] for K > 1 microbatches.
          share: see `Result`.
        """
        value = mean_loss(loss, share).astype(jnp.float32)
        return self._replace(updaters={i: u.with_value(value) for i, u in self.updaters.items()})

    def init_optimizer(self, params: Params) -> dict[str, PyTree]:
        """Returns the first state of the optimizer."""
        leaves = jax.tree.leaves(params)
        return {self.names[i]: updater.init(leaves[i]) for i, updater in self.updaters.items()}


class Result(NamedTuple):
    """The result of `Step._run`."""

    params: list[jax.Array]  # leaves
    states: dict[int, PyTree]  # of the optimizer, by the index of the parameter
    loss: jax.Array  # [], or [K] for K > 1 microbatches
    aux: PyTree  # as loss_fn returns it, with an axis [K] in front if K > 1
    share: jax.Array  # [K], of each microbatch in the loss; float32, or float64 for such a loss
    norm: jax.Array | None  # of the gradient, float32 [], if it was measured
    finite: jax.Array  # bool []


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A training step, ``(params, state, batch) -> (params, state, StepOutput)``, to be jitted.

    Make one with `fused_step` or `reference_step`. Both take these arguments:

    Args:
      loss_fn: ``(params, batch) -> loss``, or ``(loss, aux)`` with `has_aux`. The loss is a
        floating-point scalar or a `WeightedLoss`. `params` is a pytree of arrays; its leaves that
        are not floating-point stay as they are. Layers may be wrapped in `jax.checkpoint` but need
        not be, see `remat`.
      tx: an optax transformation that updates each parameter from its own gradient, value and
        state. It sees one parameter at a time, in trees with the paths of `params` and
        `optax.MaskedNode` in place of the other leaves, so masks and labels by path work. Gradients
        are float32 (float64 for float64 parameters); the state keeps the dtypes of ``tx.init``. A
        transformation with a random key in its state, such as `optax.add_noise`, draws the same
        numbers for every parameter and layer. Of the extra arguments of ``tx.update`` it gets
        ``value``: the loss, float32 [], unscaled, and the mean over the microbatches. The rule of
        `optax.contrib.reduce_on_plateau`, for example, is taken for each parameter and layer. A
        scalar that is set in the state of a stack, such as a learning rate, is that of all layers.
        Under a mesh of Explicit axes a transformation that multiplies matrices, such as muon,
        computes with Auto axes.
      has_aux: whether `loss_fn` returns a second result.
      clip_norm: scales the gradient down to this global norm, taken over all trainable parameters.
        Infinity measures the norm without clipping. The step makes two backward passes over the
        same saved layer inputs, the first to measure the norm, and takes about 1.7 times as long.
        None: no clipping, and no norm in the output.
      microbatches: K, splits the leading axis [B, ...] of every leaf of the batch into
        [K, B/K, ...]. Microbatch k has the rows ``k, k + K, ...``, so the rows of a sharded batch
        stay on their devices. Scalars go to every microbatch. Each layer runs all microbatches
        before the next layer runs, and sums its gradient in float32. Activations need memory for
        one microbatch, layer inputs for all. The loss is the mean over the microbatches, weighted
        if it is a `WeightedLoss`.
      loss_scale: multiplies the loss and divides the gradients, so that float16 can represent them:
        a number, or a `DynamicLossScale`, which skips the update of steps that overflow. By default
        that takes two backward passes, as `clip_norm` does.
      rounding: how the sum of parameter and update, computed in float32, is rounded to bfloat16 or
        float16. ``"nearest"``, or ``"stochastic"``: up or down at random, with the right mean, so
        that updates smaller than half the spacing of the dtype are not lost. The random key is a
        part of the state and starts from seed 0.
      trainable: the parameters to train: a predicate on the name of a parameter, such as
        "layers/attention/query" (``jax.tree_util.keystr(path, simple=True, separator="/")``), or a
        pytree of bool that is a prefix of `params`. Frozen parameters have no gradient and no
        state, and the backward pass stops at the first trainable parameter. None: all.
      offload: an `Offload`: the arrays to store in host memory.
      remat: the residuals of each layer that the forward pass saves; the backward pass recomputes
        the rest.
        ``"full"``: the layer's input only. ``"attention"``: also the results of attention: of
        cuDNN's flash attention, and of values named by
        ``jax.ad_checkpoint.checkpoint_name(x, "attention")``. ``"products"``: these, and the
        results of matrix products without batch axes and of `jax.lax.ragged_dot`, so that only
        cheap operations are computed again. ``"none"``: all residuals of `jax.vjp`. Or a policy of
        `jax.checkpoint_policies`. It replaces a `jax.checkpoint` around the whole layer; one inside
        the layer stays. Saved values exist for all layers at once.

    Raises:
      ValueError: an option is out of range, or two options exclude each other. When the step is
        traced: `tx` mixes parameters; the batch does not split into microbatches; `trainable`
        selects no parameter; the state belongs to another step or is that of a transformation.
      TypeError: the loss is not a floating-point scalar, or a parameter is not an array.

    Warns:
      UserWarning: at `init` of `fused_step`, if stacks of more than a few percent of the trainable
        parameters get a whole gradient (see `Step.explain`), or if `tx` has a rule by ``ndim``
        that differs for a stack and its layers.
    """

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    _: dataclasses.KW_ONLY
    has_aux: bool = False
    clip_norm: float | None = None
    microbatches: int = 1
    loss_scale: float | DynamicLossScale | None = None
    rounding: str = "nearest"
    trainable: Callable[[str], bool] | PyTree = None
    offload: Offload = Offload()  # noqa: RUF009  # it is frozen
    remat: str | Callable[..., Any] = "full"

    def __init_subclass__(cls) -> None:
        # The options are documented once, above; help() and the API reference show them with
        # `fused_step` and `reference_step`.
        options = inspect.cleandoc(Step.__doc__ or "").partition("Args:")
        cls.__doc__ = inspect.cleandoc(cls.__doc__ or "") + "\n\n" + "".join(options[1:])

    def __post_init__(self):
        clip_norm, loss_scale = self.clip_norm, self.loss_scale
        if clip_norm is not None and not _is_positive(clip_norm):
            raise ValueError(
                "clip_norm must be a number above 0, or infinity to only measure the norm, got "
                f"{clip_norm!r}"
            )
        if not hasattr(self.tx, "update"):
            raise TypeError(
                f"tx must be an optax transformation, such as optax.sgd(0.1), got {self.tx!r}"
            )
        _validate.integer("microbatches", self.microbatches, low=1)
        _validate.choice("rounding", self.rounding, ROUNDINGS)
        if not callable(self.remat):
            _validate.choice("remat", self.remat, REMAT_POLICIES)
        if self.offload is None:
            object.__setattr__(self, "offload", Offload())
        if not isinstance(self.offload, Offload):
            raise TypeError(f"offload must be a lomo_jax.Offload, got {self.offload!r}")
        if not (isinstance(loss_scale, DynamicLossScale) or loss_scale is None) and not (
            _is_positive(loss_scale) and MIN_LOSS_SCALE <= loss_scale <= MAX_LOSS_SCALE
        ):
            raise ValueError(
                "loss_scale must be a number in [2**-126, 2**126] or a lomo_jax.DynamicLossScale, "
                f"got {loss_scale!r}"
            )
        if self.dynamic and self.dynamic.skip == "layers" and clip_norm is not None:
            raise ValueError(
                "DynamicLossScale(skip='layers') saves a backward pass that clip_norm needs "
                "anyway: use skip='step'"
            )

    @property
    def dynamic(self) -> DynamicLossScale | None:
        """The loss scale, if it is dynamic."""
        return self.loss_scale if isinstance(self.loss_scale, DynamicLossScale) else None

    @property
    def needs_first_pass(self) -> bool:
        """Whether the norm of the gradient must be known before the first update."""
        return self.clip_norm is not None or (
            self.dynamic is not None and self.dynamic.skip == "step"
        )

    def init(self, params: Params, batch: PyTree) -> StepState:
        """Returns the first state.

        Args:
          params: pytree of arrays, or of `jax.ShapeDtypeStruct` under `jax.eval_shape`.
          batch: pytree of arrays or `jax.ShapeDtypeStruct`, with the shapes of the batches to come.

        Raises:
          TypeError, ValueError: see the class.
        """
        return self._init(self._trace(params, batch), params)

    def explain(self, params: Params, batch: PyTree) -> Explanation:
        """Explains the fused step: which gradients exist together, and why not fewer.

        Args:
          params: pytree of arrays or `jax.ShapeDtypeStruct`.
          batch: pytree of arrays or `jax.ShapeDtypeStruct`.

        Returns:
          An `Explanation`: print it.

        Raises:
          TypeError, ValueError: see the class.

        Example:
          >>> import jax, jax.numpy as jnp, lomo_jax
          >>> def loss_fn(params, x):
          ...     x, _ = jax.lax.scan(lambda x, w: (x @ w, None), x, params["layers"])
          ...     return jnp.mean(x @ params["head"])
          >>> float32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.float32)
          >>> params = {"head": float32(512, 512), "layers": float32(8, 512, 512)}
          >>> step = lomo_jax.fused_step(loss_fn, lomo_jax.lomo(0.1))
          >>> print(step.explain(params, float32(2, 512)))
          piece             gradient  parameters
          scan of 8 layers     1 MiB  one layer of layers
          dense                1 MiB  head
          At most 1 MiB of gradient exist together; the trainable parameters are 9 MiB.
        """
        traced = self._trace(params, batch)
        return explain(traced.loss, traced.names, traced.updaters, self.microbatches)

    @property
    def compiler_options(self) -> dict[str, Any]:
        """Options of XLA for `jax.jit`; empty but for a `fused_step`."""
        return {}

    def __call__(
        self, params: Params, state: StepState, batch: PyTree
    ) -> tuple[Params, StepState, StepOutput]:
        """Makes one step.

        Args:
          params: pytree of arrays. The new ones have the same dtypes, shardings and memories.
          state: from `init` or the previous step.
          batch: pytree of arrays, the second argument of `loss_fn`.
        """
        _check_kind(state)
        traced = self._trace(params, batch)
        expected = jax.eval_shape(lambda params: self._init(traced, params), params)
        state = self._spread_scalars(traced, state, expected)
        self._check_memory(traced, params, state)
        _check_state(state, expected)
        key = new_rounding = None
        if state.rounding is not None:
            following, key = jax.random.split(jax.random.wrap_key_data(state.rounding))
            new_rounding = jax.random.key_data(following)
        scale = state.loss_scale.scale if state.loss_scale else self.loss_scale
        result = self._run(
            traced,
            params,
            {i: state.optimizer[traced.names[i]] for i in traced.updaters},
            microbatches.split(batch, self.microbatches),
            None if scale is None else jnp.asarray(scale, jnp.float32),
            key,
        )
        new_loss_scale = None
        if self.dynamic and state.loss_scale:
            new_loss_scale = self.dynamic.update(state.loss_scale, result.finite)
            # A skipped step does not advance the random key.
            new_rounding = jax.tree.map(
                lambda new, old: jnp.where(result.finite, new, old), new_rounding, state.rounding
            )
        new_params = jax.tree.unflatten(jax.tree.structure(params), result.params)
        optimizer = {traced.names[i]: new for i, new in result.states.items()}
        norm = None if self.clip_norm is None else result.norm
        return (
            match_memory(new_params, params),
            StepState(match_memory(optimizer, state.optimizer), new_loss_scale, new_rounding),
            StepOutput(mean_loss(result.loss, result.share), result.aux, norm, result.finite),
        )

    def _trace(self, params: Params, batch: PyTree) -> TracedStep:
        trainable = arrays.trainable_flags(params, self.trainable)
        if self.microbatches > 1:
            # Slicing keeps the weak type of a Python scalar in the batch.
            batch = jax.eval_shape(
                lambda x: jax.tree.map(
                    lambda part: part[0], microbatches.split(x, self.microbatches)
                ),
                batch,
            )
        params = jax.eval_shape(to_device, params)  # the loss sees its parameters on the device
        loss = trace(self.loss_fn, params, batch, has_aux=self.has_aux, trainable=trainable)
        check_independent(self.tx, params, trainable, loss.layer_axes)
        treedef = jax.tree.structure(params)
        updaters = {
            i: Updater(self.tx, treedef, i, loss.layer_axes.get(i, ()))
            for i, is_trainable in enumerate(trainable)
            if is_trainable
        }
        return TracedStep(loss, arrays.names(params), updaters)

    def _init(self, traced: TracedStep, params: Params) -> StepState:
        stochastic = self.rounding == "stochastic"
        optimizer = traced.init_optimizer(to_device(params))
        return StepState(
            to_host(optimizer) if self.offload.state else optimizer,
            self.dynamic.init() if self.dynamic else None,
            jax.random.key_data(jax.random.key(0)) if stochastic else None,
        )

    def _spread_scalars(
        self, traced: TracedStep, state: StepState, expected: StepState
    ) -> StepState:
        """Gives scalars that were set in the state, such as a learning rate, to every layer."""
        if jax.tree.structure(state) != jax.tree.structure(expected):
            return state
        optimizer = {}
        for i in traced.updaters:
            name = traced.names[i]
            num_axes = np.size(traced.loss.layer_axes.get(i, ()))

            def spread(x, like, num_axes=num_axes):
                if jnp.shape(x) or jnp.issubdtype(like.dtype, jax.dtypes.extended):
                    return x
                # A Python number has no dtype of its own.
                x = jnp.asarray(x, like.dtype) if jax.typeof(x).weak_type else x
                if len(like.shape) != num_axes or not num_axes:
                    return x
                x = jnp.broadcast_to(x, like.shape)
                return to_host(x) if self.offload.state else x

            optimizer[name] = jax.tree.map(spread, state.optimizer[name], expected.optimizer[name])
        return state._replace(optimizer=optimizer)

    def _check_memory(self, traced: TracedStep, params: Params, state: StepState) -> None:
        """Raises ValueError if an array is not in the memory that `offload` says."""
        leaves = [
            ("params", f"parameter {name}", leaf)
            for name, leaf in zip(traced.names, jax.tree.leaves(params), strict=True)
        ]
        leaves += [
            ("state", f"the optimizer's state of {name}", leaf)
            for name, tree in state.optimizer.items()
            for leaf in jax.tree.leaves(tree)
        ]
        for kind, name, array in leaves:
            if is_on_host(array) != getattr(self.offload, kind):
                here, there = ("Host", "Device") if is_on_host(array) else ("Device", "Host")
                raise ValueError(
                    f"{name} is in {here.lower()} memory, but offload={self.offload}: move it, "
                    f"jax.device_put({kind}, jax.memory.Space.{there}), or set "
                    f"lomo_jax.Offload({kind}={here == 'Host'})"
                )

    def _run(
        self,
        traced: TracedStep,
        params: Params,
        states: dict[int, PyTree],
        batch: PyTree,
        scale: jax.Array | None,
        key: jax.Array | None,
    ) -> Result:
        """Computes the gradient and updates.

        Args:
          traced: this step.
          params: pytree of arrays.
          states: the optimizer's states, by the index of the parameter.
          batch: split into microbatches.
          scale: of the loss, float32 [].
          key: for stochastic rounding.
        """
        raise NotImplementedError

    def _factor(self, scale: jax.Array | None, norm: jax.Array | None) -> jax.Array | None:
        """Returns the factor that gradients are multiplied by before the update; None for 1."""
        factor = None if scale is None else 1 / scale
        if self.clip_norm is not None and norm is not None:
            clip = jnp.minimum(1.0, jnp.float32(self.clip_norm) / (norm + 1e-6))
            factor = clip if factor is None else clip * factor
        return factor


def mean_loss(loss: jax.Array, share: jax.Array) -> jax.Array:
    """Returns the mean over the microbatches, [], weighted by their shares, [K]."""
    return loss if loss.ndim == 0 else jnp.sum(share * arrays.widen(loss)).astype(loss.dtype)


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) > 0


def _check_kind(state: Any) -> None:
    """Raises ValueError if `state` is not a `StepState`, but that of a transformation."""
    inner = state.optimizer if isinstance(state, StepState) else state
    if not isinstance(state, StepState) or not isinstance(inner, dict):
        raise ValueError(
            f"the state is a {type(inner).__name__}: one optimizer state for all parameters, such "
            "as tx.init(params) or TrainState.opt_state, cannot be updated layer by layer, so the "
            "step has one for each parameter and layer: make it with step.init(params, batch)"
        )


def _check_state(state: Any, expected: StepState) -> None:
    """Raises ValueError unless `state` has the structure, shapes and dtypes of `expected`."""
    fault = "is not the state of this loss, tx, options and tree of parameters"
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
    raise ValueError(f"the state {fault}: make it with step.init(params, batch)")
