r"""Fine-tunes all of LLaMA-65B with AdaLomo on eight 24 GB GPUs.

    python train.py --config configs/llama65b_8gpus.py \
      --config.model.path=DIR --config.data.path=TEXT

DIR and TEXT are those of `configs/llama65b.py`. Each GPU holds an eighth of every weight and of the
optimizer's state; a weight is gathered when a layer needs it, and its gradient is reduced to the
part that a GPU updates. On several machines start the same command on each, with srun or mpirun or
with --coordinator, --num_processes and --process_id; --config.mesh.data=M keeps a copy of the model
on each of M machines, so that only gradients, already reduced to an eighth, travel between them.

Hardware: eight NVIDIA GPUs with 24 GB. Planned for RTX 3090s, not measured: 17.2 GiB on each, by

    python -m lomo_jax.plan --config configs/llama65b_8gpus.py --gpu rtx3090 --devices 8

Settings: those of `configs/llama7b.py`, the AdaLomo paper's for further pre-training, with one
sequence on each GPU.

Expect: not yet run on such GPUs.
"""

import sysconfig

from lomo_jax.training import Architecture, Config, DataConfig, MeshConfig, ModelConfig


def get_config() -> Config:
    """Returns the run's config."""
    return Config(
        model=ModelConfig(
            architecture=Architecture(
                width=8192,
                mlp_width=22016,
                num_layers=80,
                num_heads=64,
                num_kv_heads=64,
                norm_eps=1e-5,
            )
        ),
        data=DataConfig(path=f"{sysconfig.get_path('stdlib')}/*.py"),
        mesh=MeshConfig(data=1, fsdp=-1, tensor=1),
        optimizer="adalomo",
        learning_rate=1e-3,
        schedule="cosine",
        warmup=0.03,
        batch_size=8,
        sequence_length=1024,
        steps=1000,
        param_dtype="bfloat16",
        eval_every=100,
        eval_batches=64,
        workdir="runs/llama65b_8gpus",
    )
