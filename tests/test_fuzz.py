"""A few inputs of each reader in `fuzz.py`, which runs for longer by hand."""

import itertools

import fuzz
import pytest

COUNT = {"index": 25, "run": 10, "metrics": 10, "evaluations": 10}


@pytest.mark.parametrize("reader", fuzz.READERS)
def test_damaged_files_get_an_answer_in_one_line(reader):
    count = COUNT.get(reader, 50)
    found = itertools.islice(fuzz.inputs(reader, seed=0, first=0), count)
    assert [f"input {n}: {problem}" for n, problem in found if problem is not None] == []


def test_inputs_can_be_repeated():
    """Each input depends on its number alone."""
    file = fuzz.ROOT / "models" / "small_models.py"
    texts = [fuzz.mutate_bytes(fuzz.random.Random("0 x 1"), file.read_bytes()) for _ in range(2)]
    assert texts[0] == texts[1] != file.read_bytes()
