"""Tunes adapters (LoRA) on all linear maps of LLaMA-7B, whose weights stay as they are.

    python train.py --config configs/lora.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of LLaMA-7B, or of another model. DATA is instructions,
conversations or text. The adapters are in runs/lora/export, as PEFT reads them;
`lomo-jax export --merge runs/lora OUT` writes a whole model.

Hardware: one NVIDIA GPU with 24 GB for batches of 8 x 512 tokens. Plan it with

    lomo-jax plan --config configs/lora.py --gpu rtx3090

Settings: rank 16 and alpha 16 on all seven linear maps of a layer, AdamW with a peak learning rate
of 3e-4, the rate of the AdaLomo paper's LoRA (arXiv 2310.10195; its rank is 8, its dropout 0.05).

Expect: not yet run on such a GPU.
"""

import llama7b

from lomo_jax.training import Config, LoraConfig


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama7b.get_config()
    config.lora = LoraConfig(rank=16, alpha=16)
    config.optimizer = "adamw"
    config.learning_rate = 3e-4
    config.schedule = "linear"
    config.workdir = "runs/lora"
    return config
