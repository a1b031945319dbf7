"""The model that a run trains."""

import itertools
import os
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from lomo_jax import models, run_files, sharding
from lomo_jax.data import package_path
from lomo_jax.errors import ConfigError
from lomo_jax.losses import Metrics, next_token_loss
from lomo_jax.training import workdir
from lomo_jax.training.config import Config

_PACKAGE = "package://"


class Model(NamedTuple):
    """A model apart from its weights, which change."""

    config: models.LlamaConfig
    graphdef: nnx.GraphDef[models.Llama]

    def loss(self, params: nnx.State, batch: Any) -> tuple[jax.Array, Metrics]:
        """Returns the mean next-token loss of a `data.Batch`, and what it counted."""
        model = nnx.merge(self.graphdef, params)
        x_BxTxD = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        return next_token_loss(x_BxTxD, model.head(), batch["targets"], batch["weights"])


def abstract(
    config: Config,
    capability: tuple[int, int] | None,
    mesh: Mesh | AbstractMesh | None = None,
) -> tuple[Model, nnx.State]:
    """Builds the model, and reads or computes no weights.

    Args:
      config: A validated config. Without a checkpoint the model is of `config.model.architecture`.
      capability: The compute capability of the NVIDIA GPU to run on, None for another device.
      mesh: Of the devices to run on; None for the default device.

    Returns:
      The model, and its weights as `jax.ShapeDtypeStruct`, divided among the devices.

    Raises:
      ConfigError: The model is too short for `sequence_length`, or the model or the GPU does not
        go with `attention`, `param_dtype` or `mesh`.
      FileNotFoundError: The checkpoint does not exist.
      ValueError: The checkpoint's shape is damaged or not supported.
    """
    source = config.model
    if source.init == "checkpoint" and source.path is not None:
        shape = models.load_config(_hf_path(source.path))
    else:
        shape = models.LlamaConfig(**vars(source.architecture))
    if config.sequence_length > shape.max_length:
        raise ConfigError(
            f"sequence_length: {config.sequence_length} is longer than the model allows, "
            f"{shape.max_length} tokens; lower it"
        )
    attention = _attention(config, shape.head_dim, capability)
    if config.param_dtype == "bfloat16" and capability is not None and capability < (8, 0):
        raise ConfigError(
            "param_dtype: 'bfloat16' takes a GPU from Ampere on; set --config.param_dtype=float16 "
            "--config.dynamic_loss_scale=true"
        )
    graphdef, params = models.abstract(shape, jnp.dtype(config.param_dtype), attention)
    if mesh is not None:
        try:
            params = sharding.with_shardings(params, models.shardings(shape, params, mesh))
        except ValueError as error:
            raise ConfigError(f"mesh: {error}") from error
    return Model(shape, graphdef), params


def load_params(config: Config, model: Model, mesh: Mesh | None = None) -> nnx.State:
    """Reads the checkpoint, or draws random weights.

    Args:
      config: A validated config.
      model: Of `abstract`.
      mesh: Of the devices among which the weights are divided; None for the default device.

    Returns:
      The weights in `config.param_dtype`; in host memory with `config.offload.params`, where they
      go without passing through the device's as a whole.

    Raises:
      FileNotFoundError: The checkpoint or one of its files does not exist.
      ValueError: The checkpoint is damaged or not supported.
    """
    dtype, on_host = jnp.dtype(config.param_dtype), config.offload.params
    if config.model.init == "random":
        return models.init_layer_by_layer(
            model.config, config.seed, dtype, on_host=on_host, mesh=mesh
        )
    assert config.model.path is not None, "validate() asks for it"
    run = workdir.locate(config.model.path)
    if run is None:
        return models.load(resolve(config.model.path), dtype, on_host=on_host, mesh=mesh)[1]
    from lomo_jax.training import checkpoint  # slow to import, and a plan needs no weights

    shapes = models.abstract(model.config, dtype)[1]
    if mesh is not None:
        shapes = sharding.with_shardings(shapes, models.shardings(model.config, shapes, mesh))
    return checkpoint.read_params(*run, on_host_like(shapes) if on_host else shapes)[0]


def load_tokenizer(config: Config, model: Model) -> PreTrainedTokenizerBase:
    """Reads the tokenizer that stands beside the checkpoint; without a path, a token is a byte.

    Raises:
      ConfigError: The model is smaller than the tokenizer's vocabulary.
      FileNotFoundError, ValueError: The files are not there or damaged.
    """
    path = None if config.model.path is None else _hf_path(config.model.path)
    tokenizer = _byte_tokenizer() if path is None else models.tokenizer(path)
    if len(tokenizer) > model.config.vocab_size:
        raise ConfigError(
            f"model: the tokenizer has {len(tokenizer)} tokens, but the model only "
            f"{model.config.vocab_size}; use the tokenizer that the model was trained with"
        )
    return tokenizer


def compute_capability() -> tuple[int, int] | None:
    """Returns that of the NVIDIA GPU that JAX runs on; None on any other device."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    # Of an AMD GPU it is a name, such as gfx942.
    major, _, minor = str(capability).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def resolve(path: str) -> str:
    """Returns the path on disk; package://NAME/PATH lies in the installed package NAME."""
    if not path.startswith(_PACKAGE):
        return os.path.expanduser(path)
    return package_path(*path.removeprefix(_PACKAGE).split("/"))


def on_host_like(shapes: Any) -> Any:
    """Returns shapes with shardings, of the same arrays in host memory."""
    kinds = jax.tree.map(lambda x: x.sharding.with_memory_kind("pinned_host"), shapes)
    return sharding.with_shardings(shapes, kinds)


def _hf_path(path: str) -> str:
    """Returns where config.json and tokenizer lie: of a run's checkpoint, in its workdir."""
    run = workdir.locate(path)
    return resolve(path) if run is None else str(run[0] / run_files.MODEL)


def _attention(config: Config, head_dim: int, capability: tuple[int, int] | None) -> str:
    """Returns the implementation to use, "cudnn" wherever `config.attention` and cuDNN allow it."""
    # What cuDNN's flash attention asks for. cuDNN itself is there: JAX finds no NVIDIA GPU and
    # compiles for none without it.
    obstacles = {
        "there is no NVIDIA GPU": capability is None,
        "the GPU is older than Ampere": capability is not None and capability < (8, 0),
        f"param_dtype={config.param_dtype}": config.param_dtype not in ("bfloat16", "float16"),
        f"the model has head_dim={head_dim}": head_dim > 128 or head_dim % 8 != 0,
        f"sequence_length={config.sequence_length} is odd": config.sequence_length % 2 != 0,
    }
    why_not = next(itertools.compress(obstacles, obstacles.values()), None)
    if config.attention == "cudnn" and why_not is not None:
        raise ConfigError(
            f"attention: 'cudnn' cannot be, {why_not}; it takes a GPU from Ampere on, bfloat16 or "
            "float16, head_dim a multiple of 8 up to 128 and an even sequence_length; leave it at "
            "auto"
        )
    if config.attention == "auto":
        return "xla" if why_not is not None else "cudnn"
    return config.attention


def _byte_tokenizer() -> PreTrainedTokenizerFast:
    """Returns a tokenizer that needs no training: a token is a byte, or the end of the text."""
    end = "<|endoftext|>"
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate([end, *bytes_])}
    backend = Tokenizer(BPE(tokens, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
