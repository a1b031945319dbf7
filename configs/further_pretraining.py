r"""Continues the pre-training of LLaMA-7B on Python code, with AdaLomo, as its paper does.

    python train.py --config configs/further_pretraining.py \
      --config.model.path=DIR --config.data.path='code/**/*.py'

DIR is a Hugging Face directory of LLaMA-7B, or of another model. The dataset is a
folder of text, a glob, JSON lines, Parquet, or a dataset on the Hugging Face Hub such as
bigcode/starcoderdata (gated; --config.data.text_key=content). With little of it, lower
data.eval_documents.

Hardware: one NVIDIA GPU with 24 GB: a batch runs in 128 microbatches. Plan it with

    lomo-jax plan --config configs/further_pretraining.py --gpu rtx3090

Settings: the AdaLomo paper's (arXiv 2310.10195): one epoch, batches of 128 x 2048 tokens, peak
learning rate 1e-3, cosine to 0, 3 % warm-up, no clipping. Every 100 steps, perplexity and accuracy
of the next token on 2000 held-out documents.

Expect: not yet run on such a GPU.
"""

import llama7b

from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama7b.get_config()
    config.data.eval_documents = 2000
    config.batch_size = 128
    config.microbatches = 128
    config.sequence_length = 2048
    config.epochs = 1
    config.eval_every = 100
    config.eval_batches = None
    config.workdir = "runs/further_pretraining"
    return config
