"""The fused step: cut a loss at its layer scans, walk it back, update every layer on the way."""

from lomo_jax.fused.step import Step as Step
from lomo_jax.fused.step import StepOutput as StepOutput
from lomo_jax.fused.step import StepState as StepState
from lomo_jax.fused.step import fused_step as fused_step
from lomo_jax.fused.step import reference_step as reference_step
