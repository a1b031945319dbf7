"""Fine-tunes all of LLaMA-65B with AdaLomo on one 24 GB GPU and the memory of its host.

    python train.py --config configs/llama65b.py --config.model.path=DIR --config.data.path=TEXT

DIR is a Hugging Face directory of LLaMA-65B, or of another model of the family: its shape is read
from there. TEXT is a file, a folder or a glob; without it the run trains on the Python standard
library, as in `configs/llama7b.py`. `--config.model.init=random` in the place of
`--config.model.path=DIR` tries memory and speed on random weights.

Hardware: one NVIDIA GPU with 24 GB and a host with room for the weights. Planned for an
RTX 3090, not measured: 3.6 GiB of device memory and 122.9 GiB of host memory, by

    python -m lomo_jax.plan --config configs/llama65b.py --gpu rtx3090

At 1 x 1024 tokens it takes longer to move the weights over PCIe than to compute with them: a larger
batch, for which there is room, costs little more time.

Settings: those of `configs/llama7b.py`, the AdaLomo paper's for further pre-training.

Expect: not yet run on such a GPU.
"""

import sysconfig

from lomo_jax.training import Architecture, Config, DataConfig, ModelConfig, OffloadConfig


def get_config() -> Config:
    """Returns the run's config."""
    return Config(
        model=ModelConfig(
            architecture=Architecture(
                width=8192,
                mlp_width=22016,
                num_layers=80,
                num_heads=64,
                num_kv_heads=64,
                norm_eps=1e-5,
            )
        ),
        data=DataConfig(path=f"{sysconfig.get_path('stdlib')}/*.py"),
        # In a step the weights go over PCIe twice to the GPU and once back, whatever the batch.
        offload=OffloadConfig(params=True, activations=True),
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.03,
        batch_size=1,
        sequence_length=1024,
        steps=1000,
        param_dtype="bfloat16",
        eval_every=100,
        eval_batches=64,
        workdir="runs/llama65b",
    )
