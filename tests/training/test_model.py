"""The model and the tokenizer that a run starts from."""

from pathlib import Path

import pytest

from lomo_jax.training import Architecture, Config, ModelConfig
from lomo_jax.training import model as model_lib

_TINY = Architecture(257, 8, 8, 1, 1, 1, 8)


def test_without_a_path_a_token_is_a_byte():
    model, _ = model_lib.load(Config(model=ModelConfig(init="random", architecture=_TINY)))
    text = "To be,\r\n  or\tnot — “to be”? 🤔<s>"
    tokens = model.tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert model.tokenizer.decode(tokens) == text
    assert model.tokenizer("a<|endoftext|>")["input_ids"][-1] == model.tokenizer.eos_token_id


def test_a_path_inside_a_package():
    import rich

    expected = Path(rich.__file__).with_name("py.typed")
    assert model_lib.resolve("package://rich/py.typed") == str(expected)


def test_any_other_path_is_left_alone():
    assert model_lib.resolve("~/x/*.txt") == "~/x/*.txt"


def test_a_package_without_that_file():
    with pytest.raises(FileNotFoundError, match="'rich' has no 'nothing/here'"):
        model_lib.resolve("package://rich/nothing/here")
