"""The floating-point operations that training needs."""

from lomo_jax.models.config import DecoderConfig


def flops_per_token(config: DecoderConfig, sequence_length: int) -> float:
    """Returns the FLOPs of training on one token, without recomputation.

    Six per weight of a matrix product (two in the forward pass, four in the backward pass), plus
    6 heads * head_dim * sequence_length per layer for causal attention.

    References:
      Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    mlp = (3 if config.gated_mlp else 2) * config.mlp_width * (config.experts_per_token or 1)
    layer = config.width * (2 * heads + 2 * kv_heads + mlp + config.num_experts)
    attention = heads * sequence_length  # products with K and V, over half the sequence on average
    return 6.0 * (config.num_layers * (layer + attention) + config.width * config.vocab_size)
