"""Fine-tunes all parameters of a language model with LOMO, AdaLomo or any optax optimizer.

    python train.py --config configs/llama7b.py --config.learning_rate=5e-4
    lomo-jax train --config quickstart

--config takes a file, the config.json of a run, or the name of a config that ships with lomo_jax.
A config file says what the run does; its docstring gives the command, the hardware and the expected
result. --config.NAME=VALUE changes a field; --print_config shows them all and exits. The run writes
metrics, a log, checkpoints and at the end the model in Hugging Face form to --config.workdir. An
error is one line; `python -X dev train.py ...` shows where it was raised.

Ctrl-C, SIGTERM or SIGUSR1 stop the run after the current step, with a checkpoint and status 0; a
second Ctrl-C stops it at once. The same command resumes it from the last checkpoint, however it
ended; --config.resume=never starts anew. A run continues when its terminal is lost.

A run uses all GPUs of the machine; --config.mesh says how. On several machines start the command on
each: srun, mpirun and indexed Jobs of Kubernetes connect them; otherwise use --coordinator,
--num_processes and --process_id. All must come within --connect_timeout seconds.
"""

import contextlib
import io
import os
import signal
import sys
import traceback
from collections.abc import Sequence

from absl import flags as absl_flags

from lomo_jax.errors import UnexpectedError, UserError
from lomo_jax.plan.gpus import MEMORY_FRACTION
from lomo_jax.training.config_reader import parse

_PROCESSES = {
    "coordinator": (absl_flags.DEFINE_string, None, "HOST:PORT of process 0"),
    "num_processes": (absl_flags.DEFINE_integer, None, "number of processes, on all machines"),
    "process_id": (absl_flags.DEFINE_integer, None, "index of this process, from 0"),
    "connect_timeout": (absl_flags.DEFINE_integer, 120, "seconds for all processes to come"),
}


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        # The terminal may not support all characters of a sample.
        sys.stdout.reconfigure(errors="replace")
    before = signal.signal(signal.SIGINT, _stop_at_once)
    try:
        _train(argv)
        return 0
    except (UserError, UnexpectedError) as error:
        if sys.flags.dev_mode:
            raise
        status, message = 1, f"error: {error}"
    except Exception:  # no log.txt yet
        if not _has_peers():
            raise
        status, message = 1, traceback.format_exc()
    finally:
        signal.signal(signal.SIGINT, before)
    with contextlib.suppress(OSError):  # a lost terminal
        print(message, file=sys.stderr, flush=True)
    if _has_peers():
        # Python's exit handlers would wait for the others, while they wait for this one.
        os._exit(status)
    return status


def _stop_at_once(*_: object) -> None:
    # Unwinding would wait for the step and the background save, and more signals would cut it off
    # at any line.
    with contextlib.suppress(OSError):  # a lost terminal
        os.write(2, b"error: stopped at once, without saving\n")
    os._exit(130)


def _train(argv: Sequence[str]) -> None:
    values = absl_flags.FlagValues()
    processes = {
        name: define(name, default, meaning, flag_values=values)
        for name, (define, default, meaning) in _PROCESSES.items()
    }
    config = parse(argv, values, usage=__doc__)
    # JAX reads it when it first uses a device.
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    # transformers, imported for its tokenizers, would warn that PyTorch is missing.
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lomo_jax.training import devices, meeting  # slow to import: report typos first
    from lomo_jax.training.loop import train

    devices.use_cpu_without_gpu()
    meeting.start(**{name: flag.value for name, flag in processes.items()})
    train(config)


def _has_peers() -> bool:
    """Whether other processes of the run are connected."""
    return "jax" in sys.modules and sys.modules["jax"].distributed.is_initialized()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
