"""Small models and their files."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lomo_jax import models

CONFIG = models.DecoderConfig(
    vocab_size=31,
    width=16,
    mlp_width=24,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=4,
    norm_eps=1e-5,
    bos_id=1,
    eos_id=(2, 3),
)
TIED = dataclasses.replace(CONFIG, tie_embeddings=True)


@functools.cache
def graphdef_of(config):
    """Returns the structure of a model."""
    return models.abstract(config)[0]


def random_params(config, seed=0, dtype=jnp.float32):
    """Returns random parameters without compiling `models.init`."""
    rng = np.random.default_rng(seed)
    _, params = models.abstract(config, dtype)
    return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape), dtype), params)


@functools.cache
def word_tokenizer():
    backend = Tokenizer(tokenizer_models.WordLevel({"<unk>": 0, "one": 1}, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
