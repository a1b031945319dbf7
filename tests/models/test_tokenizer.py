"""Tokenizers of Hugging Face directories: code in them never runs, and errors are one line."""

import builtins
import json
import sys

import pytest
from small_models import CONFIG, word_tokenizer

from lomo_jax import models
from lomo_jax.errors import UserError

AUTO_MAP = {"AutoTokenizer": ["evil.Evil", "evil.Evil"], "AutoConfig": "evil.Evil"}
EVIL = "import pathlib\npathlib.Path({ran!r}).touch()\nclass Evil: pass\n"


@pytest.fixture
def directory(tmp_path):
    """A model directory with a tokenizer and evil.py, which creates the file `ran` if it runs."""
    folder = tmp_path / "model"
    folder.mkdir()
    models.save_config(folder, CONFIG, "float32", word_tokenizer())
    (folder / "evil.py").write_text(EVIL.format(ran=str(tmp_path / "ran")))
    return folder


def edit(file, **changes):
    content = json.loads(file.read_text()) if file.exists() else {}
    file.write_text(json.dumps(content | changes))


@pytest.fixture
def questions(monkeypatch):
    """Answers yes to every question on stdin, and returns the questions."""
    asked = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": asked.append(prompt) or "y")
    return asked


def ask_for_own_tokenizer(directory):
    edit(directory / "tokenizer_config.json", tokenizer_class="Evil", auto_map=AUTO_MAP)


def ask_for_own_tokenizer_in_the_old_format(directory):
    auto_map = AUTO_MAP["AutoTokenizer"]
    edit(directory / "tokenizer_config.json", tokenizer_class="Evil", auto_map=auto_map)


def ask_for_own_config_too(directory):
    edit(directory / "config.json", model_type="evil", auto_map=AUTO_MAP)
    ask_for_own_tokenizer(directory)


def ask_inside_a_composite_tokenizer(directory):
    nested = directory / "question_encoder_tokenizer"
    nested.mkdir()
    ask_for_own_tokenizer(nested)
    (nested / "evil.py").write_text((directory / "evil.py").read_text())
    (directory / "tokenizer_config.json").write_text('{"tokenizer_class": "RagTokenizer"}')
    part = {"model_type": "unknown", "auto_map": AUTO_MAP}
    parts = {"question_encoder": {"model_type": "resnet"}, "generator": {"model_type": "bart"}}
    edit(directory / "config.json", model_type="rag", **parts)
    edit(nested / "config.json", **part)


# With warnings as errors, reading would stop before it reaches the code.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "ask",
    [
        ask_for_own_tokenizer,
        ask_for_own_tokenizer_in_the_old_format,
        ask_for_own_config_too,
        ask_inside_a_composite_tokenizer,
    ],
)
def test_code_of_a_model_directory_never_runs(directory, questions, tmp_path, ask):
    ask(directory)
    with pytest.raises(UserError) as caught:
        models.tokenizer(directory)
    assert str(caught.value).startswith(f"{directory}: the tokenizer ")
    assert "\n" not in str(caught.value)
    assert "trust_remote_code" not in str(caught.value)
    assert questions == []
    assert not (tmp_path / "ran").exists()
    assert not any(name.endswith("evil") for name in sys.modules)


def test_code_next_to_a_standard_tokenizer_is_ignored(directory, questions, tmp_path):
    edit(directory / "config.json", auto_map=AUTO_MAP)
    edit(directory / "tokenizer_config.json", auto_map={"AutoProcessor": "evil.Evil"})
    for name in ("processor_config.json", "preprocessor_config.json"):
        edit(directory / name, auto_map={"AutoProcessor": "evil.Evil"})
    tokenizer = models.tokenizer(directory)
    assert tokenizer("one two")["input_ids"] == [1, 0]
    assert models.load_config(directory) == CONFIG
    assert questions == []
    assert not (tmp_path / "ran").exists()
    tokenizer.save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())
    assert saved.keys().isdisjoint({"auto_map", "trust_remote_code", "local_files_only"})


@pytest.mark.parametrize("content", ["", "{}", '{"model": 3}', "[" * 100_000])
def test_a_damaged_tokenizer_gets_one_line(directory, content):
    (directory / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=r"the tokenizer cannot be read \(.*\); copy") as caught:
        models.tokenizer(directory)
    assert str(caught.value).startswith(f"{directory}: ")
    assert "\n" not in str(caught.value)


def test_a_directory_without_a_tokenizer_is_reported(directory):
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UserError, match=r"has no tokenizer \(tokenizer\.json"):
        models.tokenizer(directory)
