"""Tunes adapters (LoRA) beside the weights of LLaMA-7B in four bits, on one GPU of 12 GB (QLoRA).

    python train.py --config configs/qlora.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of LLaMA-7B, or of another model, in any dtype: it is quantised when
it is read. DATA is instructions, conversations or text. The adapters are in runs/qlora/export, as
PEFT reads them; `lomo-jax export --merge runs/qlora OUT` adds them to the original weights.

Hardware: one NVIDIA GPU with 12 GB, Ampere or newer, for batches of 8 x 512 tokens. Plan it with

    lomo-jax plan --config configs/qlora.py --gpu rtx3060

Settings: QLoRA's (arXiv 2305.14314): NF4 with double quantisation, adapters on all linear maps;
rank 16 and a peak learning rate of 2e-4.

Expect: not yet run on such a GPU.
"""

import lora

from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    config = lora.get_config()
    config.lora.quantize = "nf4"
    config.learning_rate = 2e-4
    config.workdir = "runs/qlora"
    return config
