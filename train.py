"""Fine-tunes every parameter of a LLaMA-family model with LOMO, AdaLomo or any optax optimizer.

    python train.py --config configs/quickstart.py --config.learning_rate=5e-4

The config file says what the run does; its docstring gives the command, the hardware and what to
expect. A field is changed with --config.NAME=VALUE; --print_config shows them all and exits. The
run writes metrics, a log, checkpoints and, at its end, the model in Hugging Face form to
--config.workdir. An error is one line; `python -X dev train.py ...` shows where it came from.

Ctrl-C or SIGTERM stop it after the step that it is making, with a checkpoint and status 0; however
it ended, the same command goes on from the last checkpoint, --config.resume=never starts anew.

A run takes all GPUs of the machine, as --config.mesh divides them. On several machines start it on
each: srun, mpirun and indexed Jobs of Kubernetes tell it of the others, anything else with
--coordinator, --num_processes and --process_id.
"""

import io
import os
import sys
from collections.abc import Sequence

from absl import flags as absl_flags

from lomo_jax.plan.gpus import MEMORY_FRACTION
from lomo_jax.training import flags

_PROCESSES = {
    "coordinator": (absl_flags.DEFINE_string, "HOST:PORT of process 0, for all processes"),
    "num_processes": (absl_flags.DEFINE_integer, "of the run, on all machines"),
    "process_id": (absl_flags.DEFINE_integer, "which of them this is, from 0"),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    try:
        values = absl_flags.FlagValues()
        processes = {
            name: define(name, None, meaning, flag_values=values)
            for name, (define, meaning) in _PROCESSES.items()
        }
        config = flags.parse(argv, values)
        # JAX reads it when it first uses a device, which a config does not.
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
        # transformers, of which this uses the tokenizers, warns that there is no PyTorch.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from lomo_jax.training import devices  # slow to import: a typo is told before
        from lomo_jax.training.loop import train

        devices.start(**{name: flag.value for name, flag in processes.items()})
        if not train(config):
            sys.stdout.flush()
            os._exit(0)
    except KeyboardInterrupt:
        print("error: stopped at once, without saving", file=sys.stderr, flush=True)
        os._exit(130)  # without waiting for a checkpoint that is being written: it does not count
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr, flush=True)
        if "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized():
            # On its way out JAX would wait for the other processes, and they wait for this one.
            os._exit(1)
        return 1
    return 0


if __name__ == "__main__":
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a model may write what the terminal has not
    sys.exit(main(sys.argv))
