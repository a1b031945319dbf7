"""Plans which models fit which GPU, what each `remat` needs, what is fastest: tables of the docs.

    JAX_PLATFORMS=cpu python benchmarks/fits.py [BATCH_SIZE SEQUENCE_LENGTH]
    JAX_PLATFORMS=cpu python benchmarks/fits.py --remat [BATCH_SIZE SEQUENCE_LENGTH]
    JAX_PLATFORMS=cpu python benchmarks/fits.py --best [BATCH_SIZE SEQUENCE_LENGTH]

Needs `pip install 'lomo_jax[train,cuda]'` but no GPU; nothing is run or measured. XLA compiles the
training step with AdaLomo.

The first table shows the first of `SETTINGS` that fits. The second, of LLaMA-7B on an A100 of
80 GB, also counts the FLOPs of the matrix products, those of attention over the causal half,
relative to a step without recomputation. The third, of LLaMA-7B, shows what `lomo-jax plan --best`
finds for each GPU, with modelled times.
"""

import argparse
import dataclasses
from collections.abc import Iterator

import jax

from lomo_jax import Offload
from lomo_jax.flops import flops_per_token
from lomo_jax.fused import REMAT_POLICIES
from lomo_jax.models import DecoderConfig
from lomo_jax.plan import find
from lomo_jax.training import Config, ModelConfig
from lomo_jax.training.config_reader import read_config
from lomo_jax.training.planning import compile_run
from lomo_jax.training.search import fastest, search

LLAMA_3_8B = read_config("llama3_8b").model.architecture
MODELS = {
    "Llama-3.2-1B": dataclasses.replace(
        LLAMA_3_8B, width=2048, mlp_width=8192, num_layers=16, head_dim=64, tie_embeddings=True
    ),
    "Llama-3.2-3B": dataclasses.replace(
        LLAMA_3_8B, width=3072, mlp_width=8192, num_layers=28, num_heads=24, tie_embeddings=True
    ),
    "LLaMA-7B": DecoderConfig(),
    "Llama-3-8B": LLAMA_3_8B,
    "LLaMA-13B": read_config("llama13b").model.architecture,
    "LLaMA-30B": read_config("llama30b").model.architecture,
    "LLaMA-65B": read_config("llama65b").model.architecture,
}
MODELS |= {
    "Mistral-7B": dataclasses.replace(LLAMA_3_8B, family="mistral", vocab_size=32768),
    "Qwen3-8B": dataclasses.replace(
        LLAMA_3_8B,
        family="qwen3",
        vocab_size=151936,
        mlp_width=12288,
        num_layers=36,
        qk_norm="head",
    ),
    "Gemma-2-9B": dataclasses.replace(
        LLAMA_3_8B,
        family="gemma2",
        vocab_size=256000,
        width=3584,
        num_layers=42,
        num_heads=16,
        head_dim=256,
        tie_embeddings=True,
        activation="gelu_tanh",
        norm_places="around",
        norm_offset=1.0,
        window=4096,
        sliding_layers=(True, False) * 21,
        attention_cap=50.0,
        logit_cap=30.0,
        embedding_multiplier=3584**0.5,
    ),
    "Mixtral-8x7B": dataclasses.replace(
        LLAMA_3_8B, family="mixtral", vocab_size=32000, num_experts=8, experts_per_token=2
    ),
}
BEST_ON = ("rtx3060", "rtx4080", "rtx3090", "rtx4090", "l40s", "a100-80", "h100")
CARDS = {"12 GB": "rtx3060", "16 GB": "rtx4080", "24 GB": "rtx3090"}
SETTINGS = {
    "as it is": {},
    "inputs in host": {"offload": Offload(activations=True)},
    "all in host": {"offload": Offload(params=True, activations=True)},
}


def settings(
    architecture: DecoderConfig, batch_size: int, length: int
) -> Iterator[tuple[str, Config]]:
    """Yields the settings to try, the fastest first."""
    base = Config(
        model=ModelConfig(init="random", architecture=architecture),
        batch_size=batch_size,
        sequence_length=length,
    )
    for name, fields in SETTINGS.items():
        yield name, dataclasses.replace(base, **fields)


def print_fits(batch_size: int, length: int) -> None:
    """Prints the models that fit each card, in Markdown."""
    print(f"jax {jax.__version__}, planned, batches of {batch_size} x {length}, GiB")
    titles = (f"{size} ({find(gpu).device_kind})" for size, gpu in CARDS.items())
    print("| model |", " | ".join(titles), "| host |")
    print("|---|" + "---|" * (len(CARDS) + 1))
    for model, architecture in MODELS.items():
        cells, host = [], 0.0
        for card in CARDS.values():
            for name, config in settings(architecture, batch_size, length):
                plan = compile_run(config, find(card)).plan
                if plan.fits:
                    cells.append(f"{name}: {plan.total_gib:.1f}")
                    host = max(host, plan.host_gib)
                    break
            else:
                cells.append("no")
        print("|", model, "|", " | ".join(cells), f"| {host:.0f} |", flush=True)


def print_best(batch_size: int, length: int) -> None:
    """Prints the fastest setting of LLaMA-7B that fits each GPU, in Markdown."""
    print(f"jax {jax.__version__}, LLaMA-7B, {batch_size} x {length}, planned and modelled")
    titles = "GPU | compiled | fastest that fits | GiB | host, GiB | s | tokens/s | exposed"
    print("|", titles, "|\n|" + "---|" * 8)
    base = dict(settings(MODELS["LLaMA-7B"], batch_size, length))["as it is"]
    for name in BEST_ON:
        found = list(search(base, find(name)))
        best = fastest(found)
        if best is None:
            print(f"| {find(name).device_kind} | {len(found)} | none | | | | | |", flush=True)
            continue
        memory, time = best.memory, best.time
        print(
            f"| {find(name).device_kind} | {len(found)} | {best.flags(base)} "
            f"| {memory.total_gib:.1f} | {memory.host_gib:.1f} | {time.step_seconds:.3g} "
            f"| {time.tokens_per_second:,.0f} | {time.exposed_seconds / time.step_seconds:.0%} |",
            flush=True,
        )


def flops(config: DecoderConfig, length: int, remat: str) -> float:
    """Returns the FLOPs of a step relative to one without recomputation."""
    head = 2 * config.width * config.vocab_size
    attention = 2 * length * config.num_heads * config.head_dim
    training = flops_per_token(config, length)
    layer = (training - 3 * head) / (3 * config.num_layers)  # its forward pass
    again = {"attention": layer - attention, "full": layer}.get(remat, 0)
    # Every step recomputes the head's logits.
    return (training + config.num_layers * again + head) / (training + head)


def print_remat(batch_size: int, length: int) -> None:
    """Prints memory and FLOPs with each `remat`, in Markdown."""
    print(f"jax {jax.__version__}, LLaMA-7B, {batch_size} x {length}, A100, planned")
    print("| remat | device memory, GiB | FLOPs |")
    print("|---|---|---|")
    for remat in REMAT_POLICIES:
        model = DecoderConfig(max_length=max(2048, length))
        config = Config(
            model=ModelConfig(init="random", architecture=model),
            batch_size=batch_size,
            sequence_length=length,
            remat=remat,
        )
        total = compile_run(config, find("a100-80")).plan.total_gib
        print(f"| {remat} | {total:.1f} | {flops(model, length, remat):.2f} |", flush=True)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("batch", nargs="*", type=int, help="batch size and sequence length")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--remat", action="store_true", help="print the table of `remat`")
    which.add_argument("--best", action="store_true", help="print the fastest settings")
    flags = parser.parse_args()
    if len(flags.batch) not in (0, 2):
        parser.error("give batch size and sequence length, or neither")
    if flags.remat:
        print_remat(*flags.batch or (8, 512))
    elif flags.best:
        print_best(*flags.batch or (4, 2048))
    else:
        print_fits(*flags.batch or (4, 2048))


if __name__ == "__main__":
    main()
