r"""Fine-tunes all parameters of LLaMA-65B with AdaLomo on eight 24 GB GPUs.

    python train.py --config configs/llama65b_8gpus.py \
      --config.model.path=DIR --config.data.path=DATA

DIR and DATA are as in `configs/llama65b.py`. Each GPU holds an eighth of every weight and of the
optimizer state. The GPUs gather a layer's weights when they use them, and reduce-scatter its
gradient: each updates its own shard. --config.mesh.data=M puts one replica of the model on each of
M machines; then only shards of gradients travel between machines. On several machines start the
same command on each, with srun, with mpirun or with --coordinator, --num_processes and
--process_id.

Hardware: eight NVIDIA GPUs with 24 GB. Planned for RTX 3090s, not measured: 17.5 GiB on each, by

    lomo-jax plan --config configs/llama65b_8gpus.py --gpu rtx3090 --devices 8

Settings: those of `configs/llama7b.py`, the AdaLomo paper's for further pre-training, with one
sequence on each GPU.

Expect: not yet run on such GPUs.
"""

import llama65b

from lomo_jax import Offload
from lomo_jax.training import Config


def get_config() -> Config:
    """Returns the config of the run."""
    config = llama65b.get_config()
    config.offload = Offload()
    config.batch_size = 8
    config.workdir = "runs/llama65b_8gpus"
    return config
