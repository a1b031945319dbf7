"""GGUF files of llama.cpp: weights and shape of a LLaMA-family model, in.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lomo_jax.models.config import LlamaConfig
from lomo_jax.models.weights import GGUF_NAMES, Tensor, assemble


class Metadata:
    """The key-value part of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader, source: str) -> None:
        self._fields = reader.fields
        self._source = source

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key as Python objects, or the default."""
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise ValueError(f"{self._source} lacks the metadata {key}")
        return self._fields[key].contents()


def open_gguf(path: Path) -> tuple[Metadata, list[gguf.ReaderTensor]]:
    """Memory-maps a GGUF file.

    Raises:
      ValueError: the file is truncated or not GGUF.
    """
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise ValueError(
            f"{path} is truncated or not a GGUF file ({error}); download it again"
        ) from None
    return Metadata(reader, str(path)), reader.tensors


def load_config(path: Path) -> LlamaConfig:
    """Reads the header of a GGUF file; see `lomo_jax.models.load_config`."""
    return _config(path, *open_gguf(path))


def load(path: Path, param_dtype: DTypeLike, **where: Any) -> tuple[LlamaConfig, nnx.State]:
    """Reads a GGUF file, dequantising its tensors one by one; see `lomo_jax.models.load`."""
    metadata, tensors = open_gguf(path)
    config = _config(path, metadata, tensors)
    read = [_tensor(tensor, config) for tensor in tensors]
    return config, assemble(config, param_dtype, read, GGUF_NAMES, str(path), **where)


def _config(path: Path, metadata: Metadata, tensors: list[gguf.ReaderTensor]) -> LlamaConfig:
    try:
        return _shape(metadata, {tensor.name for tensor in tensors})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def _shape(metadata: Metadata, tensor_names: set[str]) -> LlamaConfig:
    if (architecture := metadata["general.architecture"]) != "llama":
        raise ValueError(f"architecture {architecture} is not supported; supported: llama")
    for key, supported in {"llama.expert_count": 0, "llama.rope.scaling.type": "none"}.items():
        if (value := metadata.get(key, supported)) != supported:
            raise ValueError(f"{key}={value!r} is not supported; supported: {supported!r}")
    if "rope_freqs.weight" in tensor_names:
        raise ValueError(
            "scaled rotary frequencies (the tensor rope_freqs.weight) are supported from Hugging "
            "Face directories only; use the model's original weights"
        )
    width = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    return LlamaConfig(
        vocab_size=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
        width=width,
        mlp_width=metadata["llama.feed_forward_length"],
        num_layers=metadata["llama.block_count"],
        num_heads=num_heads,
        num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
        head_dim=metadata.get("llama.attention.key_length", width // num_heads),
        rope_theta=_decimal(metadata.get("llama.rope.freq_base", 10000.0)),
        norm_eps=_decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
        max_length=metadata["llama.context_length"],
        tie_embeddings=GGUF_NAMES["output/kernel"] not in tensor_names,
        bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
        eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
    )


def _tensor(tensor: gguf.ReaderTensor, config: LlamaConfig) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def read() -> np.ndarray:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            # llama.cpp turns neighbouring rows (2i, 2i + 1), Hugging Face rows (i, i + h / 2).
            pairs = weight.reshape(-1, config.head_dim // 2, 2, shape[1])
            weight = pairs.swapaxes(1, 2).reshape(shape)
        return weight

    return Tensor(tensor.name, shape, read)


def _decimal(value: float) -> float:
    """Returns the short decimal that was stored as float32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))
