r"""Tunes LLaMA-7B on conversations, with AdaLomo, on one 24 GB GPU.

    python train.py --config configs/chat.py --config.model.path=DIR --config.data.path=CHATS
    python train.py --config configs/chat.py:base --config.model.path=DIR --config.data.path=CHATS

DIR is a Hugging Face directory of LLaMA-7B or of another model, or its id on the hub. CHATS is a
file, a folder or a dataset on the hub, whose records are conversations:

    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello!"}]}

The first command writes them in the chat template of the tokenizer. A base model, such as LLaMA-7B,
has none: the second command uses the template below, which the export then has. The loss is on what
the assistant says. `lomo-jax data` with the same flags shows the first examples.

Hardware: one NVIDIA GPU with 24 GB. Planned for an RTX 3090, not measured: 15.8 GiB, by

    lomo-jax plan --config configs/chat.py --gpu rtx3090

Settings: the AdaLomo paper's for instructions (arXiv 2310.10195): 3 epochs, 2048 tokens, peak
learning rate 5e-4, linear to 0, 3 % warm-up, no clipping. The paper's batches are of 128 examples,
one a row; these are of 4 rows, which short conversations share.

Expect: not yet run on such a GPU.
"""

import llama7b

from lomo_jax.errors import ConfigError
from lomo_jax.training import Config

TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if tools or m.tool_calls %}{{ raise_exception('chat:base has no tools') }}{% endif %}"
    "<|{{ m.role }}|>\n"
    "{% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{{ '\n\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def get_config(model: str = "chat") -> Config:
    """Returns the config of the run, for a model with a chat template ("chat") or without one."""
    if model not in ("chat", "base"):
        raise ConfigError(f"--config chat:{model}: it must be chat, or chat:base for a base model")
    config = llama7b.get_config()
    config.data.template = TEMPLATE if model == "base" else None
    config.learning_rate = 5e-4
    config.schedule = "linear"
    config.batch_size = 4
    config.sequence_length = 2048
    config.epochs = 3
    config.workdir = "runs/chat"
    return config
