"""Plans LLaMA-7B with each `remat` for an A100 of 80 GB: memory, and the FLOPs of a step.

    JAX_PLATFORMS=cpu python benchmarks/remat.py [BATCH_SIZE SEQUENCE_LENGTH]

Needs `pip install 'lomo_jax[train,cuda]'`, but no GPU; nothing is run. The FLOPs are counted, not
planned: those of the matrix products, attention's over the causal half, relative to a step that
computes nothing twice.
"""

import sys

import jax

from lomo_jax.fused import REMAT_POLICIES
from lomo_jax.plan import gpus
from lomo_jax.plan.runs import compile_run
from lomo_jax.training import Architecture, Config, ModelConfig


def flops(model: Architecture, length: int, remat: str) -> float:
    """Returns FLOPs a token, relative to those of remat="none"."""
    kv_width = model.num_kv_heads * model.head_dim
    width = model.num_heads * model.head_dim
    weights = model.width * (2 * width + 2 * kv_width + 3 * model.mlp_width)
    layer, attention = 2 * weights, 2 * length * width
    head = 2 * model.width * model.vocab_size
    once = 3 * (model.num_layers * (layer + attention) + head)  # a backward pass is two forward
    again = {"none": 0, "attention": layer, "full": layer + attention}[remat]
    # The head's logits are computed again in any case.
    return (once + model.num_layers * again + head) / (once + head)


def main(batch_size: str = "8", length: str = "512") -> None:
    """Prints the table, in Markdown."""
    print(f"jax {jax.__version__}, LLaMA-7B, {batch_size} x {length}, A100, planned")
    print("| remat | device memory, GiB | FLOPs |")
    print("|---|---|---|")
    for remat in REMAT_POLICIES:
        config = Config(
            model=ModelConfig(
                init="random", architecture=Architecture(max_length=max(2048, int(length)))
            ),
            batch_size=int(batch_size),
            sequence_length=int(length),
            remat=remat,
        )
        total = compile_run(config, gpus.find("a100-80")).plan.total_gib
        work = flops(config.model.architecture, int(length), remat)
        print(f"| {remat} | {total:.1f} | {work:.2f} |", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
