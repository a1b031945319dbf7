"""The fused step: a backward pass that updates each layer before the next gradient exists.

`docs/how-it-works.md` explains it with a picture. Start reading at `step.py`.
"""

from lomo_jax.fused.base import Step as Step
from lomo_jax.fused.base import StepOutput as StepOutput
from lomo_jax.fused.base import StepState as StepState
from lomo_jax.fused.explain import Explanation as Explanation
from lomo_jax.fused.explain import Piece as Piece
from lomo_jax.fused.explain import WholeStack as WholeStack
from lomo_jax.fused.microbatches import WeightedLoss as WeightedLoss
from lomo_jax.fused.options import REMAT_POLICIES as REMAT_POLICIES
from lomo_jax.fused.options import ROUNDINGS as ROUNDINGS
from lomo_jax.fused.options import SKIPS as SKIPS
from lomo_jax.fused.options import DynamicLossScale as DynamicLossScale
from lomo_jax.fused.options import LossScaleState as LossScaleState
from lomo_jax.fused.options import Offload as Offload
from lomo_jax.fused.reference import reference_step as reference_step
from lomo_jax.fused.step import fused_step as fused_step
