import dataclasses

import jax
import pytest
from released_configs import REFUSED, RELEASED

from lomo_jax import models
from lomo_jax.errors import UserError
from lomo_jax.models.hf_config import read_config, write_config

LLAMA3 = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
    "bos_token_id": 128000,
    "eos_token_id": [128001, 128008],
    "rope_theta": 500000.0,
    "rope_scaling": {
        "rope_type": "llama3",
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
LLAMA3_CONFIG = models.DecoderConfig(
    vocab_size=128256,
    width=2048,
    mlp_width=8192,
    num_layers=16,
    num_heads=32,
    num_kv_heads=8,
    head_dim=64,
    rope_theta=500000.0,
    norm_eps=1e-5,
    max_length=131072,
    tie_embeddings=True,
    rope_scaling=models.RopeScaling("llama3", 32.0, 8192),
    bos_id=128000,
    eos_id=(128001, 128008),
)


def without(config, *keys):
    return {key: value for key, value in config.items() if key not in keys}


def test_reads_the_keys_of_transformers_4_and_5():
    assert read_config(LLAMA3) == LLAMA3_CONFIG
    rope = {**LLAMA3["rope_scaling"], "rope_theta": 500000.0}
    as_5 = {**without(LLAMA3, "rope_theta", "rope_scaling"), "rope_parameters": rope}
    assert read_config(as_5) == LLAMA3_CONFIG


def test_keys_that_llama_1_lacks_get_defaults():
    later = ("architectures", "num_key_value_heads", "rope_theta", "rope_scaling")
    config = read_config(without(LLAMA3, *later, "tie_word_embeddings"))
    assert config.num_kv_heads == 32
    assert config.rope_theta == 10000.0
    assert config.rope_scaling is None
    assert not config.tie_embeddings


@pytest.mark.parametrize("changes", [{}, {"rope_scaling": None, "eos_id": 2, "head_dim": 128}])
def test_a_config_survives_a_round_trip(changes):
    config = dataclasses.replace(LLAMA3_CONFIG, **changes)
    assert read_config(write_config(config, "bfloat16")) == config


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["GPT2LMHeadModel"]}, "GPT2LMHeadModel is not supported"),
        ({"architectures": None, "model_type": "gpt2"}, "'gpt2' is not supported"),
        ({"hidden_act": "tanh"}, "hidden_act='tanh' is not supported; supported: 'silu'"),
        ({"quantization_config": {"bits": 4}}, "quantization_config=.* is not supported"),
        ({"rope_scaling": {"rope_type": "mrope"}}, "rope scaling 'mrope' is not supported"),
        ({"rope_scaling": {"rope_type": "llama3"}}, "key 'factor' is missing"),
        ({"num_key_value_heads": 5}, "num_heads=32 must be a multiple of num_kv_heads=5"),
        ({"head_dim": 63}, "head_dim=63 must be even"),
        ({"architectures": ["Gpt", "Bert"]}, "architecture Gpt, Bert is not supported"),
        ({"architectures": [], "model_type": None}, "model_type None is not supported"),
        (
            {"rope_scaling": {"type": "longrope", "short_factor": [1], "long_factor": [1]}},
            "short_factors has 1 entries; give one for each of the 32 rotary pairs",
        ),
    ],
)
def test_unsupported_features_are_named(changes, message):
    with pytest.raises(UserError, match=message):
        read_config({**LLAMA3, **changes})


def test_a_long_value_is_cut():
    with pytest.raises(UserError, match=r"quantization_config=.* is not") as error:
        read_config({**LLAMA3, "quantization_config": {"modules": ["a"] * 1000}})
    assert len(str(error.value)) < 300


# A value that does not fit -> what the message says of its key.
WRONG = [
    ("mlp_bias", "yes", "='yes' must be true or false"),
    ("tie_word_embeddings", "false", "='false' must be true or false"),
    ("num_hidden_layers", 0, "=0 must be an integer from 1 to 10000"),
    ("num_hidden_layers", 10**7, "=10000000 must be an integer from 1 to 10000"),
    ("num_hidden_layers", 2.5, "=2.5 must be an integer"),
    ("num_hidden_layers", True, "=True must be an integer"),
    ("num_attention_heads", [32], r"=\[32\] must be an integer"),
    ("num_attention_heads", 0, "=0 must be an integer from 1"),
    ("hidden_size", float("inf"), "=inf must be an integer"),
    ("vocab_size", None, "=None must be an integer"),
    ("rms_norm_eps", "small", "='small' must be a number"),
    ("rms_norm_eps", 1e30, r"=1e\+30 must be a number from 1e-30 to 1"),
    ("rope_theta", float("inf"), "=inf must be a number from 2 to"),
    ("rope_theta", float("nan"), "=nan must be a number"),
    ("rope_theta", 10**400, r"=10{59}\.\.\. must be a number"),
    ("rope_scaling", "linear", "='linear' must be an object or null"),
    ("rope_scaling", {"type": ["linear"]}, r"\.type=\['linear'\] must be a string"),
    ("rope_scaling", {"type": "linear", "factor": "2"}, r"\.factor='2' must be a number"),
    ("rope_parameters", {"full_attention": 1}, r"\.full_attention=1 must be an object or null"),
    ("architectures", [1, 2], r"\[0\]=1 must be a string"),
    ("architectures", {"LlamaForCausalLM": 1}, "must be a list"),
    ("eos_token_id", [[2]], r"\[0\]=\[2\] must be an integer"),
    ("eos_token_id", -1, "=-1 must be an integer from 0"),
    ("hidden_act", {"a": 1}, "must be a string of .* or null"),
    ("architectures", ["a\nb"], "must be a string of at most 200 printable characters"),
    ("hidden_act", "x" * 10_000, "must be a string of at most 200"),
]


@pytest.mark.parametrize(("key", "value", "message"), WRONG)
def test_a_value_that_does_not_fit_is_named(key, value, message):
    with pytest.raises(UserError, match=f"^{key}.*{message}") as caught:
        read_config({**LLAMA3, key: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_a_missing_key_is_named():
    with pytest.raises(UserError, match="key 'vocab_size' is missing"):
        read_config(without(LLAMA3, "vocab_size"))


def test_rope_scaling_checks_the_order_of_its_frequencies():
    with pytest.raises(UserError, match=r"high_freq_factor=4\.0 must be greater"):
        models.RopeScaling("llama3", 8.0, 8192, 4.0, 4.0)


def test_the_defaults_are_llama_7b():
    _, params = models.abstract(models.DecoderConfig())
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == 6_738_415_616
    assert models.DecoderConfig().norm_eps == 1e-6


def test_the_constructor_checks_a_config():
    with pytest.raises(UserError, match="must be a multiple of num_kv_heads=5"):
        models.DecoderConfig(num_kv_heads=5)


@pytest.mark.parametrize(("name", "parameters", "hf"), RELEASED, ids=[r[0] for r in RELEASED])
def test_released_models_have_their_number_of_parameters(name, parameters, hf):
    _, params = models.abstract(read_config(hf))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters


@pytest.mark.parametrize(("name", "message", "hf"), REFUSED, ids=[r[0] for r in REFUSED])
def test_released_models_that_are_refused(name, message, hf):
    with pytest.raises(UserError, match=message) as caught:
        read_config(hf)
    assert "\n" not in str(caught.value)


def test_switches_of_released_models():
    by_name = {name: read_config(hf) for name, _, hf in RELEASED}
    gemma3 = by_name["Gemma-3-1B"]
    assert [i for i in range(26) if not gemma3.is_sliding(i)] == [5, 11, 17, 23]
    assert (gemma3.local_rope_theta, gemma3.rope_theta, gemma3.window) == (1e4, 1e6, 512)
    assert by_name["Gemma-2-9B"].is_sliding(0)
    assert not by_name["Gemma-2-9B"].is_sliding(1)
    assert by_name["Mistral-7B-v0.1"].window == 4096
    assert by_name["Mistral-7B-v0.3"].window is None
    assert by_name["Qwen2.5-7B"].window is None
    assert by_name["SmolLM3-3B"].rope_layers[:4] == (True, True, True, False)
    assert by_name["Command-R7B"].rope_layers[:4] == (True, True, True, False)
    assert by_name["Phi-4-mini"].rotary_dim == 96
    assert by_name["Phi-3-mini-128k"].rope_scaling.kind == "longrope"
    # Abdin et al., arXiv 2404.14219: the factor is 128k / 4k.
    assert by_name["Phi-3-mini-128k"].rope_scaling.magnitude == pytest.approx(1.19, abs=0.005)
    assert by_name["Mixtral-8x7B"].router_loss == 0
