r"""Tunes LLaMA-7B to follow instructions, with AdaLomo, as its paper does.

    python train.py --config configs/alpaca.py \
      --config.model.path=DIR --config.data.path=alpaca_gpt4_data.json

DIR is a Hugging Face directory of LLaMA-7B, or of another model. The dataset has
records of `instruction`, `input` and `output`, such as the 52,000 of Alpaca-GPT4: a JSON file, or a
dataset on the Hugging Face Hub (--config.data.path=OWNER/NAME). The loss is on the output alone.
`lomo-jax data` with the same flags shows the first examples.

Hardware: one NVIDIA GPU with 24 GB: a batch runs in 128 microbatches. Plan it with

    lomo-jax plan --config configs/alpaca.py --gpu rtx3090

Settings: the AdaLomo paper's (arXiv 2310.10195): 3 epochs, batches of 128, 2048 tokens, peak
learning rate 5e-4, linear to 0, 3 % warm-up, no clipping. One example a row, as the authors do;
--config.data.packing=true needs a quarter of the steps or less, of more examples each.

Expect: not yet run on such a GPU.
"""

import llama7b

from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama7b.get_config()
    config.data.packing = False
    config.learning_rate = 5e-4
    config.schedule = "linear"
    config.warmup = 0.03
    config.batch_size = 128
    config.microbatches = 128
    config.sequence_length = 2048
    config.epochs = 3
    config.eval_every = 100
    config.workdir = "runs/alpaca"
    return config
