"""Fixtures for tests of whole runs."""

import jax
import pytest
import runs


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    """Caches compiled programs: the runs compile the same few."""
    folder, seconds = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, folder), getattr(jax.config, seconds)
    cache = str(tmp_path_factory.mktemp("cache"))
    jax.config.update(folder, cache)
    jax.config.update(seconds, 0.0)
    with pytest.MonkeyPatch.context() as patch:  # for the processes that tests start
        patch.setenv(folder.upper(), cache)
        patch.setenv(seconds.upper(), "0")
        yield
    jax.config.update(folder, before[0])
    jax.config.update(seconds, before[1])


@pytest.fixture(scope="module")
def mixed_dtypes():
    """`standard_promotion` for a whole module: optax's cosine schedule mixes dtypes."""
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.fixture(scope="session")
def text(tmp_path_factory):
    """Sixty documents of words in random order."""
    return runs.write_text(tmp_path_factory.mktemp("text") / "text.jsonl")
