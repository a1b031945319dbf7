"""Fine-tunes LLaMA-7B on a task of SuperGLUE, as LOMO's paper does.

    python -m lomo_jax.evaluation.superglue boolq data/superglue/boolq
    python train.py --config configs/superglue.py:boolq --config.model.path=DIR

The first command writes 1000 examples for training and at most 1000 for evaluation. The tasks are
boolq, rte, wsc, wic, multirc, copa and record; superglue:boolq:lora trains adapters alone,
superglue:boolq:lora_lomo adapters and the base together. Without training:

    lomo-jax eval DIR --tasks data/superglue/boolq/boolq.jsonl --dtype bfloat16

`benchmarks/paper.py superglue boolq --model DIR` runs all four and writes a table.

Hardware: one NVIDIA GPU with 24 GB: a batch runs in 16 microbatches.

Settings: the paper's (arXiv 2306.09782), 10 epochs in batches of 16, linear to 0. LOMO: learning
rate 0.03, 10 % warm-up, gradient norm clipped to 1. LoRA: rank 2 and alpha 16 on queries and
values, AdamW, 5e-4, 5 % warm-up. Both: LOMO at 5e-3. Accuracy once an epoch; the best counts.

Expect: not yet run on such a GPU. The paper has 87.5 for boolq, 86.6 rte, 66.4 wsc, 71.2 wic, 84.0
multirc, 89.0 copa with LOMO.
"""

import llama7b

from lomo_jax.errors import ConfigError
from lomo_jax.training import Config, LoraConfig

# Steps of an epoch: at most 1000 examples in batches of 16.
_EPOCHS = {"boolq": 63, "rte": 63, "wsc": 35, "wic": 63, "multirc": 63, "copa": 25, "record": 63}
_METHODS = ("lomo", "lora", "lora_lomo")


def get_config(name: str = "boolq") -> Config:
    """Returns the config of a run.

    Args:
      name: A task, or TASK:METHOD with a method of lomo, lora and lora_lomo.
    """
    task, _, method = name.partition(":")
    method = method or "lomo"
    if task not in _EPOCHS or method not in _METHODS:
        raise ConfigError(
            f"--config superglue:{name}: give one of {', '.join(_EPOCHS)}, and after another colon "
            f"one of {', '.join(_METHODS)}"
        )
    config = llama7b.get_config()
    config.data.path = f"data/superglue/{task}/train.jsonl"
    config.data.validation_path = f"data/superglue/{task}/{task}.jsonl"
    config.data.packing = False
    config.data.repeated = "keep"
    config.data.too_long = "leave_out"
    config.optimizer, config.learning_rate, config.warmup = "lomo", 0.03, 0.1
    if method != "lomo":
        config.lora = LoraConfig(rank=2, alpha=16, targets=("q", "v"))
        config.optimizer, config.learning_rate, config.warmup = "adamw", 5e-4, 0.05
    if method == "lora_lomo":
        config.lora.base, config.lora.base_learning_rate = "lomo", 5e-3
    config.clip_norm = 1.0
    config.schedule = "linear"
    config.batch_size = 16
    config.microbatches = 16
    config.sequence_length = 1024
    config.epochs = 10
    config.eval_every = _EPOCHS[task]
    config.eval_tasks = f"data/superglue/{task}/{task}.jsonl"
    config.eval_examples = 1000
    config.keep_best = f"{task}_acc"
    config.workdir = f"runs/superglue/{task}_{method}"
    return config
