"""The operations that training asks for, and those that a device can do."""

from lomo_jax.models.config import LlamaConfig

# Peak of dense bfloat16 products with float32 sums, in TFLOP/s, by a word of the device's kind: the
# vendors' data sheets, at boost clock and without sparsity.
_PEAK_TFLOPS = {
    "3090": 71.0,
    "4090": 165.2,
    "5090": 209.5,
    "A6000": 154.8,
    "A100": 312.0,
    "L40S": 362.0,
    "L4": 121.0,
    "H100": 989.4,
    "H200": 989.4,
    "B200": 2250.0,
    "TPU v4": 275.0,
    "TPU v5 lite": 197.0,
    "TPU v5p": 459.0,
    "TPU v6 lite": 918.0,
}


def flops_per_token(config: LlamaConfig, sequence_length: int) -> float:
    """Floating-point operations that training on one token asks for, recomputation not counted.

    Six for each weight of a matrix product, two forward and four backward, and twelve for each
    width of a query and key that the causal mask lets meet.

    References:
      Chowdhery et al., PaLM, arXiv 2204.02311, appendix B.
    """
    heads = config.num_heads * config.head_dim
    kv_heads = config.num_kv_heads * config.head_dim
    layer = config.width * (2 * heads + 2 * kv_heads + 3 * config.mlp_width)
    attention = heads * sequence_length  # scores and values, each over half the sequence on average
    return 6.0 * (config.num_layers * (layer + attention) + config.width * config.vocab_size)


def peak_flops(device_kind: str) -> float | None:
    """Returns the peak of a device in FLOP/s, None where it is not known."""
    for name, tflops in _PEAK_TFLOPS.items():
        if name in device_kind:
            return tflops * 1e12
    return None
