"""The shape of a LLaMA-family model, and its translation from and to a Hugging Face config.json."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

_ARCHITECTURE = "LlamaForCausalLM"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The "llama3" stretching of rotary frequencies, for a context longer than the first one.

    References:
      Llama Team, The Llama 3 Herd of Models, arXiv 2407.21783.
    """

    factor: float  # the slow frequencies are divided by it
    low_freq_factor: float  # slower than this many turns in original_max_length: divided
    high_freq_factor: float  # faster than this many turns: kept; between the two: interpolated
    original_max_length: int  # tokens, the context the frequencies were chosen for

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require_positive(self, field.name)
        if self.high_freq_factor <= self.low_freq_factor:
            raise ValueError(
                f"rope scaling: high_freq_factor={self.high_freq_factor} must be greater than "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA-family decoder.

    Raises:
      ValueError: a size is not positive, the heads do not divide, or head_dim is odd.
    """

    vocab_size: int  # V
    width: int  # D, of the residual stream
    mlp_width: int  # F
    num_layers: int  # L
    num_heads: int  # H, of the queries
    num_kv_heads: int  # K, each shared by H / K query heads
    head_dim: int  # h; D / H in most models, but free
    rope_theta: float = 10000.0
    norm_eps: float = 1e-5
    max_length: int = 2048  # tokens; the longest sequence the model was made for
    tie_embeddings: bool = False  # the output head is the transposed embedding
    rope_scaling: RopeScaling | None = None
    bos_id: int | None = None
    eos_id: int | tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_length", "rope_theta", "norm_eps"):
            _require_positive(self, name)
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise ValueError(f"head_dim={self.head_dim} must be even: rotary embeddings turn pairs")

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """Reads the contents of a Hugging Face config.json, of transformers 4 or 5.

        Raises:
          ValueError: the architecture or a feature is not supported, or a key is missing.
        """
        named = ", ".join(hf.get("architectures") or []) or f"model_type {hf.get('model_type')!r}"
        if named not in (_ARCHITECTURE, "model_type 'llama'"):
            raise ValueError(f"architecture {named} is not supported; supported: {_ARCHITECTURE}")
        required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, supported in (required | {"quantization_config": None}).items():
            if hf.get(key, supported) != supported:
                raise ValueError(f"{key}={hf[key]!r} is not supported; supported: {supported!r}")
        try:
            width, num_heads = hf["hidden_size"], hf["num_attention_heads"]
            eos_id = hf.get("eos_token_id")
            rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
            return cls(
                vocab_size=hf["vocab_size"],
                width=width,
                mlp_width=hf["intermediate_size"],
                num_layers=hf["num_hidden_layers"],
                num_heads=num_heads,
                num_kv_heads=hf.get("num_key_value_heads") or num_heads,
                head_dim=hf.get("head_dim") or width // num_heads,
                rope_theta=float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0),
                norm_eps=hf.get("rms_norm_eps", 1e-6),
                max_length=hf.get("max_position_embeddings", 2048),
                tie_embeddings=hf.get("tie_word_embeddings", False),
                rope_scaling=_rope_scaling_from_hf(rope),
                bos_id=hf.get("bos_token_id"),
                eos_id=tuple(eos_id) if isinstance(eos_id, list) else eos_id,
            )
        except KeyError as error:
            raise ValueError(f"the key {error} is missing from the model's configuration") from None

    def to_hf(self, dtype: DTypeLike) -> dict[str, Any]:
        """Returns the contents of a config.json for weights of `dtype`.

        The keys are those of transformers 4, which transformers 5 reads as well.
        """
        scaling = self.rope_scaling
        return {
            "architectures": [_ARCHITECTURE],
            "model_type": "llama",
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "intermediate_size": self.mlp_width,
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "attention_bias": False,
            "mlp_bias": False,
            "rope_theta": self.rope_theta,
            "rope_scaling": scaling
            and {
                "rope_type": "llama3",
                "factor": scaling.factor,
                "low_freq_factor": scaling.low_freq_factor,
                "high_freq_factor": scaling.high_freq_factor,
                "original_max_position_embeddings": scaling.original_max_length,
            },
            "rms_norm_eps": self.norm_eps,
            "max_position_embeddings": self.max_length,
            "tie_word_embeddings": self.tie_embeddings,
            "bos_token_id": self.bos_id,
            "eos_token_id": list(self.eos_id) if isinstance(self.eos_id, tuple) else self.eos_id,
            "torch_dtype": jnp.dtype(dtype).name,
        }


def _rope_scaling_from_hf(rope: Mapping[str, Any]) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind != "llama3":
        raise ValueError(f"rope scaling {kind!r} is not supported; supported: 'default', 'llama3'")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_length=rope["original_max_position_embeddings"],
    )


def _require_positive(config: Any, name: str) -> None:
    value = getattr(config, name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name}={value!r} must be a number")
    if not value > 0:
        raise ValueError(f"{name}={value} must be greater than 0")
