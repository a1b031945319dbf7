"""The table of families in the documentation is what the command prints."""

from pathlib import Path

from lomo_jax.models.__main__ import table

PAGE = Path(__file__).parents[2] / "docs" / "guides" / "families.md"


def test_the_page_has_the_table():
    assert table() in PAGE.read_text()
