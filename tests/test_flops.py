"""The floating-point operations of training."""

import jax

from lomo_jax import models
from lomo_jax.flops import flops_per_token

_CONFIG = models.LlamaConfig(
    vocab_size=100,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


def test_flops_are_six_for_each_weight_of_a_product_and_attention():
    _, params = models.abstract(_CONFIG)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    # The norms' scales are stacked too; neither they nor the embedding's look-up are products.
    matrices -= 3 * 2 * 32 + 100 * 32
    # Scores and values: 2 operations each for the (t + 1) / 2 keys that a query sees on average, by
    # the width of all heads, thrice for forward and backward.
    attention = 3 * 3 * 2 * 2 * (20 / 2) * 40
    assert flops_per_token(_CONFIG, 20) == 6 * matrices + attention
