"""Fine-tunes all parameters of LLaMA-65B with AdaLomo on one 24 GB GPU and the memory of its host.

    python train.py --config configs/llama65b.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of LLaMA-65B, or of another model, which then sets
the shape. DATA is a file, a folder or a glob. To try memory and speed without a checkpoint,
replace `--config.model.path=DIR` by `--config.model.init=random`.

Hardware: one NVIDIA GPU with 24 GB, and enough host memory for the weights. Planned for an RTX
3090, not measured: 3.6 GiB of device memory and 122.9 GiB of host memory, by

    lomo-jax plan --config configs/llama65b.py --gpu rtx3090

At 1 x 1024 tokens, moving the weights over PCIe takes longer than the computation. A larger batch
fits, and takes little more time per step.

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
        width=8192,
        mlp_width=22016,
        num_layers=80,
        num_heads=64,
        num_kv_heads=64,
        norm_eps=1e-5,
    )
    # A step moves the weights over PCIe twice to the GPU and once back, for any batch.
    config.offload = Offload(params=True, activations=True)
    config.batch_size = 1
    config.sequence_length = 1024
    config.workdir = "runs/llama65b"
    return config
