"""A tiny config of transformers for each family, in the forms that its releases use.

Sizes are all different, and windows and scalings short, so that every switch changes the logits of
24 tokens.
"""

SIZES = {
    "vocab_size": 98,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
NO_HEAD_DIM = {"head_dim": None, "hidden_size": 64}  # head_dim is hidden_size / heads
SLIDING, FULL = "sliding_attention", "full_attention"
GEMMA = {"hidden_act": "gelu_pytorch_tanh", "tie_word_embeddings": True}
GEMMA2 = {
    "hidden_activation": "gelu_pytorch_tanh",
    "tie_word_embeddings": True,
    "query_pre_attn_scalar": 20,
    "sliding_window": 7,
}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
YARN = {
    "rope_type": "yarn",
    "rope_theta": 100.0,
    "factor": 4.0,
    "original_max_position_embeddings": 16,
}
LONGROPE = {
    "rope_type": "longrope",
    "rope_theta": 100.0,
    "short_factor": [1.0, 1.1, 1.2, 1.3, 1.4, 1.5, 1.6, 1.7],
    "long_factor": [1.0, 1.5, 2.0, 2.5, 3.0, 3.5, 4.0, 4.5],
}
LOCAL_GLOBAL = {
    SLIDING: {"rope_type": "default", "rope_theta": 50.0},
    FULL: {"rope_type": "linear", "rope_theta": 500.0, "factor": 4.0},
}
LOCAL_YARN = {SLIDING: {"rope_type": "default", "rope_theta": 100.0}, FULL: YARN}

# Name -> (model_type, what differs from SIZES).
CONFIGS: dict[str, tuple[str, dict]] = {
    "llama": ("llama", {}),
    "llama_biases": ("llama", {"attention_bias": True, "mlp_bias": True}),
    "llama_tied_llama3_rope": (
        "llama",
        {"tie_word_embeddings": True, "rope_parameters": LLAMA3_ROPE},
    ),
    "llama_linear_rope": (
        "llama",
        {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
    ),
    "llama_dynamic_rope": (
        "llama",
        {
            "max_position_embeddings": 16,
            "rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
        },
    ),
    "llama_yarn_rope": ("llama", {"rope_parameters": YARN}),
    "mistral": ("mistral", {"sliding_window": None}),
    "mistral_window": ("mistral", {"sliding_window": 7}),
    "ministral": ("ministral", {"sliding_window": 7, "layer_types": [SLIDING, FULL] * 2}),
    "ministral3": (
        "ministral3",
        {
            "rope_parameters": YARN
            | {
                "original_max_position_embeddings": 8,
                "llama_4_scaling_beta": 0.1,
                "mscale": 1.0,
                "mscale_all_dim": 1.0,
            }
        },
    ),
    "qwen2": ("qwen2", {"head_dim": None, "hidden_size": 64}),
    "qwen2_window": (
        "qwen2",
        {
            "head_dim": None,
            "hidden_size": 64,
            "sliding_window": 7,
            "use_sliding_window": True,
            "max_window_layers": 2,
        },
    ),
    "qwen3": ("qwen3", {}),
    "seed_oss": ("seed_oss", {"attention_bias": True, "attention_out_bias": False}),
    "gemma": ("gemma", GEMMA),
    "gemma2": ("gemma2", GEMMA2 | {"attn_logit_softcapping": 3.0, "final_logit_softcapping": 2.0}),
    "gemma3": (
        "gemma3_text",
        GEMMA2
        | {"layer_types": [SLIDING, SLIDING, FULL, SLIDING], "rope_parameters": LOCAL_GLOBAL},
    ),
    "phi3": ("phi3", NO_HEAD_DIM | {"sliding_window": 7}),
    "phi3_longrope": (
        "phi3",
        NO_HEAD_DIM | {"original_max_position_embeddings": 32, "rope_parameters": LONGROPE},
    ),
    "phi3_longrope_long": (
        "phi3",
        NO_HEAD_DIM | {"original_max_position_embeddings": 16, "rope_parameters": LONGROPE},
    ),
    "phi4_mini": (
        "phi3",
        NO_HEAD_DIM
        | {
            "tie_word_embeddings": True,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "partial_rotary_factor": 0.75,
            },
        },
    ),
    "smollm3": (
        "smollm3",
        NO_HEAD_DIM | {"no_rope_layer_interval": 2, "no_rope_layers": [1, 0, 1, 0]},
    ),
    "olmo": ("olmo", NO_HEAD_DIM),
    "olmo2": ("olmo2", NO_HEAD_DIM),
    "olmo3": (
        "olmo3",
        NO_HEAD_DIM
        | {
            "sliding_window": 7,
            "rope_parameters": LOCAL_YARN,
            "layer_types": [SLIDING, SLIDING, FULL, SLIDING],
        },
    ),
    "granite": (
        "granite",
        NO_HEAD_DIM
        | {
            "embedding_multiplier": 3.0,
            "logits_scaling": 2.0,
            "residual_multiplier": 0.7,
            "attention_multiplier": 0.1,
        },
    ),
    "stablelm": ("stablelm", NO_HEAD_DIM | {"use_qkv_bias": True}),
    "stablelm_parallel": ("stablelm", NO_HEAD_DIM | {"use_parallel_residual": True}),
    "exaone4": ("exaone4", NO_HEAD_DIM | {"sliding_window": 7, "layer_types": [SLIDING, FULL] * 2}),
    "exaone4_full": ("exaone4", NO_HEAD_DIM | {"sliding_window": None, "layer_types": [FULL] * 4}),
    "helium": ("helium", NO_HEAD_DIM | {"head_dim": 16}),
    "ernie4_5": ("ernie4_5", {"use_bias": True, "tie_word_embeddings": True}),
    "cohere": ("cohere", NO_HEAD_DIM | {"logit_scale": 0.5, "tie_word_embeddings": True}),
    "cohere2": (
        "cohere2",
        {
            "logit_scale": 0.5,
            "sliding_window": 7,
            "tie_word_embeddings": True,
            "layer_types": [SLIDING, FULL] * 2,
        },
    ),
    "arcee": ("arcee", {}),
    "nemotron": ("nemotron", NO_HEAD_DIM),
    "mixtral": (
        "mixtral",
        {"num_local_experts": 5, "num_experts_per_tok": 2, "sliding_window": None},
    ),
    "qwen3_moe": (
        "qwen3_moe",
        {
            "num_experts": 6,
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 40,
            "norm_topk_prob": True,
        },
    ),
    "hunyuan": ("hunyuan_v1_dense", {}),
}


def random_model(name):
    """Returns a transformers model with weights so large that every part affects the logits."""
    import torch
    import transformers

    model_type, changes = CONFIGS[name]
    sizes = {key: value for key, value in (SIZES | changes).items() if value is not None}
    sizes |= {key: None for key in ("sliding_window",) if key in changes and not changes[key]}
    config = transformers.AutoConfig.for_model(model_type, **sizes, dtype="float32")
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(1.0 if parameter.ndim == 1 else 0.0, 0.15)
    return model.eval()
