"""The training step of a run: its options from the config, and its compiled programs."""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import lomo_jax
from lomo_jax import sharding
from lomo_jax.errors import ConfigError
from lomo_jax.training.config import Config
from lomo_jax.training.model import Model
from lomo_jax.training.optimizer import make_optimizer, make_schedule


class CompiledStep(NamedTuple):
    """The step of a run, compiled."""

    step: lomo_jax.Step  # not compiled
    batch: Mapping[str, jax.ShapeDtypeStruct]
    # (params, state, batch) -> (params, state, StepOutput, loss scale or None), updating params and
    # state in place
    update: jax.stages.Compiled
    init: jax.stages.Compiled  # params -> state
    state: lomo_jax.StepState  # of jax.ShapeDtypeStruct, with shardings

    def init_missing(self, state: lomo_jax.StepState, params: nnx.State) -> lomo_jax.StepState:
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


def make_step(config: Config, model: Model) -> lomo_jax.Step:
    """Returns the step of a run, not compiled."""

    def loss(params: nnx.State, batch: Any) -> tuple[lomo_jax.WeightedLoss, Any]:
        mean, metrics = model.loss(params, batch)
        return lomo_jax.WeightedLoss(mean, metrics.weight), metrics

    make = lomo_jax.fused_step if config.fused else lomo_jax.reference_step
    return make(
        loss,
        make_optimizer(config.optimizer, schedule_of(config), config.optimizer_kwargs),
        has_aux=True,
        clip_norm=config.clip_norm,
        microbatches=config.microbatches,
        loss_scale=_loss_scale(config.dynamic_loss_scale, config.skip_nonfinite),
        rounding=config.rounding,
        remat=config.remat,
        offload=config.offload,
    )


def schedule_of(config: Config) -> optax.Schedule:
    """Returns the learning-rate schedule of a run."""
    return make_schedule(config.schedule, config.learning_rate, config.steps, config.warmup)


def learning_rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    """Returns the learning rate of each step, float32 [steps].

    All at once: calling the schedule in the loop would put work on the device.
    """
    return np.asarray(jax.vmap(schedule)(jnp.arange(steps)))


def _loss_scale(dynamic: bool, skip_nonfinite: int) -> lomo_jax.DynamicLossScale | None:
    if dynamic:
        return lomo_jax.DynamicLossScale()
    if skip_nonfinite:
        # A scale of 1 that never changes only skips updates that are not finite.
        never = 2**31 - 1  # the largest step count that int32 holds
        return lomo_jax.DynamicLossScale(initial=1.0, minimum=1.0, growth_interval=never)
    return None


def compile_step(
    step: lomo_jax.Step,
    params: nnx.State,
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
        lowered = jax.jit(lambda params: step.init(params, batch)).lower(params)
    except TypeError as error:  # it needs more than gradients, or mixes the layers
        why = str(error).splitlines()[0]
        raise ConfigError(f"optimizer: {optimizer!r} cannot be used here: {why}") from error
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in jax.tree.leaves(lowered.out_info)):
        raise ConfigError(
            f"optimizer: {optimizer!r} keeps a random key in its state, which a checkpoint cannot "
            "hold; choose another"
        )
    init = lowered.compile()
    state = sharding.with_shardings(lowered.out_info, init.output_shardings)
    compiled = jax.jit(update, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    return CompiledStep(step, batch, compiled, init, state)
