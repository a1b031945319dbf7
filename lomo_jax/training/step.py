"""The training step of a run: learning rates, optimizer, loss scale, compiled programs."""

import functools
import inspect
import re
import warnings
from collections.abc import Callable, Hashable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib

import lomo_jax
from lomo_jax import sharding
from lomo_jax.errors import ConfigError, did_you_mean
from lomo_jax.fused.arrays import Params

SCHEDULES = ("constant", "linear", "cosine")
MATRICES = "matrices"  # as a decay mask: not norms, biases and embeddings


def make_schedule(kind: str, learning_rate: float, steps: int, warmup: float) -> optax.Schedule:
    """A linear warm-up to `learning_rate`, then constant, or decaying to 0 at step `steps`.

    No step has a learning rate of 0: the first of `w` warm-up steps has `learning_rate / (w + 1)`,
    and the decay reaches 0 one step after the last.

    Args:
      kind: The schedule after the warm-up, one of `SCHEDULES`.
      learning_rate: The peak.
      steps: Number of steps of the run.
      warmup: Length of the warm-up. Below 1 a fraction of `steps`, from 1 on a number of steps.

    Returns:
      A function from the number of finished steps to the learning rate.

    Raises:
      ConfigError: `warmup` is not shorter than the run, or `kind` is unknown.
    """
    warmup_steps = round(warmup * steps) if warmup < 1 else round(warmup)
    if warmup_steps >= steps:
        raise ConfigError(
            f"warmup: {warmup:g} is {warmup_steps} of {steps} steps, it must be shorter than the "
            "run; below 1 it is a fraction of `steps`, from 1 on a number of steps"
        )
    decay_steps = steps - warmup_steps
    match kind:
        case "constant":
            decay = optax.constant_schedule(learning_rate)
        case "linear":
            decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
        case "cosine":
            decay = optax.cosine_decay_schedule(learning_rate, decay_steps)
        case _:
            raise ConfigError(
                f"schedule: {kind!r} is not one of {', '.join(SCHEDULES)}"
                + did_you_mean(kind, SCHEDULES)
            )
    if warmup_steps == 0:
        return decay
    start = learning_rate / (warmup_steps + 1)
    return optax.join_schedules(
        [optax.linear_schedule(start, learning_rate, warmup_steps), decay], [warmup_steps]
    )


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """Returns the learning rate of each step, float32 [steps].

    All at once: calling the schedule in the loop would put work on the device.
    """
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


def make_optimizer(
    name: str,
    learning_rate: optax.ScalarOrSchedule,
    kwargs: Mapping[str, Any],
    field: str = "optimizer",
    decay_mask: str = MATRICES,
) -> optax.GradientTransformation:
    """Builds an optimizer by its name.

    Args:
      name: "adalomo", "lomo" or an optimizer of optax or optax.contrib.
      learning_rate: A float, or a schedule.
      kwargs: The optimizer's other arguments.
      field: The field of the config that has the name, for errors.
      decay_mask: The parameters whose weights decay, if the optimizer has a weight decay:
        "matrices" for all but norms, biases and embeddings, "all", or a regular expression that is
        searched in their names.

    Returns:
      The optimizer.

    Raises:
      ConfigError: There is no such optimizer, or it refuses `kwargs`.
    """
    known = optimizers()
    if name not in known:
        raise ConfigError(
            f"{field}: {name!r} is not adalomo, lomo or an optimizer of optax, such as adamw"
            + did_you_mean(name, known)
        )
    kwargs_field = f"{field}_kwargs"
    arguments = list(inspect.signature(known[name]).parameters)[1:]  # without learning_rate
    for argument in kwargs:
        if argument not in arguments:
            raise ConfigError(
                f"{kwargs_field}: {name} takes no {argument!r}"
                + (did_you_mean(argument, arguments) or f"; it takes {', '.join(arguments)}")
            )
    make = functools.partial(known[name], learning_rate, **kwargs)
    signature = inspect.signature(known[name]).parameters
    decay = next((a for a in ("weight_decay", "weight_decay_rate") if a in signature), None)
    try:
        if decay is None or decay_mask == "all" or not kwargs.get(decay, signature[decay].default):
            return make()
        decays = functools.partial(_decays, decay_mask)
        mask = next((a for a in ("mask", "weight_decay_mask") if a in signature), None)
        if mask is not None:
            return make(**{mask: decays})
        both: dict[Hashable, Any] = {True: make(), False: make(**{decay: 0.0})}
        return optax.partition(both, decays)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{kwargs_field}: {name} refuses {dict(kwargs)}: {error}") from error


def _decays(mask: str, params: Params) -> Any:
    """Returns whether the weights of each parameter decay."""

    def decays(path, _) -> bool:
        name = jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value")
        if mask == MATRICES:
            return name.rpartition("/")[2] not in ("scale", "bias", "embedding")
        return re.search(mask, name) is not None

    return jax.tree_util.tree_map_with_path(decays, params)


def optimizers() -> dict[str, Any]:
    """Returns what makes each optimizer that takes a learning rate, by the name in a config."""
    functions = dict(inspect.getmembers(optax.contrib, inspect.isfunction))
    functions |= dict(inspect.getmembers(optax, inspect.isfunction))
    found = {
        name: function
        for name, function in functions.items()
        if next(iter(inspect.signature(function).parameters), None) == "learning_rate"
        and not name.startswith(("scale_by", "_"))
    }
    return found | {"adalomo": lomo_jax.adalomo, "lomo": lomo_jax.lomo}


def make_step(
    loss: Callable[[Params, Any], tuple[jax.Array, Any]],
    optimizer: optax.GradientTransformation,
    *,
    fused: bool = True,
    dynamic_loss_scale: bool = False,
    skip_nonfinite: int = 0,
    **options: Any,
) -> lomo_jax.Step:
    """Returns the step of a run, not compiled.

    Args:
      loss: (params, batch) -> mean loss and `losses.Metrics`, such as `Model.loss`.
      optimizer: The optimizer.
      fused: Whether to use `lomo_jax.fused_step`; otherwise `lomo_jax.reference_step`.
      dynamic_loss_scale: Whether to scale the loss, for float16.
      skip_nonfinite: If not 0, an update that is not finite is skipped; `Recorder` counts them.
      **options: Other options of `lomo_jax.fused_step`.
    """

    def weighted_loss(params: Params, batch: Any) -> tuple[lomo_jax.WeightedLoss, Any]:
        mean, metrics = loss(params, batch)
        return lomo_jax.WeightedLoss(mean, metrics.weight), metrics

    make = lomo_jax.fused_step if fused else lomo_jax.reference_step
    scale = _loss_scale(dynamic_loss_scale, skip_nonfinite)
    return make(weighted_loss, optimizer, has_aux=True, loss_scale=scale, **options)


def _loss_scale(dynamic: bool, skip_nonfinite: int) -> lomo_jax.DynamicLossScale | None:
    if dynamic:
        return lomo_jax.DynamicLossScale()
    if skip_nonfinite:
        # A scale of 1 that never changes only skips updates that are not finite.
        never = 2**31 - 1  # the largest step count that int32 holds
        return lomo_jax.DynamicLossScale(initial=1.0, minimum=1.0, growth_interval=never)
    return None


class CompiledStep(NamedTuple):
    """The step of a run, compiled."""

    step: lomo_jax.Step  # not compiled
    batch: Mapping[str, jax.ShapeDtypeStruct]
    # (params, state, batch) -> (params, state, StepOutput, loss scale or None), updating params and
    # state in place
    update: jax.stages.Compiled
    init: jax.stages.Compiled  # params -> state
    state: lomo_jax.StepState  # of jax.ShapeDtypeStruct, with shardings

    def init_missing(self, state: lomo_jax.StepState, params: Params) -> lomo_jax.StepState:
        """Initialises the parts of a state that the checkpoint lacks: loss scale and random key.

        Args:
          state: The state from the checkpoint; missing parts are None.
          params: The parameters of the checkpoint.
        """
        missing = {
            name: shapes
            for name, shapes in self.state._asdict().items()
            if shapes is not None and getattr(state, name) is None
        }
        if not missing:
            return state
        # Without the optimizer's part, which may be as large as the parameters.
        init = jax.jit(lambda params: self.step.init(params, self.batch)._replace(optimizer={}))
        first = init(params)._asdict()
        shardings = {name: jax.tree.map(lambda x: x.sharding, missing[name]) for name in missing}
        return state._replace(**jax.device_put({name: first[name] for name in missing}, shardings))


def compile_step(
    step: lomo_jax.Step,
    params: Params,
    batch: Mapping[str, jax.ShapeDtypeStruct],
    optimizer: str,
) -> CompiledStep:
    """Compiles a step.

    Args:
      step: The step, from `make_step`.
      params: The parameters as `jax.ShapeDtypeStruct`, with shardings and memory kinds.
      batch: The shapes from `devices.batch_shapes`.
      optimizer: The optimizer's name, for errors.

    Raises:
      ConfigError: The optimizer cannot be used with `fused_step` or cannot be saved.
    """

    def update(params, state, batch):
        params, new_state, out = step(params, state, batch)
        return params, new_state, out, state.loss_scale and state.loss_scale.scale

    try:
        with warnings.catch_warnings():
            # Muon has a rule for matrices, and means those of one layer, which it gets.
            warnings.filterwarnings("ignore", "tx has another rule")
            lowered = jax.jit(lambda params: step.init(params, batch)).lower(params)
    except (TypeError, ValueError) as error:  # it needs more than gradients, or mixes parameters
        why = str(error).splitlines()[0]
        raise ConfigError(f"optimizer: {optimizer!r} cannot be used here: {why}") from error
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in jax.tree.leaves(lowered.out_info)):
        raise ConfigError(
            f"optimizer: {optimizer!r} keeps a random key in its state, which a checkpoint cannot "
            "hold; choose another"
        )
    init = lowered.compile()
    state = sharding.with_shardings(lowered.out_info, init.output_shardings)
    lowered = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, batch)
    compiled = lowered.compile(step.compiler_options)
    return CompiledStep(step, batch, compiled, init, state)
