"""The config.json of released models, as facts, with the number of parameters of each.

Only keys that tell the shape. (name, parameters or None where it is refused, config)
"""


def llama(vocab, width, mlp, layers, heads, kv_heads, **more):
    """Returns the keys that all families share."""
    return {
        "vocab_size": vocab,
        "hidden_size": width,
        "intermediate_size": mlp,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        **more,
    }


def of(architecture, model_type):
    return {"architectures": [architecture], "model_type": model_type}


LLAMA, MISTRAL = of("LlamaForCausalLM", "llama"), of("MistralForCausalLM", "mistral")
QWEN2, QWEN3 = of("Qwen2ForCausalLM", "qwen2"), of("Qwen3ForCausalLM", "qwen3")
GEMMA2, PHI3 = of("Gemma2ForCausalLM", "gemma2"), of("Phi3ForCausalLM", "phi3")
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
QWEN_WINDOW = {"use_sliding_window": False, "max_window_layers": 28}

RELEASED = [
    (
        "LLaMA-7B",
        6_738_415_616,
        of("LLaMAForCausalLM", "llama")
        | llama(32000, 4096, 11008, 32, 32, None, hidden_act="silu", rms_norm_eps=1e-6),
    ),
    ("Llama-2-13B", 13_015_864_320, LLAMA | llama(32000, 5120, 13824, 40, 40, 40)),
    (
        "Llama-3.1-8B",
        8_030_261_248,
        LLAMA | llama(128256, 4096, 14336, 32, 32, 8, rope_theta=5e5, rope_scaling=LLAMA3_ROPE),
    ),
    (
        "Llama-3.2-1B",
        1_235_814_400,
        LLAMA
        | llama(
            128256,
            2048,
            8192,
            16,
            32,
            8,
            head_dim=64,
            rope_theta=5e5,
            tie_word_embeddings=True,
            rope_scaling=LLAMA3_ROPE | {"factor": 32.0},
        ),
    ),
    ("TinyLlama-1.1B", 1_100_048_384, LLAMA | llama(32000, 2048, 5632, 22, 32, 4)),
    (
        "SmolLM2-135M",
        134_515_008,
        LLAMA | llama(49152, 576, 1536, 30, 9, 3, rope_theta=1e5, tie_word_embeddings=True),
    ),
    (
        "Mistral-7B-v0.1",
        7_241_732_096,
        MISTRAL
        | llama(32000, 4096, 14336, 32, 32, 8, sliding_window=4096, max_position_embeddings=32768),
    ),
    (
        "Mistral-7B-v0.3",
        7_248_023_552,
        MISTRAL | llama(32768, 4096, 14336, 32, 32, 8, sliding_window=None, rope_theta=1e6),
    ),
    (
        "Mistral-Nemo-12B",
        12_247_782_400,
        MISTRAL
        | llama(131072, 5120, 14336, 40, 32, 8, head_dim=128, sliding_window=None, rope_theta=1e6),
    ),
    (
        "Ministral-8B-2410",
        8_019_808_256,
        MISTRAL
        | llama(131072, 4096, 12288, 36, 32, 8, head_dim=128, sliding_window=32768, rope_theta=1e8),
    ),
    (
        "Mixtral-8x7B",
        46_702_792_704,
        of("MixtralForCausalLM", "mixtral")
        | llama(
            32000,
            4096,
            14336,
            32,
            32,
            8,
            num_local_experts=8,
            num_experts_per_tok=2,
            sliding_window=None,
            rope_theta=1e6,
            output_router_logits=False,
            router_aux_loss_coef=0.02,
        ),
    ),
    (
        "Qwen2.5-0.5B",
        494_032_768,
        QWEN2
        | QWEN_WINDOW
        | llama(
            151936,
            896,
            4864,
            24,
            14,
            2,
            sliding_window=32768,
            rope_theta=1e6,
            tie_word_embeddings=True,
        ),
    ),
    (
        "Qwen2.5-7B",
        7_615_616_512,
        QWEN2
        | QWEN_WINDOW
        | llama(152064, 3584, 18944, 28, 28, 4, sliding_window=131072, rope_theta=1e6),
    ),
    (
        "Qwen3-0.6B",
        596_049_920,
        QWEN3
        | QWEN_WINDOW
        | llama(
            151936,
            1024,
            3072,
            28,
            16,
            8,
            head_dim=128,
            sliding_window=None,
            rope_theta=1e6,
            tie_word_embeddings=True,
            attention_bias=False,
        ),
    ),
    (
        "Qwen3-8B",
        8_190_735_360,
        QWEN3
        | QWEN_WINDOW
        | llama(
            151936,
            4096,
            12288,
            36,
            32,
            8,
            head_dim=128,
            sliding_window=None,
            rope_theta=1e6,
            max_position_embeddings=40960,
            attention_bias=False,
        ),
    ),
    (
        "Qwen3-30B-A3B",
        30_532_122_624,
        of("Qwen3MoeForCausalLM", "qwen3_moe")
        | llama(
            151936,
            2048,
            6144,
            48,
            32,
            4,
            head_dim=128,
            num_experts=128,
            num_experts_per_tok=8,
            moe_intermediate_size=768,
            norm_topk_prob=True,
            decoder_sparse_step=1,
            mlp_only_layers=[],
            rope_theta=1e6,
            sliding_window=None,
        ),
    ),
    (
        "Gemma-2B",
        2_506_172_416,
        of("GemmaForCausalLM", "gemma")
        | llama(256000, 2048, 16384, 18, 8, 1, head_dim=256, hidden_act="gelu", rope_theta=10000.0),
    ),
    (
        "Gemma-7B",
        8_537_680_896,
        of("GemmaForCausalLM", "gemma")
        | llama(
            256000, 3072, 24576, 28, 16, 16, head_dim=256, hidden_act="gelu", hidden_activation=None
        ),
    ),
    (
        "Gemma-2-2B",
        2_614_341_888,
        GEMMA2
        | llama(
            256000,
            2304,
            9216,
            26,
            8,
            4,
            head_dim=256,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    (
        "Gemma-2-9B",
        9_241_705_984,
        GEMMA2
        | llama(
            256000,
            3584,
            14336,
            42,
            16,
            8,
            head_dim=256,
            query_pre_attn_scalar=256,
            attn_logit_softcapping=50.0,
            final_logit_softcapping=30.0,
            sliding_window=4096,
            hidden_act="gelu_pytorch_tanh",
            hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    (
        "Gemma-3-1B",
        999_885_952,
        of("Gemma3ForCausalLM", "gemma3_text")
        | llama(
            262144,
            1152,
            6912,
            26,
            4,
            1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            sliding_window_pattern=6,
            rope_theta=1000000,
            rope_local_base_freq=10000,
            rope_scaling=None,
            attn_logit_softcapping=None,
            final_logit_softcapping=None,
            hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    (
        "Gemma-3-270M",
        268_098_176,
        of("Gemma3ForCausalLM", "gemma3_text")
        | llama(
            262144,
            640,
            2048,
            18,
            4,
            1,
            head_dim=256,
            query_pre_attn_scalar=256,
            sliding_window=512,
            _sliding_window_pattern=6,
            rope_theta=1000000.0,
            rope_local_base_freq=10000.0,
            layer_types=(["sliding_attention"] * 5 + ["full_attention"]) * 3,
            hidden_activation="gelu_pytorch_tanh",
        ),
    ),
    (
        "Phi-3-mini-4k",
        3_821_079_552,
        PHI3
        | llama(
            32064,
            3072,
            8192,
            32,
            32,
            32,
            sliding_window=2047,
            rope_scaling=None,
            original_max_position_embeddings=4096,
        ),
    ),
    (
        "Phi-3-mini-128k",
        3_821_079_552,
        PHI3
        | llama(
            32064,
            3072,
            8192,
            32,
            32,
            32,
            sliding_window=262144,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={"type": "su", "short_factor": [1.05] * 48, "long_factor": [1.03] * 48},
        ),
    ),
    (
        "Phi-4",
        14_659_507_200,
        PHI3
        | llama(
            100352,
            5120,
            17920,
            40,
            40,
            10,
            sliding_window=None,
            rope_theta=250000,
            max_position_embeddings=16384,
            original_max_position_embeddings=16384,
        ),
    ),
    (
        "Phi-4-mini",
        3_836_021_760,
        PHI3
        | llama(
            200064,
            3072,
            8192,
            32,
            24,
            8,
            tie_word_embeddings=True,
            partial_rotary_factor=0.75,
            sliding_window=262144,
            max_position_embeddings=131072,
            original_max_position_embeddings=4096,
            rope_scaling={
                "type": "longrope",
                "short_factor": [1.0] * 48,
                "long_factor": [1.1] * 48,
            },
        ),
    ),
    (
        "SmolLM3-3B",
        3_075_098_624,
        of("SmolLM3ForCausalLM", "smollm3")
        | llama(
            128256,
            2048,
            11008,
            36,
            16,
            4,
            no_rope_layer_interval=4,
            rope_theta=5e6,
            no_rope_layers=[1, 1, 1, 0] * 9,
            use_sliding_window=False,
            sliding_window=None,
        ),
    ),
    (
        "OLMo-2-7B",
        7_298_617_344,
        of("Olmo2ForCausalLM", "olmo2")
        | llama(100352, 4096, 11008, 32, 32, 32, rope_theta=5e5, rms_norm_eps=1e-6),
    ),
    (
        "Granite-3.1-8B",
        8_170_848_256,
        of("GraniteForCausalLM", "granite")
        | llama(
            49155,
            4096,
            12800,
            40,
            32,
            8,
            tie_word_embeddings=True,
            embedding_multiplier=12.0,
            attention_multiplier=0.0078125,
            residual_multiplier=0.22,
            logits_scaling=16.0,
            rope_theta=1e7,
        ),
    ),
    (
        "StableLM-2-1.6B",
        1_644_515_328,
        of("StableLmForCausalLM", "stablelm")
        | llama(
            100352,
            2048,
            5632,
            24,
            32,
            32,
            layer_norm_eps=1e-5,
            partial_rotary_factor=0.25,
            use_qkv_bias=True,
            hidden_act="silu",
        ),
    ),
    (
        "Command-R7B",
        256000 * 4096 + 32 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 14336 + 4096) + 4096,
        of("Cohere2ForCausalLM", "cohere2")
        | llama(
            256000,
            4096,
            14336,
            32,
            32,
            8,
            head_dim=128,
            logit_scale=0.25,
            sliding_window=4096,
            sliding_window_pattern=4,
            layer_norm_eps=1e-5,
            rope_theta=50000,
        ),
    ),
]

# Refused, each in one line that has these words.
REFUSED = [
    (
        "Gemma-3-4B",
        "architecture Gemma3ForConditionalGeneration is not supported",
        of("Gemma3ForConditionalGeneration", "gemma3"),
    ),
    (
        "GPT-OSS-20B",
        "architecture GptOssForCausalLM is not supported",
        of("GptOssForCausalLM", "gpt_oss"),
    ),
    (
        "DeepSeek-V3",
        "architecture DeepseekV3ForCausalLM is not supported",
        of("DeepseekV3ForCausalLM", "deepseek_v3"),
    ),
    (
        "Command-R+",
        "use_qk_norm=True is not supported",
        of("CohereForCausalLM", "cohere")
        | llama(256000, 12288, 33792, 64, 96, 8, use_qk_norm=True, logit_scale=0.8333333333333334),
    ),
    (
        "StableLM-2-12B",
        "qk_layernorm=True is not supported",
        of("StableLmForCausalLM", "stablelm")
        | llama(100352, 5120, 13824, 40, 32, 8, qk_layernorm=True),
    ),
    (
        "OLMo-7B",
        "clip_qkv=8.0 is not supported",
        of("OlmoForCausalLM", "olmo") | llama(50304, 4096, 11008, 32, 32, 32, clip_qkv=8.0),
    ),
    (
        "Qwen2.5-7B-GPTQ",
        "quantization_config=.* is not supported; use the model's original",
        QWEN2
        | llama(
            152064, 3584, 18944, 28, 28, 4, quantization_config={"bits": 4, "quant_method": "gptq"}
        ),
    ),
]
