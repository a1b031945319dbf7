"""Reading a model from wherever it is stored."""

from __future__ import annotations

import os
from pathlib import Path

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from lomo_jax.models.config import LlamaConfig


def load(
    path: str | os.PathLike[str], param_dtype: DTypeLike = jnp.float32
) -> tuple[LlamaConfig, nnx.State]:
    """Reads a LLaMA-family model.

    Files are memory-mapped and read tensor by tensor straight into the stacked parameters, so
    memory holds the parameters and one tensor.

    Args:
      path: a Hugging Face directory (config.json and one or several .safetensors files), or a
        GGUF file, whose quantised weights are dequantised.
      param_dtype: of the parameters, whatever that of the file.

    Returns:
      (config, params), params as `nnx.split` of a `Llama` gives them; `abstract(config)` has the
      graphdef.

    Raises:
      FileNotFoundError: the path or one of its files does not exist.
      ValueError: the files are damaged, do not fit together, or hold a model that is not supported.
    """
    path = Path(path)
    if path.is_dir():
        from lomo_jax.models.huggingface import load_hf

        return load_hf(path, param_dtype)
    if is_gguf(path):
        from lomo_jax.models.gguf import load_gguf

        return load_gguf(path, param_dtype)
    raise ValueError(f"{path} is neither a Hugging Face directory nor a .gguf file")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, going by its name.

    Raises:
      FileNotFoundError: it does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a model directory or a .gguf file")
    return path.is_file() and path.suffix == ".gguf"
