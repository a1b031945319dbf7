"""The table of families: how each names its tensors, and how its config.json is read.

To add a family, add an entry here and a row to `tests/models/tiny_families.py`; see
docs/guides/families.md.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

from lomo_jax._schema import short
from lomo_jax.errors import UserError

Json = Mapping[str, Any]


@dataclasses.dataclass(frozen=True)
class Layout:
    """How a file stores the parameters of a model.

    Each module has a name without its suffix (".weight", ".bias"); `{}` is the layer. Modules with
    the same name are rows of one tensor, in the order of `names`.
    """

    names: Mapping[str, str]  # path of a module -> name of its tensors
    interleaved: bool = False  # rotary pairs are (2i, 2i + 1) instead of (i, i + r / 2)
    scale_offset: float = 0.0  # subtracted from the weights of norms


_LAYER = "model.layers.{}."
_LLAMA_NAMES = {
    "embedding": "model.embed_tokens",
    "layers/attention_norm": f"{_LAYER}input_layernorm",
    "layers/attention/q": f"{_LAYER}self_attn.q_proj",
    "layers/attention/k": f"{_LAYER}self_attn.k_proj",
    "layers/attention/v": f"{_LAYER}self_attn.v_proj",
    "layers/attention/q_norm": f"{_LAYER}self_attn.q_norm",
    "layers/attention/k_norm": f"{_LAYER}self_attn.k_norm",
    "layers/attention/o": f"{_LAYER}self_attn.o_proj",
    "layers/mlp_norm": f"{_LAYER}post_attention_layernorm",
    "layers/mlp/gate": f"{_LAYER}mlp.gate_proj",
    "layers/mlp/up": f"{_LAYER}mlp.up_proj",
    "layers/mlp/down": f"{_LAYER}mlp.down_proj",
    "layers/mlp/router": f"{_LAYER}mlp.gate",
    "layers/mlp/experts/gate": f"{_LAYER}mlp.experts.{{}}.gate_proj",
    "layers/mlp/experts/up": f"{_LAYER}mlp.experts.{{}}.up_proj",
    "layers/mlp/experts/down": f"{_LAYER}mlp.experts.{{}}.down_proj",
    "norm": "model.norm",
    "output": "lm_head",
}
_MIXTRAL = f"{_LAYER}block_sparse_moe."
_POST_NORMS = {
    "layers/attention_post_norm": f"{_LAYER}post_attention_layernorm",
    "layers/mlp_norm": f"{_LAYER}pre_feedforward_layernorm",
    "layers/mlp_post_norm": f"{_LAYER}post_feedforward_layernorm",
}
_JOINED = {
    "layers/attention/q": f"{_LAYER}self_attn.qkv_proj",
    "layers/attention/k": f"{_LAYER}self_attn.qkv_proj",
    "layers/attention/v": f"{_LAYER}self_attn.qkv_proj",
    "layers/mlp/gate": f"{_LAYER}mlp.gate_up_proj",
    "layers/mlp/up": f"{_LAYER}mlp.gate_up_proj",
}


@dataclasses.dataclass(frozen=True)
class Family:
    """One architecture of transformers."""

    architecture: str
    defaults: Json = dataclasses.field(default_factory=dict)  # of keys that config.json may lack
    # The fields of a DecoderConfig in which this family differs from LLaMA.
    read: Callable[[Json], dict[str, Any]] = lambda hf: {}
    names: Mapping[str, str] = dataclasses.field(default_factory=dict)  # that differ from LLaMA's
    interleaved: bool = False  # see Layout
    # The keys of config.json beyond LLaMA's, for models without an original; see `config_json`.
    write: Callable[[Any], dict[str, Any]] = lambda config: {}

    @property
    def layout(self) -> Layout:
        """How its safetensors are laid out."""
        return Layout(_LLAMA_NAMES | dict(self.names), self.interleaved)


def windows(hf: Json, slides: Callable[[int], bool] = lambda layer: True) -> dict[str, Any]:
    """Returns the sliding window and which layers have it.

    Args:
      hf: The contents of config.json.
      slides: Whether a layer slides if config.json has no `layer_types`.
    """
    window, num_layers = hf.get("sliding_window"), hf["num_hidden_layers"]
    types = hf.get("layer_types") or [
        "sliding_attention" if slides(layer) else "full_attention" for layer in range(num_layers)
    ]
    for kind in types:
        if kind not in ("sliding_attention", "full_attention"):
            raise UserError(
                f"layer_types has {short(kind)}; supported: 'full_attention', 'sliding_attention'"
            )
    sliding = tuple(kind == "sliding_attention" for kind in types)[:num_layers]
    if window is None or not any(sliding):
        return {}
    return {"window": window, "sliding_layers": () if all(sliding) else sliding}


def every(hf: Json, pattern: int | None) -> Callable[[int], bool]:
    """Returns which layers slide if each `pattern`-th one does not."""
    pattern = hf.get("sliding_window_pattern") or hf.get("_sliding_window_pattern") or pattern
    if isinstance(pattern, str):  # EXAONE's "LLLG"
        return lambda layer: pattern[layer % len(pattern)] == "L"
    return lambda layer: bool((layer + 1) % (pattern or 1))


def _qwen_windows(hf: Json) -> dict[str, Any]:
    if not hf.get("use_sliding_window"):
        return {}
    return windows(hf, lambda layer: layer >= hf.get("max_window_layers", 28))


def _no_rope_on_full_layers(hf: Json) -> dict[str, Any]:
    found = windows(hf, every(hf, 4))
    if not found:
        return {}
    return found | {"rope_layers": found["sliding_layers"]}


def _smollm3(hf: Json) -> dict[str, Any]:
    num_layers, every_ = hf["num_hidden_layers"], hf.get("no_rope_layer_interval", 4)
    rotates = hf.get("no_rope_layers") or [(i + 1) % every_ != 0 for i in range(num_layers)]
    rotates = tuple(bool(layer) for layer in rotates)
    sliding = windows(hf, lambda i: rotates[i]) if hf.get("use_sliding_window") else {}
    return sliding | {"rope_layers": () if all(rotates) else rotates}


def _refuse(hf: Json, key: str, supported: Any) -> dict[str, Any]:
    if hf.get(key, supported) != supported:
        raise UserError(f"{key}={short(hf[key])} is not supported; supported: {supported!r}")
    return {}


def _gemma(hf: Json) -> dict[str, Any]:
    if hf.get("use_bidirectional_attention"):
        raise UserError("use_bidirectional_attention=True is not supported; supported: False")
    return {"norm_offset": 1.0, "embedding_multiplier": math.sqrt(hf["hidden_size"])}


def _gemma2(hf: Json) -> dict[str, Any]:
    return _gemma(hf) | {
        "norm_places": "around",
        "attention_scale": hf["query_pre_attn_scalar"] ** -0.5,
        "attention_cap": hf.get("attn_logit_softcapping"),
        "logit_cap": hf.get("final_logit_softcapping"),
    }


def _write_gemma2(config: Any) -> dict[str, Any]:
    return {
        "hidden_activation": "gelu_pytorch_tanh",
        "query_pre_attn_scalar": round(config.attention_scale**-2),
        "attn_logit_softcapping": config.attention_cap,
        "final_logit_softcapping": config.logit_cap,
        **_write_windows(config),
    }


def _write_windows(config: Any) -> dict[str, Any]:
    kinds = ("full_attention", "sliding_attention")
    return {
        "sliding_window": config.window,
        "layer_types": [kinds[config.is_sliding(i)] for i in range(config.num_layers)],
    }


def _experts(hf: Json) -> dict[str, Any]:
    # Like transformers, which adds the loss only if it is told to return the router's logits.
    loss = hf.get("router_aux_loss_coef", 0.001) if hf.get("output_router_logits") else 0.0
    return {
        "num_experts": hf.get("num_local_experts") or hf["num_experts"],
        "experts_per_token": hf["num_experts_per_tok"],
        "router_loss": loss,
    }


def _qwen3_moe(hf: Json) -> dict[str, Any]:
    _refuse(hf, "mlp_only_layers", [])
    _refuse(hf, "decoder_sparse_step", 1)
    return _experts(hf) | {
        "qk_norm": "head",
        "mlp_width": hf["moe_intermediate_size"],
        "normalize_experts": hf.get("norm_topk_prob", False),
    }


_GEMMA = {
    "hidden_act": "gelu_pytorch_tanh",
    "head_dim": 256,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
_GEMMA2 = _GEMMA | {
    "num_key_value_heads": 4,
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}

# transformers' model_type -> family. A family that differs from LLaMA by its name alone is one
# line.
FAMILIES: Mapping[str, Family] = {
    "llama": Family("LlamaForCausalLM"),
    "mistral": Family(
        "MistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        windows,
        write=lambda config: {"sliding_window": config.window},
    ),
    "ministral": Family(
        "MinistralForCausalLM",
        {"num_key_value_heads": 8, "sliding_window": 4096, "max_position_embeddings": 131072},
        windows,
    ),
    "ministral3": Family(
        "Ministral3ForCausalLM",
        {"num_key_value_heads": 8, "rms_norm_eps": 1e-5, "max_position_embeddings": 262144},
        windows,
    ),
    "qwen2": Family(
        "Qwen2ForCausalLM",
        {"max_position_embeddings": 32768},
        lambda hf: {"attention_bias": True, "output_bias": False} | _qwen_windows(hf),
    ),
    "qwen3": Family(
        "Qwen3ForCausalLM",
        {"max_position_embeddings": 32768, "head_dim": 128},
        lambda hf: {"qk_norm": "head"} | _qwen_windows(hf),
    ),
    "seed_oss": Family(
        "SeedOssForCausalLM",
        {"attention_bias": True, "head_dim": 128, "max_position_embeddings": 524288},
        lambda hf: {"output_bias": hf.get("attention_out_bias", False)},
    ),
    "gemma": Family(
        "GemmaForCausalLM",
        _GEMMA,
        # The first releases said "gelu" and were trained with its tanh approximation.
        lambda hf: _gemma(hf) | {"activation": "gelu_tanh"},
    ),
    "gemma2": Family(
        "Gemma2ForCausalLM",
        _GEMMA2 | {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
        lambda hf: _gemma2(hf) | windows(hf, every(hf, 2)),
        _POST_NORMS,
        write=_write_gemma2,
    ),
    "gemma3_text": Family(
        "Gemma3ForCausalLM",
        _GEMMA2
        | {
            "rope_theta": 1e6,
            "rope_local_base_freq": 1e4,
            "vocab_size": 262208,
            "max_position_embeddings": 131072,
        },
        lambda hf: (
            _gemma2(hf)
            | {"qk_norm": "head", "local_rope_theta": hf["rope_local_base_freq"]}
            | windows(hf, every(hf, 6))
        ),
        _POST_NORMS,
        write=lambda config: (
            _write_gemma2(config) | {"rope_local_base_freq": config.local_rope_theta}
        ),
    ),
    "phi3": Family(
        "Phi3ForCausalLM",
        {"rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        windows,
        _JOINED,
    ),
    "smollm3": Family(
        "SmolLM3ForCausalLM",
        {
            "num_key_value_heads": 4,
            "rope_theta": 2e6,
            "max_position_embeddings": 32768,
            "tie_word_embeddings": True,
        },
        _smollm3,
    ),
    "olmo": Family(
        "OlmoForCausalLM",
        {},
        lambda hf: (
            _refuse(hf, "clip_qkv", None)
            | {"layer_norm": True, "norm_scale": False, "norm_eps": 1e-5}
        ),
    ),
    "olmo2": Family(
        "Olmo2ForCausalLM",
        {"rms_norm_eps": 1e-5},
        lambda hf: {"norm_places": "after", "qk_norm": "all"},
        _POST_NORMS,
    ),
    "olmo3": Family(
        "Olmo3ForCausalLM",
        {"rms_norm_eps": 1e-5, "sliding_window": 4096, "rope_theta": 5e5},
        lambda hf: (
            {"norm_places": "after", "qk_norm": "all"}
            | {"local_rope_theta": hf["rope_theta"]}
            | windows(hf, every(hf, 4))
        ),
        _POST_NORMS,
    ),
    "granite": Family(
        "GraniteForCausalLM",
        {},
        lambda hf: {
            "embedding_multiplier": hf.get("embedding_multiplier", 1.0),
            "attention_scale": hf.get("attention_multiplier", 1.0),
            "residual_multiplier": hf.get("residual_multiplier", 1.0),
            "logit_multiplier": 1 / hf.get("logits_scaling", 1.0),
        },
    ),
    "stablelm": Family(
        "StableLmForCausalLM",
        {"layer_norm_eps": 1e-5, "partial_rotary_factor": 0.25, "max_position_embeddings": 4096},
        lambda hf: (
            _refuse(hf, "qk_layernorm", False)
            | {
                "layer_norm": True,
                "norm_bias": True,
                "parallel": hf.get("use_parallel_residual", False),
                "attention_bias": hf.get("use_qkv_bias", False),
            }
        ),
    ),
    "exaone4": Family(
        "Exaone4ForCausalLM",
        {"rms_norm_eps": 1e-5, "sliding_window": 4096},
        lambda hf: {"norm_places": "after", "qk_norm": "head"} | _no_rope_on_full_layers(hf),
        _POST_NORMS,
    ),
    "helium": Family(
        "HeliumForCausalLM",
        {
            "rms_norm_eps": 1e-8,
            "rope_theta": 1e5,
            "max_position_embeddings": 4096,
            "num_key_value_heads": 20,
            "head_dim": 128,
        },
        lambda hf: {"output_bias": False},
        interleaved=True,
    ),
    "ernie4_5": Family(
        "Ernie4_5ForCausalLM",
        {
            "rms_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "num_key_value_heads": 2,
            "head_dim": 128,
            "max_position_embeddings": 131072,
            "tie_word_embeddings": True,
        },
        lambda hf: dict.fromkeys(
            ("attention_bias", "output_bias", "mlp_bias"), hf.get("use_bias", False)
        ),
        interleaved=True,
    ),
    "cohere": Family(
        "CohereForCausalLM",
        {
            "layer_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
        },
        lambda hf: (
            _refuse(hf, "use_qk_norm", False)
            | {
                "layer_norm": True,
                "parallel": True,
                "logit_multiplier": hf.get("logit_scale", 0.0625),
            }
        ),
        interleaved=True,
    ),
    "cohere2": Family(
        "Cohere2ForCausalLM",
        {
            "layer_norm_eps": 1e-5,
            "rope_theta": 5e5,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": True,
            "sliding_window": 4096,
        },
        lambda hf: (
            {"layer_norm": True, "parallel": True}
            | {"logit_multiplier": hf.get("logit_scale", 0.0625)}
            | _no_rope_on_full_layers(hf)
        ),
        interleaved=True,
    ),
    "arcee": Family(
        "ArceeForCausalLM",
        {"hidden_act": "relu2", "rms_norm_eps": 1e-5, "max_position_embeddings": 4096},
        lambda hf: {"gated_mlp": False},
    ),
    "nemotron": Family(
        "NemotronForCausalLM",
        {
            "hidden_act": "relu2",
            "norm_eps": 1e-5,
            "partial_rotary_factor": 0.5,
            "max_position_embeddings": 4096,
        },
        lambda hf: {"gated_mlp": False, "layer_norm": True, "norm_bias": True, "norm_offset": 1.0},
    ),
    "mixtral": Family(
        "MixtralForCausalLM",
        {
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "max_position_embeddings": 131072,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        lambda hf: _experts(hf) | windows(hf),
        {
            "layers/mlp/router": f"{_MIXTRAL}gate",
            "layers/mlp/experts/gate": f"{_MIXTRAL}experts.{{}}.w1",
            "layers/mlp/experts/up": f"{_MIXTRAL}experts.{{}}.w3",
            "layers/mlp/experts/down": f"{_MIXTRAL}experts.{{}}.w2",
        },
        write=lambda config: {
            "num_local_experts": config.num_experts,
            "num_experts_per_tok": config.experts_per_token,
        },
    ),
    "qwen3_moe": Family(
        "Qwen3MoeForCausalLM",
        {
            "num_key_value_heads": 4,
            "max_position_embeddings": 32768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "moe_intermediate_size": 768,
            "head_dim": 128,
        },
        lambda hf: _qwen3_moe(hf) | _qwen_windows(hf),
    ),
    "hunyuan_v1_dense": Family(
        "HunYuanDenseV1ForCausalLM",
        {"rms_norm_eps": 1e-5},
        lambda hf: {"qk_norm": "rotated"},
        {
            "layers/attention/q_norm": f"{_LAYER}self_attn.query_layernorm",
            "layers/attention/k_norm": f"{_LAYER}self_attn.key_layernorm",
        },
    ),
}
