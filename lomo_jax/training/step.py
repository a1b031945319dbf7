"""The step that a run repeats: the same for `train.py` and for `python -m lomo_jax.plan`."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

import lomo_jax
from lomo_jax.training import devices
from lomo_jax.training.config import Config
from lomo_jax.training.model import Model
from lomo_jax.training.optimizer import make_optimizer, make_schedule


def make_step(config: Config, model: Model) -> lomo_jax.Step:
    """Returns the step of a run, not compiled."""
    schedule = make_schedule(config.schedule, config.learning_rate, config.steps, config.warmup)
    tx = make_optimizer(config.optimizer, schedule, dict(config.optimizer_kwargs))

    def loss(params: nnx.State, batch: Any) -> tuple[lomo_jax.WeightedLoss, Any]:
        mean, metrics = model.loss(params, batch)
        return lomo_jax.WeightedLoss(mean, metrics.weight), metrics

    make = lomo_jax.fused_step if config.fused else lomo_jax.reference_step
    return make(
        loss,
        tx,
        has_aux=True,
        clip_norm=config.clip_norm,
        microbatches=config.microbatches,
        loss_scale=_loss_scale(config),
        rounding=config.rounding,
        remat=config.remat,
        offload=lomo_jax.Offload(**vars(config.offload)),
    )


def _loss_scale(config: Config) -> lomo_jax.DynamicLossScale | None:
    if config.dynamic_loss_scale:
        return lomo_jax.DynamicLossScale()
    if config.skip_nonfinite:
        # A scale of 1 that neither falls nor grows: what is left of it is that steps are skipped.
        return lomo_jax.DynamicLossScale(initial=1.0, minimum=1.0, growth_interval=2**31 - 1)
    return None


def batch_shapes(config: Config, mesh: Mesh | AbstractMesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes of a `data.Batch`, divided among the devices."""
    shape = (config.batch_size, config.sequence_length)
    divided = devices.batch_sharding(mesh)
    int32, float32 = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=divided) for dtype in (jnp.int32, jnp.float32)
    )
    names = ("tokens", "positions", "segments", "targets")
    return dict.fromkeys(names, int32) | {"weights": float32}


def layer_inputs(config: Config, model: Model, mesh: Mesh | AbstractMesh) -> int:
    """Returns the bytes of the layer inputs that a device keeps for the backward pass."""
    shape = devices.batch_sharding(mesh).shard_shape((config.batch_size, config.sequence_length))
    width = model.config.num_layers * model.config.width
    return math.prod(shape) * width * jnp.dtype(config.param_dtype).itemsize
