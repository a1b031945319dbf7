"""Tunes LLaMA-7B with LOMO and, at the same time, adapters with AdamW, as LOMO's paper does.

    python train.py --config configs/lora_lomo.py --config.model.path=DIR --config.data.path=DATA

DIR is a Hugging Face directory of LLaMA-7B, or of another model. DATA is instructions,
conversations or text. The whole model, adapters added, is in runs/lora_lomo/export.

Hardware: one NVIDIA GPU with 24 GB for batches of 8 x 512 tokens. Plan it with

    lomo-jax plan --config configs/lora_lomo.py --gpu rtx3090

Settings: those of the LOMO paper (arXiv 2306.09782) for SuperGLUE: rank 2 and alpha 16 on queries
and values; adapters by AdamW at 5e-4, all other parameters by LOMO at 5e-3 (the paper: 5e-3 to
5e-4, rank 1 to 8); both linear to 0 after 5 % of warm-up. The norm of the gradient is clipped to 1,
as the authors clip LOMO's, with a second backward pass: without it LOMO can destroy the model.

Expect: not yet run on such a GPU.
"""

import llama7b

from lomo_jax.training import Config, LoraConfig


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama7b.get_config()
    config.lora = LoraConfig(
        rank=2, alpha=16, targets=("q", "v"), base="lomo", base_learning_rate=5e-3
    )
    config.optimizer = "adamw"
    config.learning_rate = 5e-4
    config.clip_norm = 1.0
    config.schedule = "linear"
    config.warmup = 0.05
    config.workdir = "runs/lora_lomo"
    return config
