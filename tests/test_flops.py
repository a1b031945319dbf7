"""The floating-point operations of training."""

import jax

from lomo_jax import models
from lomo_jax.flops import flops_per_token

_CONFIG = models.DecoderConfig(
    vocab_size=100,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


def test_flops_are_six_per_matrix_weight_plus_attention():
    _, params = models.abstract(_CONFIG)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    # Neither the norms' scales, stacked to 2 dimensions, nor the embedding lookup are matmuls.
    matrices -= 3 * 2 * 32 + 100 * 32
    # Two products, with K and with V: 2 operations per element of all heads, for (t + 1) / 2 keys
    # per query on average; 3 times as many for forward and backward pass, in 3 layers.
    attention = 3 * 3 * 2 * 2 * (20 / 2) * 40
    assert flops_per_token(_CONFIG, 20) == 6 * matrices + attention
