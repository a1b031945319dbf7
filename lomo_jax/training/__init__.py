"""Training: config, loop, checkpoints, logging, evaluation, export."""

from lomo_jax.training.config import Config as Config
from lomo_jax.training.config import DataConfig as DataConfig
from lomo_jax.training.config import LoraConfig as LoraConfig
from lomo_jax.training.config import MeshConfig as MeshConfig
from lomo_jax.training.config import ModelConfig as ModelConfig
from lomo_jax.training.config import to_dict as to_dict
