"""What the fused step and the reference have in common: arguments, state and results."""

import dataclasses
import numbers
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from lomo_jax import _validate
from lomo_jax.fused import microbatches, parameters
from lomo_jax.fused.cut import Cut, cut
from lomo_jax.fused.loss_scale import HIGH, LOW, DynamicLossScale, LossScaleState
from lomo_jax.fused.offload import Offload, beside, is_on_host, to_device, to_host
from lomo_jax.fused.remat import POLICIES
from lomo_jax.fused.update import Updater, check_independent

ROUNDINGS = ("nearest", "stochastic")


class StepState(NamedTuple):
    """What a step remembers. A pytree of arrays."""

    # By the name of the parameter, such as "layers/attention/query", the state of tx for it; with a
    # layer axis in front of every array if the parameter is stacked. A frozen one has none.
    optimizer: dict[str, Any]
    loss_scale: LossScaleState | None  # None unless the loss scale is dynamic
    rounding: jax.Array | None  # uint32 [2], data of a random key; None unless it is stochastic


class StepOutput(NamedTuple):
    """What a step reports."""

    loss: jax.Array  # [], dtype of the loss; of the parameters before the update
    # What loss_fn returned beside the loss, of each microbatch: with K > 1 of them every leaf has
    # an axis [K] in front. None without has_aux.
    aux: Any
    grad_norm: jax.Array | None  # float32 [], before clipping; None unless clip_norm is set
    finite: jax.Array  # bool [], whether the loss is finite, and all that is known of the gradient


class Plan(NamedTuple):
    """What tracing the loss tells of a step."""

    cut: Cut
    names: list[str]  # of the leaves of the parameters
    updaters: dict[int, Updater]  # of the trainable ones, by index

    def init(self, params: Any) -> dict[str, Any]:
        """Returns the first state of the optimizer."""
        leaves = jax.tree.leaves(params)
        return {self.names[i]: updater.init(leaves[i]) for i, updater in self.updaters.items()}


class Result(NamedTuple):
    """What a step has made of its arguments."""

    params: list[jax.Array]  # leaves
    states: dict[int, Any]  # of the optimizer, by the index of the parameter
    loss: jax.Array  # [], or of each of several microbatches [K]
    aux: Any  # likewise, as loss_fn returns it
    share: jax.Array  # [K], of each microbatch in the loss; float32, or float64 for such a loss
    norm: jax.Array | None  # of the gradient, float32 [], if it was measured
    finite: jax.Array  # bool []


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """A training step `(params, state, batch) -> (params, state, StepOutput)`, to be jitted.

    Made by `fused_step` or `reference_step`, whose arguments are its fields.
    """

    loss_fn: Callable[..., Any]
    tx: optax.GradientTransformation
    has_aux: bool = False
    clip_norm: float | None = None
    microbatches: int = 1
    loss_scale: float | DynamicLossScale | None = None
    rounding: str = "nearest"
    trainable: Any = None
    offload: Offload | None = None
    remat: Any = "full"

    def __post_init__(self):
        clip_norm, scale = self.clip_norm, self.loss_scale
        if clip_norm is not None and not _is_positive(clip_norm):
            raise ValueError(
                "clip_norm must be a number above 0, or infinity to measure the norm only, got "
                f"{clip_norm!r}"
            )
        if not hasattr(self.tx, "update"):
            raise TypeError(
                f"tx must be an optax transformation, such as optax.sgd(0.1), got {self.tx!r}"
            )
        _validate.integer("microbatches", self.microbatches, low=1)
        _validate.choice("rounding", self.rounding, ROUNDINGS)
        if not callable(self.remat):
            _validate.choice("remat", self.remat, POLICIES)
        if not isinstance(self.offloads, Offload):
            raise TypeError(f"offload must be a lomo_jax.Offload, got {self.offload!r}")
        if not (isinstance(scale, DynamicLossScale) or scale is None) and not (
            _is_positive(scale) and LOW <= scale <= HIGH
        ):
            raise ValueError(
                "loss_scale must be a number in [2**-126, 2**126] or a lomo_jax.DynamicLossScale, "
                f"got {scale!r}"
            )
        if self.dynamic and self.dynamic.skip == "layers" and self.clip_norm is not None:
            raise ValueError(
                "DynamicLossScale(skip='layers') saves the walk that tells whether the gradient is "
                "finite, but clip_norm makes that walk anyway: use skip='step'"
            )

    @property
    def dynamic(self) -> DynamicLossScale | None:
        """The loss scale, if it is a dynamic one."""
        return self.loss_scale if isinstance(self.loss_scale, DynamicLossScale) else None

    @property
    def offloads(self) -> Offload:
        """What is kept in host memory."""
        return self.offload or Offload()

    @property
    def measures(self) -> bool:
        """Whether the whole gradient is measured before the first update."""
        return self.clip_norm is not None or (
            self.dynamic is not None and self.dynamic.skip == "step"
        )

    def init(self, params: Any, batch: Any) -> StepState:
        """Returns the state to start from.

        Args:
          params: pytree of arrays, or of `jax.ShapeDtypeStruct` under `jax.eval_shape`.
          batch: pytree of arrays or of `jax.ShapeDtypeStruct`, of the shapes to come.

        Raises:
          TypeError, ValueError: see `fused_step`.
        """
        return self._init(self._plan(params, batch), params)

    def __call__(
        self, params: Any, state: StepState, batch: Any
    ) -> tuple[Any, StepState, StepOutput]:
        """Makes one step; see `fused_step`."""
        plan = self._plan(params, batch)
        self._check_memory(plan, params, state)
        _check_state(state, jax.eval_shape(lambda params: self._init(plan, params), params))
        key = new_rounding = None
        if state.rounding is not None:
            following, key = jax.random.split(jax.random.wrap_key_data(state.rounding))
            new_rounding = jax.random.key_data(following)
        scale = state.loss_scale.scale if state.loss_scale else self.loss_scale
        result = self._run(
            plan,
            params,
            {i: state.optimizer[plan.names[i]] for i in plan.updaters},
            microbatches.split(batch, self.microbatches),
            None if scale is None else jnp.asarray(scale, jnp.float32),
            key,
        )
        new_loss_scale = None
        if self.dynamic and state.loss_scale:
            new_loss_scale = self.dynamic.update(state.loss_scale, result.finite)
            # A step that is skipped draws no numbers.
            new_rounding = jax.tree.map(
                lambda new, old: jnp.where(result.finite, new, old), new_rounding, state.rounding
            )
        loss = result.loss
        if self.microbatches > 1:
            loss = jnp.sum(result.share * microbatches.widen(loss)).astype(loss.dtype)
        return (
            beside(jax.tree.unflatten(jax.tree.structure(params), result.params), params),
            StepState(
                beside({plan.names[i]: new for i, new in result.states.items()}, state.optimizer),
                new_loss_scale,
                new_rounding,
            ),
            StepOutput(
                loss,
                result.aux,
                None if self.clip_norm is None else result.norm,
                result.finite,
            ),
        )

    def _plan(self, params: Any, batch: Any) -> Plan:
        trainable = parameters.trainable(params, self.trainable)
        if self.microbatches > 1:
            # Not from shapes and dtypes: a Python scalar of the batch has a weak type.
            batch = jax.eval_shape(
                lambda x: jax.tree.map(
                    lambda part: part[0], microbatches.split(x, self.microbatches)
                ),
                batch,
            )
        params = jax.eval_shape(to_device, params)  # where the loss sees them
        pieces = cut(self.loss_fn, params, batch, has_aux=self.has_aux, trainable=trainable)
        check_independent(self.tx, params, trainable, pieces.stacked)
        treedef = jax.tree.structure(params)
        updaters = {
            i: Updater(self.tx, treedef, i, stacked=i in pieces.stacked)
            for i, is_trainable in enumerate(trainable)
            if is_trainable
        }
        return Plan(pieces, parameters.names(params), updaters)

    def _init(self, plan: Plan, params: Any) -> StepState:
        stochastic = self.rounding == "stochastic"
        optimizer = plan.init(to_device(params))
        return StepState(
            to_host(optimizer) if self.offloads.state else optimizer,
            self.dynamic.init() if self.dynamic else None,
            jax.random.key_data(jax.random.key(0)) if stochastic else None,
        )

    def _check_memory(self, plan: Plan, params: Any, state: StepState) -> None:
        """Raises ValueError if something is in the memory that `offload` says it is not in."""
        arrays = [
            ("params", f"parameter {name}", leaf)
            for name, leaf in zip(plan.names, jax.tree.leaves(params), strict=True)
        ]
        arrays += [
            ("state", f"the optimizer's state of {name}", leaf)
            for name, tree in state.optimizer.items()
            for leaf in jax.tree.leaves(tree)
        ]
        for kind, name, array in arrays:
            if is_on_host(array) != getattr(self.offloads, kind):
                here, there = ("Host", "Device") if is_on_host(array) else ("Device", "Host")
                raise ValueError(
                    f"{name} is in {here.lower()} memory, not where offload={self.offload} has it: "
                    f"put it there, jax.device_put({kind}, jax.memory.Space.{there}), or set "
                    f"lomo_jax.Offload({kind}={here == 'Host'})"
                )

    def _run(
        self,
        plan: Plan,
        params: Any,
        states: dict[int, Any],
        batch: Any,
        scale: jax.Array | None,
        key: jax.Array | None,
    ) -> Result:
        """Computes the gradient and updates.

        Args:
          plan: of this step.
          params: pytree of arrays.
          states: of the optimizer, by the index of the parameter.
          batch: split into microbatches.
          scale: of the loss, float32 [].
          key: for stochastic rounding.
        """
        raise NotImplementedError

    def _factor(self, scale: jax.Array | None, norm: jax.Array | None) -> jax.Array | None:
        """What gradients are multiplied by before `tx` gets them, or None for 1."""
        factor = None if scale is None else 1 / scale
        if self.clip_norm is not None and norm is not None:
            clip = jnp.minimum(1.0, jnp.float32(self.clip_norm) / (norm + 1e-6))
            factor = clip if factor is None else clip * factor
        return factor


def _is_positive(value: Any) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool) and float(value) > 0


def _check_state(state: Any, expected: StepState) -> None:
    """Raises ValueError unless `state` has the structure, shapes and dtypes that are expected."""
    fault = "is not of this loss, tx, options and tree of parameters"
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
    raise ValueError(f"state {fault}: make it with step.init(params, batch)")
