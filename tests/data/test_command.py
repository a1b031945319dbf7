"""`lomo-jax data`: what it prints, and its errors."""

import io
import json
import sys

import numpy as np
import pytest
import runs

from lomo_jax.__main__ import main
from lomo_jax.data.__main__ import histogram

RECORDS = [
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "a" * 50, "completion": "b"},
    {"prompt": "1+1=", "completion": "2"},
    {"prompt": "x", "completion": "y" * 60},
]


@pytest.fixture
def command(tmp_path, capsys):
    """Runs the command on records; returns status, stdout and stderr."""
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a.jsonl").write_text("\n".join(map(json.dumps, RECORDS)))
    (folder / "README.md").write_text("A dataset.")
    runs.write_config(runs.make_config(folder, tmp_path / "run"), tmp_path / "config.json")

    def run(*arguments: str):
        status = main(["lomo-jax", "data", f"--config={tmp_path}/config.json", *arguments])
        out, err = capsys.readouterr()
        return status, out.replace(str(tmp_path), "TMP"), err.replace(str(tmp_path), "TMP")

    return run


def test_json(command):
    status, out, err = command("--json")
    assert (status, err) == (0, "")
    # Tokens are bytes and an end of text, 0. The second record has no answer in 33 tokens.
    found = json.loads(out)
    first = found.pop("first")
    assert found == {
        "kind": "prompt",
        "files_read": ["TMP/data/a.jsonl"],
        "files_left_out": ["TMP/data/README.md"],
        "examples": 2,
        "tokens": 6 + 33,
        "loss_tokens": 2 + 32,
        "cut": 1,
        "left_out": 1,
        "repeated": 1,
    }
    assert len(first["tokens"]) == 6
    assert first["tokens"][-1] == 0
    assert first["loss"] == [0, 0, 0, 0, 1, 1]


def test_words(command):
    status, out, err = command("--config.sequence_length=60")
    assert (status, err) == (0, "")
    assert "example 1, 6 tokens, 2 with loss" in out
    assert "1+1=>>2<|endoftext|><<\n" in out
    lines = [" ".join(line.split()) for line in out.splitlines()]
    for line in ("read TMP/data/a.jsonl", "left out TMP/data/README.md", "kind prompt"):
        assert line in lines
    for line in ("examples 3", "tokens 119", "cut 1", "left out 0", "repeated 1"):
        assert line in lines
    assert lines[-4:] == ["to 8 1 " + 20 * "#", "to 16 0", "to 32 0", "to 64 2 " + 40 * "#"]


def test_histogram():
    lines = list(histogram(np.array([1, 2, 3, 4, 4, 5])))
    assert [line.split()[1:3] for line in lines] == [["1", "1"], ["2", "1"], ["4", "3"], ["8", "1"]]
    assert [line.count("#") for line in lines] == [13, 13, 40, 13]


@pytest.mark.parametrize(
    ("flag", "message"),
    [
        ("--config.data.format=chat", "error: the tokenizer has no chat template: set data.t"),
        ("--config.data.formt=chat", "error: data.formt: no such field; did you mean 'format'"),
        ("--config.data.path=TMP/none", "error: TMP/none does not exist: give a file"),
        ("--config.data.format=table", "error: data.format: 'table' is not allowed; it must be"),
        ("--jsn", "error: "),
    ],
)
def test_an_error_is_one_line(command, tmp_path, flag, message):
    status, out, err = command(flag.replace("TMP", str(tmp_path)))
    assert (status, out) == (1, "")
    assert err.startswith(message)
    assert err.count("\n") == 1


def test_a_terminal_that_shows_no_unicode(command, tmp_path, monkeypatch):
    record = {"prompt": "\N{SNOWMAN}", "completion": "b"}
    (tmp_path / "data" / "a.jsonl").write_text(json.dumps(record))
    shown = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(shown, encoding="ascii"))
    assert command()[0] == 0
    sys.stdout.flush()
    assert b"example 1" in shown.getvalue()
