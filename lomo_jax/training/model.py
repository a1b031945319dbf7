"""The model that a run trains."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lomo_jax import models
from lomo_jax.data import package_path
from lomo_jax.losses import Metrics, next_token_loss
from lomo_jax.training.config import Config
from lomo_jax.training.errors import ConfigError

_PACKAGE = "package://"


class Model(NamedTuple):
    """A model apart from its weights, which change."""

    config: models.LlamaConfig
    graphdef: nnx.GraphDef[models.Llama]
    tokenizer: PreTrainedTokenizerBase

    def loss(self, params: nnx.State, batch: Any) -> tuple[jax.Array, Metrics]:
        """Returns the mean next-token loss of a `data.Batch`, and what it counted."""
        model = nnx.merge(self.graphdef, params)
        x_BxTxD = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        return next_token_loss(x_BxTxD, model.head(), batch["targets"], batch["weights"])


def load(config: Config) -> tuple[Model, nnx.State]:
    """Reads the checkpoint, or draws random weights.

    Args:
      config: A validated config.

    Returns:
      The model, and its weights in `config.param_dtype`.

    Raises:
      ConfigError: The model is too short for `sequence_length`, or smaller than its vocabulary.
      FileNotFoundError: The checkpoint or one of its files does not exist.
      ValueError: The checkpoint is damaged or not supported.
    """
    source, dtype = config.model, jnp.dtype(config.param_dtype)
    path = None if source.path is None else resolve(source.path)
    # Where the weights come from: the checkpoint, or nothing.
    if source.init == "checkpoint":
        assert path is not None, "validate() asks for it"
        shape, params = models.load(path, dtype)
        graphdef, _ = models.abstract(shape, dtype)
    else:
        shape = models.LlamaConfig(**vars(source.architecture))
        graphdef, params = models.init(shape, config.seed, dtype)

    if config.sequence_length > shape.max_length:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} is longer than the model allows, "
            f"{shape.max_length} tokens; lower it"
        )
    tokenizer = _byte_tokenizer() if path is None else models.tokenizer(path)
    if len(tokenizer) > shape.vocab_size:
        raise ConfigError(
            f"model: the tokenizer has {len(tokenizer)} tokens, but the model only "
            f"{shape.vocab_size}; use the tokenizer that the model was trained with"
        )
    return Model(shape, graphdef, tokenizer), params


def resolve(path: str) -> str:
    """Returns the path on disk; package://NAME/PATH lies in the installed package NAME."""
    if not path.startswith(_PACKAGE):
        return path
    return package_path(*path.removeprefix(_PACKAGE).split("/"))


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that needs no training: a token is a byte, or the end of the text."""
    end = "<|endoftext|>"
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate([end, *bytes_])}
    backend = Tokenizer(BPE(tokens, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
