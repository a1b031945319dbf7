"""The trainer behind `train.py`: config, loop, metrics, evaluation, export."""

from lomo_jax.training.config import Architecture as Architecture
from lomo_jax.training.config import Config as Config
from lomo_jax.training.config import DataConfig as DataConfig
from lomo_jax.training.config import MeshConfig as MeshConfig
from lomo_jax.training.config import ModelConfig as ModelConfig
from lomo_jax.training.config import OffloadConfig as OffloadConfig
