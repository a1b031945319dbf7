"""Full fine-tuning of large language models, one layer's gradient at a time."""

from lomo_jax.adalomo import AdaLomoState as AdaLomoState
from lomo_jax.adalomo import adalomo as adalomo
from lomo_jax.fused import DynamicLossScale as DynamicLossScale
from lomo_jax.fused import Explanation as Explanation
from lomo_jax.fused import LossScaleState as LossScaleState
from lomo_jax.fused import Offload as Offload
from lomo_jax.fused import Piece as Piece
from lomo_jax.fused import Step as Step
from lomo_jax.fused import StepOutput as StepOutput
from lomo_jax.fused import StepState as StepState
from lomo_jax.fused import WeightedLoss as WeightedLoss
from lomo_jax.fused import WholeStack as WholeStack
from lomo_jax.fused import fused_step as fused_step
from lomo_jax.fused import reference_step as reference_step
from lomo_jax.lomo import LomoState as LomoState
from lomo_jax.lomo import lomo as lomo

__version__ = "0.1.0"
