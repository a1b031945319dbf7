"""The LLaMA family in Flax nnx, and its weights in and out."""

from lomo_jax.models.config import LlamaConfig as LlamaConfig
from lomo_jax.models.config import RopeScaling as RopeScaling
from lomo_jax.models.generate import generate as generate
from lomo_jax.models.huggingface import save as save
from lomo_jax.models.huggingface import save_config as save_config
from lomo_jax.models.llama import RULES as RULES
from lomo_jax.models.llama import Llama as Llama
from lomo_jax.models.llama import abstract as abstract
from lomo_jax.models.llama import init as init
from lomo_jax.models.llama import shardings as shardings
from lomo_jax.models.load import load as load
from lomo_jax.models.load import load_config as load_config
from lomo_jax.models.tokenizer import tokenizer as tokenizer
from lomo_jax.models.weights import init_layer_by_layer as init_layer_by_layer
