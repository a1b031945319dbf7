"""The guide to losses has the table that benchmarks/idioms.py prints."""

import runpy
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_table_of_the_guide(monkeypatch, standard_promotion):
    monkeypatch.delenv("XLA_FLAGS", raising=False)
    rows = [
        line.strip("| ").split(" | ")
        for line in (_ROOT / "docs" / "guides" / "losses.md").read_text().splitlines()
        if line.count(" | ") == 3
    ]
    benchmark = runpy.run_path(str(_ROOT / "benchmarks" / "idioms.py"))
    assert [title for title, *_ in rows[1:]] == list(benchmark["IDIOMS"])
    for title, what, fused, plain in rows[1:]:
        _, found, *memory = benchmark["row"](title)
        assert what == found
        # XLA's plans differ a little between its versions and flags.
        assert list(map(float, memory)) == pytest.approx([float(fused), float(plain)], rel=0.1)
