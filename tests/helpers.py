"""Helpers for tests: tiny models, random arrays, quick compilation."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lomo_jax import models
from lomo_jax.losses import next_token_loss


def before_release(*values):
    """A case that resembles others so much that it runs before a release, and not in CI."""
    return pytest.param(*values, marks=[pytest.mark.slow, pytest.mark.exhaustive])


def quick_jit(function, **kwargs):
    """`jax.jit` without LLVM's optimisations, which take most of the time of a small test.

    XLA's program and its plan of the memory are the same.
    """
    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0}, **kwargs)


def normal(seed, *shape, scale=0.4, dtype=jnp.float32):
    """Returns random numbers that depend on `seed` alone, not on the version of JAX."""
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), dtype)


def tiny_llama(**changes):
    """Returns the shape of a LLaMA with grouped heads that is quick to compile."""
    config = {
        "vocab_size": 48,
        "width": 32,
        "mlp_width": 40,
        "num_layers": 3,
        "num_heads": 4,
        "num_kv_heads": 2,
        "head_dim": 8,
    }
    return models.DecoderConfig(**config | changes)


def llama_loss(graphdef):
    """Returns a loss `(params, tokens) -> (loss, Metrics)`: each token predicts the next one."""

    def loss(params, tokens_BxT):
        llama = nnx.merge(graphdef, params)
        weights_BxT = jnp.ones(tokens_BxT.shape).at[:, -1].set(0.0)
        targets_BxT = jnp.roll(tokens_BxT, -1, axis=1)
        return next_token_loss(llama.hidden(tokens_BxT), llama.head(), targets_BxT, weights_BxT)

    return loss
