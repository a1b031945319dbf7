"""Runs compile the same few programs again and again: a cache of them saves most of the time."""

import jax
import pytest


@pytest.fixture(scope="session", autouse=True)
def _compilation_cache(tmp_path_factory):
    folder, seconds = "jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs"
    before = getattr(jax.config, folder), getattr(jax.config, seconds)
    jax.config.update(folder, str(tmp_path_factory.mktemp("cache")))
    jax.config.update(seconds, 0.2)
    yield
    jax.config.update(folder, before[0])
    jax.config.update(seconds, before[1])
