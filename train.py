"""Fine-tunes every parameter of a LLaMA-family model with LOMO, AdaLomo or any optax optimizer.

    python train.py --config configs/quickstart.py --config.learning_rate=5e-4

The config file says what the run does; its docstring gives the command, the hardware and what to
expect. A field is changed with --config.NAME=VALUE; --print_config shows them all and exits. The
run writes metrics.jsonl and, at its end, the model in Hugging Face form to --config.workdir.
An error is one line; `python -X dev train.py ...` shows where it came from.
"""

import os
import sys
from collections.abc import Sequence

from lomo_jax.plan.gpus import MEMORY_FRACTION
from lomo_jax.training import flags


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    try:
        config = flags.parse(argv)
        # JAX reads it when it first uses a device, which a config does not.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
        # transformers, of which this uses the tokenizers, warns that there is no PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from lomo_jax.training.loop import train  # slow to import: a typo is told before

        train(config)
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
