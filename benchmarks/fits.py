"""Plans which models fit which card, and with what: the table "What fits on my card" of the README.

    JAX_PLATFORMS=cpu python benchmarks/fits.py [BATCH_SIZE SEQUENCE_LENGTH]

Needs `pip install 'lomo_jax[train,cuda]'`, but no GPU. Nothing is run or measured: XLA compiles the
step of `train.py` with AdaLomo for each card. The first of the settings below that fits is shown.
"""

import dataclasses
import sys
from collections.abc import Iterator

import jax

from lomo_jax import Offload
from lomo_jax.models import LlamaConfig
from lomo_jax.plan import gpus
from lomo_jax.plan.runs import compile_run
from lomo_jax.training import LLAMA_7B, Config, ModelConfig

LLAMA_3 = {"vocab_size": 128256, "num_kv_heads": 8, "rope_theta": 5e5, "max_length": 8192}
MODELS = {
    "Llama-3.2-1B": dataclasses.replace(
        LLAMA_7B,
        width=2048,
        mlp_width=8192,
        num_layers=16,
        head_dim=64,
        tie_embeddings=True,
        **LLAMA_3,
    ),
    "Llama-3.2-3B": dataclasses.replace(
        LLAMA_7B,
        width=3072,
        mlp_width=8192,
        num_layers=28,
        num_heads=24,
        tie_embeddings=True,
        **LLAMA_3,
    ),
    "LLaMA-7B": LLAMA_7B,
    "Llama-3-8B": dataclasses.replace(LLAMA_7B, mlp_width=14336, **LLAMA_3),
    "LLaMA-13B": dataclasses.replace(
        LLAMA_7B, width=5120, mlp_width=13824, num_layers=40, num_heads=40, num_kv_heads=40
    ),
    "LLaMA-30B": dataclasses.replace(
        LLAMA_7B, width=6656, mlp_width=17920, num_layers=60, num_heads=52, num_kv_heads=52
    ),
    "LLaMA-65B": dataclasses.replace(
        LLAMA_7B, width=8192, mlp_width=22016, num_layers=80, num_heads=64, num_kv_heads=64
    ),
}
CARDS = {"12 GB": "rtx3060", "16 GB": "rtx4080", "24 GB": "rtx3090"}
SETTINGS = {
    "as it is": {},
    "inputs in host": {"offload": Offload(activations=True)},
    "all in host": {"offload": Offload(params=True, activations=True)},
}


def settings(
    architecture: LlamaConfig, batch_size: int, length: int
) -> Iterator[tuple[str, Config]]:
    """Yields the settings to try, those that cost the least time first."""
    base = Config(
        model=ModelConfig(init="random", architecture=architecture),
        batch_size=batch_size,
        sequence_length=length,
    )
    for name, fields in SETTINGS.items():
        yield name, dataclasses.replace(base, **fields)


def main(batch_size: str = "4", length: str = "2048") -> None:
    """Prints the table, in Markdown."""
    print(f"jax {jax.__version__}, planned, batches of {batch_size} x {length}, GiB")
    print(
        "| model |", " | ".join(f"{c} ({gpus.find(g).title})" for c, g in CARDS.items()), "| host |"
    )
    print("|---|" + "---|" * (len(CARDS) + 1))
    for model, architecture in MODELS.items():
        cells, host = [], 0.0
        for card in CARDS.values():
            for name, config in settings(architecture, int(batch_size), int(length)):
                plan = compile_run(config, gpus.find(card)).plan
                if plan.fits:
                    cells.append(f"{name}: {plan.total_gib:.1f}")
                    host = max(host, plan.host_gib)
                    break
            else:
                cells.append("no")
        print("|", model, "|", " | ".join(cells), f"| {host:.0f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
