"""Fixtures for tests of whole runs."""

import jax
import pytest
import runs


@pytest.fixture(scope="module")
def mixed_dtypes():
    """`standard_promotion` for a whole module: optax's cosine schedule mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sixty documents of words in random order."""
    return runs.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
