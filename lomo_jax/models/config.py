"""The shape of a LLaMA-family model, from and to Hugging Face's config.json."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from lomo_jax.errors import UserError

_ARCHITECTURE = "LlamaForCausalLM"


@dataclasses.dataclass(frozen=True)
class RopeScaling:
    """The "llama3" scaling of rotary frequencies, which extends a model's context.

    References:
      Llama Team, The Llama 3 Herd of Models, arXiv 2407.21783.
    """

    factor: float  # low frequencies are divided by it
    low_freq_factor: float  # a frequency is low below this many turns in original_max_length
    high_freq_factor: float  # and unchanged above this many; interpolated in between
    original_max_length: int  # tokens; the context length of pre-training

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            _require_positive(self, field.name, float)
        if self.high_freq_factor <= self.low_freq_factor:
            raise UserError(
                f"rope scaling: high_freq_factor={self.high_freq_factor} must be greater than "
                f"low_freq_factor={self.low_freq_factor}"
            )


@dataclasses.dataclass(frozen=True)
class LlamaConfig:
    """The shape of a LLaMA-family decoder; the defaults describe LLaMA-7B.

    Raises:
      UserError: A size is not a positive integer, `num_heads` is not a multiple of `num_kv_heads`,
        or `head_dim` is odd.
    """

    vocab_size: int = 32000  # V
    width: int = 4096  # D, of the residual stream
    mlp_width: int = 11008  # F
    num_layers: int = 32  # L
    num_heads: int = 32  # H, of the queries
    num_kv_heads: int = 32  # K, each shared by H / K query heads
    head_dim: int = 128  # h; D / H in most models, but independent of both
    rope_theta: float = 10000.0  # base of the rotary frequencies
    norm_eps: float = 1e-6  # added to the mean square in RMSNorm
    max_length: int = 2048  # tokens; the longest sequence that the model supports
    tie_embeddings: bool = False  # whether the output head is the transposed embedding
    rope_scaling: RopeScaling | None = None
    bos_id: int | None = None  # token that begins a text
    eos_id: int | tuple[int, ...] | None = None  # token or tokens that end a text

    def __post_init__(self) -> None:
        sizes = ("vocab_size", "width", "mlp_width", "num_layers", "num_heads", "num_kv_heads")
        for name in (*sizes, "head_dim", "max_length"):
            _require_positive(self, name, int)
        for name in ("rope_theta", "norm_eps"):
            _require_positive(self, name, float)
        if not isinstance(self.tie_embeddings, bool):
            raise UserError(f"tie_embeddings={self.tie_embeddings!r} must be true or false")
        if self.num_heads % self.num_kv_heads:
            raise UserError(
                f"num_heads={self.num_heads} must be a multiple of num_kv_heads={self.num_kv_heads}"
            )
        if self.head_dim % 2:
            raise UserError(
                f"head_dim={self.head_dim} must be even: rotary embeddings rotate pairs"
            )

    @classmethod
    def from_hf(cls, hf: Mapping[str, Any]) -> LlamaConfig:
        """Converts the contents of a Hugging Face config.json, of transformers 4 or 5.

        Raises:
          UserError: The architecture or a feature is not supported, or a key is missing or has a
            value of the wrong type.
        """
        found = hf.get("architectures") or [f"model_type {hf.get('model_type')!r}"]
        if found not in ([_ARCHITECTURE], ["model_type 'llama'"]):
            named = ", ".join(map(str, found if isinstance(found, list) else [found]))
            raise UserError(f"architecture {named} is not supported; supported: {_ARCHITECTURE}")
        required = {"hidden_act": "silu", "attention_bias": False, "mlp_bias": False}
        for key, supported in (required | {"quantization_config": None}).items():
            if hf.get(key, supported) != supported:
                raise UserError(f"{key}={hf[key]!r} is not supported; supported: {supported!r}")
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
            raise UserError(f"the key {error} is missing") from None
        except (AttributeError, ArithmeticError, TypeError) as error:
            raise UserError(f"a value has the wrong type or size: {error}") from None

    def to_hf(self, dtype: DTypeLike) -> dict[str, Any]:
        """Returns the contents of a config.json for weights of `dtype`.

        The keys are those of transformers 4; transformers 5 reads them too.
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
        raise UserError(f"rope scaling {kind!r} is not supported; supported: 'default', 'llama3'")
    return RopeScaling(
        factor=rope["factor"],
        low_freq_factor=rope["low_freq_factor"],
        high_freq_factor=rope["high_freq_factor"],
        original_max_length=rope["original_max_position_embeddings"],
    )


def _require_positive(config: Any, name: str, kind: type[int] | type[float]) -> None:
    value = getattr(config, name)
    allowed = int | float if kind is float else int
    if isinstance(value, bool) or not isinstance(value, allowed):
        raise UserError(f"{name}={value!r} must be {'an integer' if kind is int else 'a number'}")
    if not 0 < value < math.inf:
        raise UserError(f"{name}={value} must be greater than 0 and finite")
