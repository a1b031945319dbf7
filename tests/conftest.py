"""Every test runs on CPU, with several devices and with strict dtype promotion."""

import os

os.environ["JAX_PLATFORMS"] = "cpu"

import jax
import pytest

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_dtype_promotion", "strict")


@pytest.fixture
def standard_promotion():
    """Lets dtypes mix: for code of others that does so, such as `optax.adamw`."""
    with jax.numpy_dtype_promotion("standard"):
        yield
