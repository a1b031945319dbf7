"""Fine-tunes all of Llama-3-8B with AdaLomo on one 24 GB GPU.

    python train.py --config configs/llama3_8b.py --config.model.path=DIR --config.data.path=TEXT

DIR is a Hugging Face directory of Llama-3-8B, or of another model of the family: its shape is read
from there. TEXT is a file, a folder or a glob; without it the run trains on the Python standard
library, as in `configs/llama7b.py`. `--config.model.init=random` in the place of
`--config.model.path=DIR` tries memory and speed on random weights.

Hardware: one NVIDIA GPU with 24 GB. Planned for an
RTX 3090, not measured: 17.1 GiB of device memory, by

    python -m lomo_jax.plan --config configs/llama3_8b.py --gpu rtx3090

With less memory, --config.offload.params=true --config.offload.activations=true keeps weights and
layer inputs on the host.

Settings: those of `configs/llama7b.py`, the AdaLomo paper's for further pre-training.

Expect: not yet run on such a GPU.
"""

import sysconfig

from lomo_jax.training import Architecture, Config, DataConfig, ModelConfig


def get_config() -> Config:
    """Returns the run's config."""
    return Config(
        model=ModelConfig(
            architecture=Architecture(
                vocab_size=128256,
                width=4096,
                mlp_width=14336,
                num_layers=32,
                num_heads=32,
                num_kv_heads=8,
                rope_theta=500000.0,
                norm_eps=1e-5,
                max_length=8192,
            )
        ),
        data=DataConfig(path=f"{sysconfig.get_path('stdlib')}/*.py"),
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.03,
        batch_size=2,
        sequence_length=2048,
        steps=1000,
        param_dtype="bfloat16",
        eval_every=100,
        eval_batches=64,
        workdir="runs/llama3_8b",
    )
