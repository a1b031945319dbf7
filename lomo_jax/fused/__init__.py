"""The fused step: cut a loss at its layer scans, walk it back, update every layer on the way."""

from lomo_jax.fused.base import ROUNDINGS as ROUNDINGS
from lomo_jax.fused.base import Step as Step
from lomo_jax.fused.base import StepOutput as StepOutput
from lomo_jax.fused.base import StepState as StepState
from lomo_jax.fused.loss_scale import DynamicLossScale as DynamicLossScale
from lomo_jax.fused.loss_scale import LossScaleState as LossScaleState
from lomo_jax.fused.microbatches import WeightedLoss as WeightedLoss
from lomo_jax.fused.offload import Offload as Offload
from lomo_jax.fused.remat import POLICIES as REMAT_POLICIES  # noqa: F401
from lomo_jax.fused.step import fused_step as fused_step
from lomo_jax.fused.step import reference_step as reference_step
