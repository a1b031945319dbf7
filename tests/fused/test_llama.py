"""Twenty steps of a small LLaMA, fused and plain."""

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lomo_jax
from lomo_jax import models
from lomo_jax.losses import next_token_loss

B, T = 2, 16
RULES = {
    "lomo": lambda: lomo_jax.lomo(0.1, weight_decay=0.01),
    "adalomo": lambda: lomo_jax.adalomo(0.02, weight_decay=0.01),
    # Adam moves an element as far however small its gradient. Next to gradients of 1e-3 some here
    # are of 4e-8, and their rounding error shows with the usual eps of 1e-8.
    "adamw": lambda: optax.adamw(1e-3, eps=1e-6),
    "lion": lambda: optax.lion(1e-4),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=1),
}


def model(*, tie_embeddings):
    config = models.LlamaConfig(
        vocab_size=96,
        width=32,
        mlp_width=64,
        num_layers=4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=8,
        rope_theta=10000.0,
        norm_eps=1e-5,
        max_length=64,
        tie_embeddings=tie_embeddings,
    )
    return models.init(config, 0, jnp.float32)


def loss_of(graphdef):
    def loss(params, tokens):
        llama = nnx.merge(graphdef, params)
        weights = jnp.ones(tokens.shape).at[:, -1].set(0.0)
        targets = jnp.roll(tokens, -1, axis=1)
        return next_token_loss(llama.hidden(tokens), llama.head(), targets, weights)

    return loss


@pytest.mark.parametrize("tie_embeddings", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=pytest.mark.slow) if r == "adafactor" else r for r in RULES]
)
def test_twenty_steps(rule, tie_embeddings, assert_steps_agree, standard_promotion):
    graphdef, params = model(tie_embeddings=tie_embeddings)
    batches = jax.random.randint(jax.random.key(1), (20, B, T), 0, 96)
    assert_steps_agree(loss_of(graphdef), RULES[rule](), params, list(batches), has_aux=True)
