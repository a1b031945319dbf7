"""Sections of long texts, the cache, and memory."""

import json
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lomo_jax.data import sources, tokens
from lomo_jax.data.tokens import SECTION, cache_folder, tokenize
from lomo_jax.errors import UserError

TEXT = "\n\n".join(
    f"Paragraph {i}:  some words,\tand{' more' * (i % 7)}.\n - a list\n\n\n  indented"
    + "." * (i % 3)
    for i in range(3000)
)


def _byte_level() -> Tokenizer:
    """Like GPT-2's."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=500, show_progress=False, initial_alphabet=alphabet)
    backend.train_from_iterator([TEXT[:20000]], trainer)
    return backend


def _sentencepiece() -> Tokenizer:
    """Like Llama 2's: a space before each text, merges across words."""
    backend = Tokenizer(models.BPE(unk_token="<unk>"))
    backend.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=300, show_progress=False, special_tokens=["<unk>"], limit_alphabet=200
    )
    # Words apart in training only, or a merge could span the whole text.
    backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    backend.train_from_iterator([TEXT[:20000]], trainer)
    backend.pre_tokenizer = None
    return backend


@pytest.fixture(params=[_byte_level, _sentencepiece])
def tokenizer(request):
    return PreTrainedTokenizerFast(tokenizer_object=request.param())


@pytest.mark.parametrize("suffix", [".txt", ".jsonl", ".json"])
def test_sections_do_not_change_tokens(tmp_path: Path, tokenizer, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text(TEXT if suffix == ".txt" else json.dumps({"text": TEXT}))
    found = tokenize([str(path)], tokenizer)
    assert len(found.ends) > 5
    assert not found.document.any()
    np.testing.assert_array_equal(found.ids, tokenizer(TEXT)["input_ids"])


@pytest.mark.parametrize(
    "text", ["x" * 10 * SECTION, "\n" * 5 * SECTION + "x", "\u6f22" * 9 * SECTION]
)
def test_a_text_without_a_place_to_cut(tmp_path: Path, tokenizer, text):
    (tmp_path / "a.txt").write_text(text)
    found = tokenize([str(tmp_path / "a.txt")], tokenizer)
    assert len(found.ends) > 1
    if tokenizer.backend_tokenizer.decoder is not None:
        assert tokenizer.decode(found.ids) == text


def test_the_size_of_reads_does_not_matter(tmp_path: Path, tokenizer, monkeypatch):
    (tmp_path / "a.txt").write_text(TEXT)
    whole = tokenize([str(tmp_path / "a.txt")], tokenizer)
    monkeypatch.setattr(sources, "_CHUNK", 1000)
    monkeypatch.setattr(tokens, "_CHARACTERS", 1000)
    (tmp_path / "b.txt").write_text(TEXT)
    parts = tokenize([str(tmp_path / "b.txt")], tokenizer)
    for one, other in zip(whole[:6], parts[:6], strict=True):
        np.testing.assert_array_equal(one, other)


def test_the_cache(tmp_path: Path, tokenizer, monkeypatch):
    monkeypatch.setenv("LOMO_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": "b"}')
    first = tokenize([str(path)], tokenizer)

    def fail(*_: object):
        raise AssertionError("it is in the cache")

    with monkeypatch.context() as patch:
        patch.setattr(tokens._Writer, "write", fail)
        again = tokenize([str(path)], tokenizer)
        for one, other in zip(first[:6], again[:6], strict=True):
            np.testing.assert_array_equal(one, other)
        # Another file, another setting, another tokenizer.
        os.utime(path, ns=(1, 1))
        with pytest.raises(AssertionError):
            tokenize([str(path)], tokenizer)
    tokenize([str(path)], tokenizer)
    with monkeypatch.context() as patch:
        patch.setattr(tokens._Writer, "write", fail)
        tokenize([str(path)], tokenizer)
        with pytest.raises(AssertionError):
            tokenize([str(path)], tokenizer, vocab_size=1000)
        tokenizer.add_special_tokens({"eos_token": "</s>"})
        with pytest.raises(AssertionError):
            tokenize([str(path)], tokenizer)


@pytest.mark.parametrize("name", ["tokens.bin", "loss.bin", "index.npz", "info.json"])
@pytest.mark.parametrize("damage", ["missing", "cut off"])
def test_a_damaged_cache_is_made_again(tmp_path: Path, tokenizer, monkeypatch, name, damage):
    monkeypatch.setenv("LOMO_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"prompt": "a", "completion": "b"}')
    first = [np.array(each) for each in tokenize([str(path)], tokenizer)[:6]]
    [folder] = cache_folder().iterdir()
    if damage == "missing":
        (folder / name).unlink()
    else:
        (folder / name).write_bytes((folder / name).read_bytes()[:-1])
    again = tokenize([str(path)], tokenizer)
    for one, other in zip(first, again[:6], strict=True):
        np.testing.assert_array_equal(one, other)
    assert [path.name for path in cache_folder().iterdir()] == [folder.name]


@pytest.mark.parametrize("text", ["{}", "null", "[]", '{"sizes": 3}', "{"])
def test_a_cache_that_says_nothing_is_made_again(tmp_path: Path, tokenizer, monkeypatch, text):
    monkeypatch.setenv("LOMO_JAX_CACHE", str(tmp_path / "cache"))
    (tmp_path / "a.txt").write_text("a b")
    tokenize([str(tmp_path / "a.txt")], tokenizer)
    [folder] = cache_folder().iterdir()
    (folder / "info.json").write_text(text)
    assert len(tokenize([str(tmp_path / "a.txt")], tokenizer).ids)
    (folder / "index.npz").write_bytes(bytes((folder / "index.npz").stat().st_size))
    with pytest.raises(UserError, match="is damaged: delete it"):
        tokenize([str(tmp_path / "a.txt")], tokenizer)


def test_another_process_is_faster(tmp_path: Path, tokenizer, monkeypatch):
    monkeypatch.setenv("LOMO_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.txt"
    path.write_text("a b")
    rename = Path.rename

    def rename_second(temporary: Path, folder: Path):
        shutil.copytree(temporary, folder)
        return rename(temporary, folder)

    monkeypatch.setattr(Path, "rename", rename_second)
    assert len(tokenize([str(path)], tokenizer).ids)
    assert len(list(cache_folder().iterdir())) == 1


def test_an_error_leaves_nothing_in_the_cache(tmp_path: Path, tokenizer, monkeypatch):
    monkeypatch.setenv("LOMO_JAX_CACHE", str(tmp_path / "cache"))
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": ')
    with pytest.raises(UserError, match=r"a\.jsonl:2 is not JSON"):
        tokenize([str(path)], tokenizer)
    assert not list(cache_folder().iterdir())


def test_a_cache_that_cannot_be_written(tmp_path: Path, tokenizer, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LOMO_JAX_CACHE", str(tmp_path / "file"))
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(UserError, match="cannot be written: Not a directory; set LOMO_JAX_CACHE"):
        tokenize([str(tmp_path / "a.txt")], tokenizer)


@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
@pytest.mark.parametrize("content", ["", " \n\n"])
def test_no_text(tmp_path: Path, tokenizer, name, content):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name} has no text, it is empty or blank: add text"):
        tokenize([str(tmp_path / name)], tokenizer)


def test_blank_documents_are_left_out(tmp_path: Path, tokenizer):
    (tmp_path / "a.jsonl").write_text('{"text": " "}\n{"text": "c"}\n{"text": ""}\n{"text": "d"}')
    found = tokenize([str(tmp_path / "a.jsonl")], tokenizer)
    assert found.document.tolist() == [0, 1]
