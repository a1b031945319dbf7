"""Twenty steps of a small LLaMA, with `fused_step` and with `reference_step`."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import before_release, llama_loss, tiny_llama

import lomo_jax
from lomo_jax import models

B, T = 2, 16
RULES = {
    "lomo": lambda: lomo_jax.lomo(0.1, weight_decay=0.01),
    "adalomo": lambda: lomo_jax.adalomo(0.02, weight_decay=0.01),
    # Adam's update does not shrink with the gradient. Some gradients here are 4e-8, next to others
    # of 1e-3: with the default eps of 1e-8 their rounding error would show.
    "adamw": lambda: optax.adamw(1e-3, eps=1e-6),
    "lion": lambda: optax.lion(1e-4),
    "adafactor": lambda: optax.adafactor(0.01, min_dim_size_to_factor=1),
}


QUICK = [("adalomo", "tied"), ("adamw", "untied")]
CASES = [
    (rule, tied) if (rule, tied) in QUICK else before_release(rule, tied)
    for rule in RULES
    for tied in ("tied", "untied")
]


@pytest.mark.parametrize(("rule", "tied"), CASES)
def test_twenty_steps(rule, tied, assert_steps_agree, standard_promotion):
    config = tiny_llama(tie_embeddings=tied == "tied")
    graphdef, params = models.init(config, 0, jnp.float32)
    batches = jax.random.randint(jax.random.key(1), (20, B, T), 0, config.vocab_size)
    assert_steps_agree(llama_loss(graphdef), RULES[rule](), params, list(batches), has_aux=True)
