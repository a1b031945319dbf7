"""Plans how much of the transfers runs beside computing: the table of docs/scaling.md.

    JAX_PLATFORMS=cpu python benchmarks/overlap.py [MODEL...]

Needs `pip install 'lomo_jax[train,cuda]'` but no GPU; nothing is run or measured. XLA compiles the
training step with AdaLomo, and `lomo_jax.plan.read_time` models it, on one GPU with weights and
layer inputs in host memory, and on eight that share the weights (`mesh.fsdp=8`). Each GPU has
4 x 1024 tokens. "at once" is the modelled time of a step in which everything waits for every
transfer, as XLA compiles it for most GPUs if nothing is done about it.
"""

import argparse

import jax

from lomo_jax import Offload
from lomo_jax.plan import find
from lomo_jax.training import Config, MeshConfig, ModelConfig
from lomo_jax.training.config_reader import read_config
from lomo_jax.training.planning import compile_run

MODELS = {
    "LLaMA-7B": "llama7b",
    "Llama-3-8B": "llama3_8b",
    "LLaMA-13B": "llama13b",
    "LLaMA-65B": "llama65b",
}
GPUS = ("rtx3090", "rtx4090", "l40s", "a100-80", "h100")
ROWS, LENGTH = 4, 1024  # of each GPU
SETTINGS = {
    "1, in host memory": (1, {"offload": Offload(params=True, activations=True)}),
    "8, fsdp": (8, {"mesh": MeshConfig(data=1, fsdp=8)}),
}


def main() -> None:
    """Prints the table, in Markdown."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("models", nargs="*", metavar="MODEL", help=", ".join(MODELS))
    print(f"jax {jax.__version__}, GiB planned, seconds modelled")
    titles = "model | GPUs | kind | GiB | transfers | exposed | step | all at once | tokens/s"
    print(f"| {titles} |\n|" + "---|" * 9)
    for model in parser.parse_args().models or MODELS:
        architecture = read_config(MODELS[model]).model.architecture
        for setting, (devices, fields) in SETTINGS.items():
            config = Config(
                model=ModelConfig(init="random", architecture=architecture),
                batch_size=ROWS * devices,
                sequence_length=LENGTH,
                **fields,
            )
            for name in GPUS:
                run = compile_run(config, find(name), devices)
                time, gib = run.time, run.plan.total_gib
                at_once = time.step_seconds - time.exposed_seconds + time.transfer_seconds
                cells = [model, setting, find(name).device_kind.removeprefix("NVIDIA ")]
                cells += [f"{gib:.1f}" + ("" if run.plan.fits else ", too much")]
                seconds = time.transfer_seconds, time.exposed_seconds, time.step_seconds, at_once
                cells += [f"{x:.3g}" for x in seconds]
                print(f"| {' | '.join(cells)} | {time.tokens_per_second:,.0f} |", flush=True)


if __name__ == "__main__":
    main()
