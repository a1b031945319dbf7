"""Reading a model from a Hugging Face directory, the hub or a GGUF file."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType
from typing import Any

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lomo_jax.errors import UserError
from lomo_jax.models import hub
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.decoder import Decoder, abstract


def load(
    path: str | os.PathLike[str],
    param_dtype: DTypeLike = jnp.float32,
    *,
    attention: str = "xla",
    on_host: bool = False,
    mesh: Mesh | None = None,
    quantized: str = "none",
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Reads a model of any family of `lomo_jax.models.FAMILIES`.

    Files are memory-mapped and copied tensor by tensor into the stacked parameters, so memory holds
    the parameters and one tensor.

    Args:
      path: A Hugging Face directory (config.json and one or more .safetensors files), the id of a
        model on the hub ("owner/name", "owner/name@revision"), or a GGUF file, whose quantised
        weights are dequantised.
      param_dtype: The parameters' dtype; weights of another dtype are cast.
      attention: "xla", "cudnn" or "pallas"; see `Decoder`.
      on_host: Whether to place the parameters in host memory. The device then holds at most one
        tensor.
      mesh: A mesh from `lomo_jax.sharding.make_mesh` to shard the parameters over, by
        `lomo_jax.models.RULES`. Default: the default device.
      quantized: "int8" or "nf4" to quantise the kernels of the layers, one tensor at a time; see
        `lomo_jax.quantize`.

    Returns:
      `(graphdef, params)` as from `nnx.split` of a `Decoder`: `nnx.merge(graphdef, params)(tokens)`
      gives logits.

    Raises:
      UserError: A file is missing or damaged, the files do not belong together, or the model is
        not supported.
    """
    path = local_path(path, weights=True)
    placement = {"on_host": on_host, "mesh": mesh, "quantized": quantized}
    config, params = _format(path).load(path, param_dtype, **placement)
    source = str(path) if path.is_dir() else None
    return abstract(config, param_dtype, attention, source, quantized)[0], params


def load_config(path: str | os.PathLike[str]) -> DecoderConfig:
    """Reads the shape of a model, without its weights.

    Args:
      path: A GGUF file, or a Hugging Face directory, which needs only a config.json.

    Returns:
      The model's shape.

    Raises:
      UserError: The file is missing or damaged, or the model is not supported.
    """
    path = local_path(path, weights=False)
    return _format(path).load_config(path)


def tokenizer(path: str | os.PathLike[str]) -> Any:
    """Reads the tokenizer of a model. Code in the model's directory is never run.

    Args:
      path: A Hugging Face directory, or a GGUF file, whose metadata holds the tokenizer.

    Returns:
      A `transformers.PreTrainedTokenizerBase`, with the model's chat template if it has one.

    Raises:
      UserError: The tokenizer is missing, damaged or not supported.
    """
    path = local_path(path, weights=False)
    return _format(path).load_tokenizer(path)


def local_path(path: str | os.PathLike[str], *, weights: bool) -> Path:
    """Returns a path on disk; a model of the hub is downloaded into the cache first.

    Args:
      path: A path, or the id of a model on the hub: "owner/name" or "owner/name@revision".
      weights: Whether to download the weights too.

    Raises:
      UserError: The model is not on the hub or cannot be downloaded.
    """
    if not hub.is_id(path):
        return Path(path)
    return hub.fetch(str(path), weights=weights)


def _format(path: Path) -> ModuleType:
    """Returns the module that reads a model in this format."""
    if path.is_dir():
        from lomo_jax.models import huggingface

        return huggingface
    if path.is_file() and path.suffix == ".gguf":
        from lomo_jax.models import gguf

        return gguf
    problem = "is no model" if path.exists() else "does not exist"
    raise UserError(
        f"{path} {problem}; give a model directory, a .gguf file or the id of a model on the hub"
    )
