"""Prints the table of families, in Markdown: `python -m lomo_jax.models`."""

import dataclasses

from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.families import FAMILIES
from lomo_jax.models.hf_config import read_config

_SIZES = {
    "vocab_size": 1000,
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_hidden_layers": 12,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
_NOT_SWITCHES = {"family", "norm_eps", "rope_theta", "max_length", "tie_embeddings"}


def table() -> str:
    """Returns the table of families: architecture, and the switches that its defaults set."""
    rows = ["| family | architecture | switches of `DecoderConfig` |", "|---|---|---|"]
    for name, family in FAMILIES.items():
        config = read_config({"architectures": [family.architecture], **_SIZES})
        switches = ", ".join(f"`{field}`" for field in _switches(config)) or "none"
        stored = ", rotary pairs interleaved in files" if family.interleaved else ""
        joined = ", projections joined in files" if "qkv" in str(family.names) else ""
        rows.append(f"| {name} | {family.architecture} | {switches}{stored}{joined} |")
    return "\n".join(rows)


def _switches(config: DecoderConfig) -> list[str]:
    plain = read_config({"architectures": ["LlamaForCausalLM"], **_SIZES})
    return [
        field.name
        for field in dataclasses.fields(config)
        if field.name not in _NOT_SWITCHES
        and getattr(config, field.name) != getattr(plain, field.name)
    ]


if __name__ == "__main__":
    print(table())
