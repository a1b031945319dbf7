"""Reading a model from wherever it is stored."""

from __future__ import annotations

import os
from pathlib import Path
from types import ModuleType

import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jax.typing import DTypeLike

from lomo_jax.models.config import LlamaConfig


def load(
    path: str | os.PathLike[str],
    param_dtype: DTypeLike = jnp.float32,
    *,
    on_host: bool = False,
    mesh: Mesh | None = None,
) -> tuple[LlamaConfig, nnx.State]:
    """Reads a LLaMA-family model.

    Files are memory-mapped and read tensor by tensor straight into the stacked parameters, so
    memory holds the parameters and one tensor.

    Args:
      path: a Hugging Face directory (config.json and one or several .safetensors files), or a
        GGUF file, whose quantised weights are dequantised.
      param_dtype: of the parameters, whatever that of the file.
      on_host: whether the parameters go to host memory; the device then holds one tensor at most.
      mesh: of `lomo_jax.sharding.make_mesh`, the devices among which the parameters are divided by
        `lomo_jax.models.RULES`; each gets its own part.

    Returns:
      (config, params), params as `nnx.split` of a `Llama` gives them; `abstract(config)` has the
      graphdef.

    Raises:
      FileNotFoundError: the path or one of its files does not exist.
      ValueError: the files are damaged, do not fit together, or hold a model that is not supported.
    """
    return _format(Path(path)).load(Path(path), param_dtype, on_host=on_host, mesh=mesh)


def load_config(path: str | os.PathLike[str]) -> LlamaConfig:
    """Reads the shape of a LLaMA-family model, and no weights.

    Args:
      path: a Hugging Face directory, of which only config.json need be there, or a GGUF file.

    Raises:
      FileNotFoundError: the path or its config.json does not exist.
      ValueError: the file is damaged, or of a model that is not supported.
    """
    return _format(Path(path)).load_config(Path(path))


def _format(path: Path) -> ModuleType:
    """Returns the module that reads the files at `path`."""
    if path.is_dir():
        from lomo_jax.models import huggingface

        return huggingface
    if is_gguf(path):
        from lomo_jax.models import gguf

        return gguf
    raise ValueError(f"{path} is neither a Hugging Face directory nor a .gguf file")


def is_gguf(path: Path) -> bool:
    """Whether a path is a GGUF file, going by its name.

    Raises:
      FileNotFoundError: it does not exist.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; give a model directory or a .gguf file")
    return path.is_file() and path.suffix == ".gguf"
