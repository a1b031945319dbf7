"""Hugging Face's config.json, of transformers 4 and 5, to and from a `DecoderConfig`."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from jax.typing import DTypeLike

from lomo_jax._schema import MODEL_CONFIG, short
from lomo_jax.errors import UserError, did_you_mean
from lomo_jax.models.config import ROPE_SCALINGS, DecoderConfig, RopeScaling
from lomo_jax.models.families import FAMILIES, Family

Json = Mapping[str, Any]

_ACTIVATIONS = {  # name in config.json -> ours
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "relu2": "relu2",
}
_EPS = ("rms_norm_eps", "layer_norm_eps", "norm_eps")
_OLD_NAMES = {"LLaMAForCausalLM": "LlamaForCausalLM"}


def read_config(hf: Json) -> DecoderConfig:
    """Converts the contents of a config.json.

    Raises:
      UserError: The architecture or a feature is not supported, or a key is missing or has a value
        of the wrong type or out of range.
    """
    MODEL_CONFIG.check(hf)
    name = family_name(hf)
    family = FAMILIES[name]
    if hf.get("quantization_config") is not None:
        raise UserError(
            f"quantization_config={short(hf['quantization_config'])} is not supported; "
            "use the model's original weights"
        )
    hf = {**family.defaults, **hf}
    try:
        width, num_heads = hf["hidden_size"], hf["num_attention_heads"]
        head_dim = hf.get("head_dim") or width // num_heads
        eos_id = hf.get("eos_token_id")
        attention_bias = bool(hf.get("attention_bias", False))
        fields = {
            "family": name,
            "vocab_size": hf["vocab_size"],
            "width": width,
            "mlp_width": hf["intermediate_size"],
            "num_layers": hf["num_hidden_layers"],
            "num_heads": num_heads,
            "num_kv_heads": hf.get("num_key_value_heads") or num_heads,
            "head_dim": head_dim,
            "norm_eps": next((hf[key] for key in _EPS if key in hf), 1e-6),
            "max_length": hf.get("max_position_embeddings", 2048),
            "tie_embeddings": hf.get("tie_word_embeddings", False),
            "bos_id": hf.get("bos_token_id"),
            "eos_id": tuple(eos_id) if isinstance(eos_id, list) else eos_id,
            "activation": _activation(hf),
            "attention_bias": attention_bias,
            "output_bias": attention_bias,
            "mlp_bias": hf.get("mlp_bias", False),
        }
        fields |= family.read(hf)
        fields |= _read_rope(hf, head_dim, fields)
        return DecoderConfig(**fields)
    except KeyError as error:
        raise UserError(f"the key {error} is missing") from None


def write_config(config: DecoderConfig, dtype: DTypeLike) -> dict[str, Any]:
    """Returns the contents of a config.json for weights of `dtype`.

    For models that have no original config.json. The keys are those of transformers 4;
    transformers 5 reads them too.

    Raises:
      UserError: The family cannot be written without an original.
    """
    family = FAMILIES[config.family]
    activation = next(hf for hf, ours in _ACTIVATIONS.items() if ours == config.activation)
    written = {
        "architectures": [family.architecture],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.width,
        "intermediate_size": config.mlp_width,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": activation,
        "attention_bias": config.attention_bias,
        "mlp_bias": config.mlp_bias,
        "rope_theta": config.rope_theta,
        "rope_scaling": _write_rope(config.rope_scaling),
        _eps_key(family): config.norm_eps,
        "max_position_embeddings": config.max_length,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": config.bos_id,
        "eos_token_id": list(config.eos_id) if isinstance(config.eos_id, tuple) else config.eos_id,
        "torch_dtype": jnp.dtype(dtype).name,
        **family.write(config),
    }
    if read_config(written) != config:
        lost = _differences(config, read_config(written))
        raise UserError(
            f"the {config.family} model cannot be exported without the folder that it came from "
            f"({lost}); give that folder as `like`"
        )
    return written


def family_name(hf: Json) -> str:
    """Returns the key of `FAMILIES` for the contents of a config.json."""
    found = hf.get("architectures") or []
    names = {family.architecture: name for name, family in FAMILIES.items()}
    if found:
        architecture: str = found[0]
        name = names.get(_OLD_NAMES.get(architecture, architecture)) if len(found) == 1 else None
    else:
        name = hf.get("model_type")
    if name is None or name not in FAMILIES:
        named = ", ".join(found) if found else f"model_type {short(hf.get('model_type'))}"
        hint = did_you_mean(named, names) or "; python -m lomo_jax.models prints those that are"
        raise UserError(f"architecture {named} is not supported{hint}")
    return name


def _activation(hf: Json) -> str:
    found = hf.get("hidden_activation") or hf.get("hidden_act", "silu")
    if found not in _ACTIVATIONS:
        raise UserError(
            f"hidden_act={short(found)} is not supported; supported: "
            f"{', '.join(map(repr, _ACTIVATIONS))}"
        )
    return _ACTIVATIONS[found]


def _read_rope(hf: Json, head_dim: int, fields: Json) -> dict[str, Any]:
    """Returns the fields about rotary embeddings.

    transformers 4 has rope_theta and rope_scaling, transformers 5 one rope_parameters, which may
    hold one dict for each kind of layer.
    """
    rope = {**(hf.get("rope_scaling") or {}), **(hf.get("rope_parameters") or {})}
    local = rope.pop("sliding_attention", None)
    rope |= rope.pop("full_attention", None) or {}
    theta = float(rope.get("rope_theta") or hf.get("rope_theta") or 10000.0)
    share = rope.get("partial_rotary_factor") or hf.get("partial_rotary_factor") or 1.0
    found: dict[str, Any] = {"rope_theta": theta}
    if share != 1:
        dim = int(head_dim * share)
        found["rotary_dim"] = dim
    if (scaling := _read_scaling(rope, hf)) is not None:
        found["rope_scaling"] = scaling
    if growth := rope.get("llama_4_scaling_beta"):
        found["query_growth"] = float(growth)
    if fields.get("local_rope_theta") is not None:
        if local is not None and (kind := _kind(local)) != "default":
            raise UserError(
                f"rope scaling {short(kind)} of sliding layers is not supported; "
                "supported: 'default'"
            )
        base = (local or {}).get("rope_theta", fields["local_rope_theta"])
        found["local_rope_theta"] = float(base)
    return found


def _kind(rope: Json) -> str:
    kind = rope.get("rope_type", rope.get("type", "default"))
    return "longrope" if kind == "su" else kind  # its first name


def _read_scaling(rope: Json, hf: Json) -> RopeScaling | None:
    kind = _kind(rope)
    if kind == "default":
        return None
    if kind not in ROPE_SCALINGS:
        return RopeScaling(kind)  # which refuses it
    longest = hf.get("max_position_embeddings", 2048)
    original = (
        hf.get("original_max_position_embeddings")
        or rope.get("original_max_position_embeddings")
        or longest
    )
    factor = rope.get("factor")
    if factor is None and kind in ("yarn", "longrope"):
        factor = longest / original
    if factor is None:
        raise KeyError("factor")
    fields: dict[str, Any] = {}
    match kind:
        case "dynamic" if rope.get("alpha"):
            raise UserError(
                f"rope scaling 'dynamic' with alpha={short(rope['alpha'])} is not supported; "
                "supported: factor alone"
            )
        case "llama3":
            fields = {
                "low_freq_factor": rope["low_freq_factor"],
                "high_freq_factor": rope["high_freq_factor"],
                "original_max_length": rope["original_max_position_embeddings"],
            }
        case "yarn":
            fields = {
                "original_max_length": original,
                "fast_turns": float(rope.get("beta_fast") or 32),
                "slow_turns": float(rope.get("beta_slow") or 1),
                "truncate": rope.get("truncate", True),
                "magnitude": _yarn_magnitude(rope, factor),
            }
        case "longrope":
            fields = {
                "original_max_length": original,
                "short_factors": tuple(map(float, rope["short_factor"])),
                "long_factors": tuple(map(float, rope["long_factor"])),
                "magnitude": _longrope_magnitude(rope, original, factor),
            }
    return RopeScaling(kind, factor, **fields)


def _yarn_magnitude(rope: Json, factor: float) -> float:
    def magnitude(factor: float, share: float = 1.0) -> float:
        return 1.0 if factor <= 1 else 0.1 * share * math.log(factor) + 1.0

    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    if rope.get("mscale") and rope.get("mscale_all_dim"):
        return magnitude(factor, rope["mscale"]) / magnitude(factor, rope["mscale_all_dim"])
    return magnitude(factor)


def _longrope_magnitude(rope: Json, original: int, factor: float) -> float:
    if rope.get("attention_factor") is not None:
        return float(rope["attention_factor"])
    return 1.0 if factor <= 1 else math.sqrt(1 + math.log(factor) / math.log(original))


def _write_rope(scaling: RopeScaling | None) -> dict[str, Any] | None:
    if scaling is None:
        return None
    written: dict[str, Any] = {"rope_type": scaling.kind, "factor": scaling.factor}
    if scaling.kind in ("llama3", "yarn", "longrope"):
        written["original_max_position_embeddings"] = scaling.original_max_length
    if scaling.kind == "llama3":
        written["low_freq_factor"] = scaling.low_freq_factor
        written["high_freq_factor"] = scaling.high_freq_factor
    if scaling.kind == "yarn":
        written["beta_fast"], written["beta_slow"] = scaling.fast_turns, scaling.slow_turns
        written["truncate"] = scaling.truncate
    if scaling.kind in ("yarn", "longrope"):
        written["attention_factor"] = scaling.magnitude
    if scaling.kind == "longrope":
        written["short_factor"] = list(scaling.short_factors)
        written["long_factor"] = list(scaling.long_factors)
    return written


def _eps_key(family: Family) -> str:
    return next((key for key in _EPS if key in family.defaults), _EPS[0])


def _differences(a: DecoderConfig, b: DecoderConfig) -> str:
    names = [f.name for f in dataclasses.fields(a) if getattr(a, f.name) != getattr(b, f.name)]
    return ", ".join(f"{name}={getattr(a, name)!r}" for name in names)
