"""The rows and sizes that `compare.py` compares, and the batches that all of them train on."""

import dataclasses
from typing import Any, NamedTuple

import numpy as np

BATCHES = 4  # a run cycles through them


class Row(NamedTuple):
    """One way to train."""

    name: str
    # "floor": forward and backward pass without an update; "scanned", "unrolled":
    # `jax.value_and_grad` and optax with stacked layers or a list of layers; "fused":
    # `lomo_jax.fused_step`; "torch".
    kind: str
    optimizer: str
    options: dict[str, Any] = {}  # noqa: RUF012  # for `fused_step`


@dataclasses.dataclass(frozen=True)
class Size:
    """A LLaMA, its batch and its dtype. Every row recomputes each layer, unless `remat` is set."""

    vocab_size: int
    width: int
    mlp_width: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    batch_size: int
    length: int  # tokens of a sequence
    dtype: str
    microbatches: int = 4  # for rows with the option

    @property
    def tokens(self) -> int:
        """Tokens in a step."""
        return self.batch_size * self.length

    def architecture(self) -> dict[str, Any]:
        """Returns the arguments of `lomo_jax.models.DecoderConfig`."""
        others = ("batch_size", "length", "dtype", "microbatches")
        fields = {k: v for k, v in dataclasses.asdict(self).items() if k not in others}
        return fields | {"head_dim": self.width // self.num_heads}


SIZES = {
    "tiny": Size(512, 64, 160, 2, 4, 2, 4, 32, "float32"),
    "20m": Size(8000, 384, 1024, 8, 6, 6, 4, 256, "float32"),
    "1b": Size(32000, 2048, 5632, 22, 32, 4, 8, 512, "bfloat16"),
    "7b": Size(32000, 4096, 11008, 32, 32, 32, 8, 512, "bfloat16"),
}

_CLIP = {"clip_norm": 1.0}
ROWS = [
    Row("forward + backward, no update", "floor", "none"),
    *(Row(f"scanned, {name}", "scanned", name) for name in ("sgd", "adamw", "adafactor")),
    *(Row(f"scanned, {name}", "scanned", name) for name in ("lomo", "adalomo")),
    *(Row(f"unrolled, {name}", "unrolled", name) for name in ("sgd", "adamw", "adafactor")),
    *(Row(f"unrolled, {name}", "unrolled", name) for name in ("lomo", "adalomo")),
    *(Row(f"fused, {name}", "fused", name) for name in ("lomo", "adalomo", "adamw", "adafactor")),
    Row("fused, adalomo, clip_norm", "fused", "adalomo", _CLIP),
    Row("fused, adalomo, microbatches", "fused", "adalomo", {"microbatches": None}),
    Row("fused, adalomo, inputs in host memory", "fused", "adalomo", {"offload": "activations"}),
    Row("fused, adalomo, all in host memory", "fused", "adalomo", {"offload": "all"}),
    Row("fused, adalomo, remat=attention", "fused", "adalomo", {"remat": "attention"}),
    Row("fused, adalomo, remat=none", "fused", "adalomo", {"remat": "none"}),
    Row("torch lomo-optim, Lomo", "torch", "Lomo"),
    Row("torch lomo-optim, AdaLomo", "torch", "AdaLomo"),
    Row("torch, AdamW", "torch", "AdamW"),
    Row("torch, AdamW in backward", "torch", "AdamW in backward"),
    Row("torch, Adafactor in backward", "torch", "Adafactor in backward"),
]

# One per rule, whichever row computes it.
LEARNING_RATES = {
    "none": 0.0,
    "sgd": 0.01,
    "lomo": 0.01,
    "adalomo": 1e-2,
    "adamw": 1e-3,
    "adafactor": 1e-2,
}


def rivals(row: Row) -> list[Row]:
    """Returns the rows of `ROWS` that apply the same rule as a fused row, but are not fused."""
    families = ({"lomo", "sgd"}, {"adalomo"}, {"adamw"}, {"adafactor"})
    family = next(f for f in families if row.optimizer in f)
    return [
        other
        for other in ROWS
        if other.kind not in ("fused", "floor") and other.optimizer.split(" ")[0].lower() in family
    ]


def batches(size: Size) -> np.ndarray:
    """Returns tokens [BATCHES, B, T], int32, from a skewed distribution that a model can learn."""
    rng = np.random.default_rng(0)
    shape = (BATCHES, size.batch_size, size.length)
    return np.minimum(rng.zipf(1.3, shape) - 1, size.vocab_size - 1).astype(np.int32)
