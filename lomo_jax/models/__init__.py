"""A decoder in Flax nnx for many families, and its weights from and to files that people exchange.

A name's module is imported when the name is first used: `DecoderConfig` needs no Flax, and a model
from a GGUF file no safetensors.
"""

from typing import TYPE_CHECKING

from lomo_jax import _lazy

if TYPE_CHECKING:
    from lomo_jax.models.config import DecoderConfig as DecoderConfig
    from lomo_jax.models.config import RopeScaling as RopeScaling
    from lomo_jax.models.decoder import RULES as RULES
    from lomo_jax.models.decoder import Decoder as Decoder
    from lomo_jax.models.decoder import abstract as abstract
    from lomo_jax.models.decoder import init as init
    from lomo_jax.models.decoder import shardings as shardings
    from lomo_jax.models.export_folder import check_save_path as check_save_path
    from lomo_jax.models.generation import generate as generate
    from lomo_jax.models.generation import generate_text as generate_text
    from lomo_jax.models.huggingface import save as save
    from lomo_jax.models.huggingface import save_config as save_config
    from lomo_jax.models.loading import load as load
    from lomo_jax.models.loading import load_config as load_config
    from lomo_jax.models.loading import local_path as local_path
    from lomo_jax.models.loading import tokenizer as tokenizer
    from lomo_jax.models.sampling import Sampling as Sampling
    from lomo_jax.models.weights import init_layer_by_layer as init_layer_by_layer

__getattr__, __dir__ = _lazy.attach(
    __name__,
    {
        "config": ["DecoderConfig", "RopeScaling"],
        "export_folder": ["check_save_path"],
        "generation": ["generate", "generate_text"],
        "huggingface": ["save", "save_config"],
        "decoder": ["RULES", "Decoder", "abstract", "init", "shardings"],
        "loading": ["load", "load_config", "local_path", "tokenizer"],
        "sampling": ["Sampling"],
        "weights": ["init_layer_by_layer"],
    },
)
