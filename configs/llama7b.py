"""Fine-tunes all parameters of LLaMA-7B with AdaLomo on one 24 GB GPU.

    python train.py --config configs/llama7b.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of LLaMA-7B, or of another model, which then sets
the shape. DATA is a file, a folder or a glob. To try memory and speed without a checkpoint,
replace `--config.model.path=DIR` by `--config.model.init=random`: the same step on random weights,
with one token per byte.

Hardware: one NVIDIA GPU with 24 GB for batches of 8 x 512 tokens; with more memory, larger batches
and longer sequences. Planned for an RTX 3090, not measured: 14.2 GiB of device memory, by

    lomo-jax plan --config configs/llama7b.py --gpu rtx3090

With --suggest it also plans options that need less memory.

Settings: the AdaLomo paper's for further pre-training (arXiv 2310.10195): peak learning rate 1e-3,
cosine to 0, 3 % warm-up, bfloat16, no clipping, evaluation every 100 steps. The paper's batches are
128 x 2048; its instruction tuning uses a rate of 5e-4 and a linear schedule. The authors' code
rounds weights to nearest; `--config.rounding=stochastic` needs no more memory and learned more in
short runs (docs/learning.md).

Expect: not yet run on such a GPU.
"""

from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    return Config(
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.03,
        batch_size=8,
        sequence_length=512,
        steps=1000,
        param_dtype="bfloat16",
        eval_every=100,
        eval_batches=64,
        workdir="runs/llama7b",
    )
