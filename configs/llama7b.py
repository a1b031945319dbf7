"""Fine-tunes all of LLaMA-7B with AdaLomo on one 24 GB GPU.

    python train.py --config configs/llama7b.py --config.model.path=DIR --config.data.path=TEXT

DIR is a Hugging Face directory of LLaMA-7B, or of another model of the family: its shape is read
from there. TEXT is a file, a folder or a glob; without it the run trains on the Python standard
library, which stands in for the Python code of the paper.

To try memory and speed without a checkpoint, `--config.model.init=random` in the place of
`--config.model.path=DIR` runs the same step on random weights; a token is then a byte.

Hardware: one NVIDIA GPU with 24 GB for batches of 8 x 512 tokens; larger batches and sequences
where there is more. Planned for an RTX 3090, not measured: 14.2 GiB of device memory, by

    python -m lomo_jax.plan --config configs/llama7b.py --gpu rtx3090

which with --suggest also plans what would need less.

Settings: the AdaLomo paper's for further pre-training (arXiv 2310.10195): peak learning rate 1e-3,
cosine to 0, 3 % warm-up, bfloat16, no clipping, evaluation every 100 steps. The paper's batches are
128 x 2048; for its instruction tuning the rate is 5e-4, the schedule linear.

Expect: not yet run on such a GPU.
"""

import sysconfig

from lomo_jax.training import Config, DataConfig


def get_config() -> Config:
    """Returns the run's config."""
    return Config(
        data=DataConfig(path=f"{sysconfig.get_path('stdlib')}/*.py"),
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
