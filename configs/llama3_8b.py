"""Fine-tunes all parameters of Llama-3-8B with AdaLomo on one 24 GB GPU.

    python train.py --config configs/llama3_8b.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of Llama-3-8B, or of another model, which then sets
the shape. DATA is a file, a folder or a glob. To try memory and speed without a checkpoint,
replace `--config.model.path=DIR` by `--config.model.init=random`.

Hardware: one NVIDIA GPU with 24 GB. Planned for an RTX 3090, not measured: 17.1 GiB of device
memory, by

    lomo-jax plan --config configs/llama3_8b.py --gpu rtx3090

With less memory, add --config.offload.params=true --config.offload.activations=true: weights and
layer inputs then live in host memory.

Settings: those of `configs/llama7b.py`, the AdaLomo paper's for further pre-training.

Expect: not yet run on such a GPU.
"""

import dataclasses

import llama7b

from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama7b.get_config()
    config.model.architecture = dataclasses.replace(
        config.model.architecture,
        vocab_size=128256,
        mlp_width=14336,
        num_kv_heads=8,
        rope_theta=500000.0,
        norm_eps=1e-5,
        max_length=8192,
    )
    config.batch_size = 2
    config.sequence_length = 2048
    config.workdir = "runs/llama3_8b"
    return config
