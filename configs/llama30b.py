"""Fine-tunes all parameters of LLaMA-30B with AdaLomo on one 24 GB GPU and the memory of its host.

    python train.py --config configs/llama30b.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of LLaMA-30B, or of another model, which then sets
the shape. DATA is a file, a folder or a glob. To try memory and speed without a checkpoint,
replace `--config.model.path=DIR` by `--config.model.init=random`.

Hardware: one NVIDIA GPU with 24 GB, and enough host memory for the weights. Planned for an RTX
3090, not measured: 2.4 GiB of device memory and 63.6 GiB of host memory, by

    lomo-jax plan --config configs/llama30b.py --gpu rtx3090

There is room for larger batches and longer sequences.

Settings: those of `configs/llama7b.py`, the AdaLomo paper's for further pre-training.

Expect: not yet run on such a GPU.
"""

import dataclasses

import llama7b

from lomo_jax import Offload
from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama7b.get_config()
    config.model.architecture = dataclasses.replace(
        config.model.architecture,
        width=6656,
        mlp_width=17920,
        num_layers=60,
        num_heads=52,
        num_kv_heads=52,
    )
    # A step moves the weights over PCIe twice to the GPU and once back, for any batch.
    config.offload = Offload(params=True, activations=True)
    config.batch_size = 4
    config.sequence_length = 1024
    config.workdir = "runs/llama30b"
    return config
