"""A process that runs one row of `compare.py`."""

import contextlib
import ctypes
import gc
import importlib
import multiprocessing
import os
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

from rows import Row, Size


class Worker:
    """The parent's handle of the process.

    Args:
      row: row to run.
      size: model and batch.
    """

    def __init__(self, row: Row, size: Size) -> None:
        self.row = row
        # Spawned, not forked: JAX and CUDA do not survive a fork.
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(target=_serve, args=(there, row, size), daemon=True)
        self._process.start()
        there.close()

    def receive(self, timeout: float) -> dict[str, Any]:
        """Returns the next answer of the process: first its facts, then one answer per `step`.

        Raises:
          RuntimeError: The process failed, died or took more than `timeout` seconds.
        """
        if not self._here.poll(max(0.0, timeout)):
            raise RuntimeError("out of time")
        try:
            answer = self._here.recv()
        except EOFError:
            self._process.join(5)
            raise RuntimeError(f"its process died, exit code {self._process.exitcode}") from None
        if "error" in answer:
            raise RuntimeError(answer["error"])
        return answer

    def step(self) -> None:
        """Starts a step."""
        self._here.send(True)

    def stop(self) -> None:
        """Kills the process."""
        self._process.kill()
        self._process.join()


def _serve(connection: Connection, row: Row, size: Size) -> None:
    is_torch = row.kind == "torch"
    if is_torch:
        # JAX only draws the weights here. The environment variable would be too late: the parent's
        # main module, imported again in this process, has imported JAX.
        import jax

        jax.config.update("jax_platforms", "cpu")
        warnings.filterwarnings("ignore", category=FutureWarning, module="transformers")
    else:
        os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")
        # A CPU has one memory: an "offloaded" array is a copy, and its original cannot be donated.
        warnings.filterwarnings("ignore", message="Some donated buffers were not usable")
    try:
        module = importlib.import_module("torch_step" if is_torch else "jax_step")
        before = _status("VmRSS")
        run = module.Run(row, size)
        connection.send(run.facts)
        _reset_peak()
        while True:
            connection.recv()
            start = time.perf_counter()
            loss = run()
            answer = {"seconds": time.perf_counter() - start, "loss": loss}
            peak = run.device_peak()
            answer["peak_gib"] = (_status("VmHWM") - before if peak is None else peak) / 2**30
            connection.send(answer)
    except EOFError:  # the parent has exited
        pass
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        connection.send({"error": f"{type(error).__name__}: {lines[0][:200]}"})


def _status(field: str) -> int:
    """Returns a field of /proc/self/status, in bytes."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(field)) * 2**10


def _reset_peak() -> None:
    """Resets the peak of resident memory, which compiling has raised."""
    gc.collect()
    with contextlib.suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")
