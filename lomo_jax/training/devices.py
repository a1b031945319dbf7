"""The processes of a run, how they stop together, their mesh, and the batch rows of each."""

import contextlib
import importlib.util
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lomo_jax import sharding
from lomo_jax.errors import ConfigError, LostProcessError
from lomo_jax.training.config import MeshConfig


def use_cpu_without_gpu(dev: Path = Path("/dev")) -> None:
    """Selects the CPU where the CUDA wheels are installed, as for plans, and there is no GPU.

    Otherwise JAX prints the traceback of its search for the GPU. It must be called before JAX first
    uses a device. JAX_PLATFORMS takes precedence.

    Args:
      dev: The folder of device nodes.
    """
    has_wheels = any(map(importlib.util.find_spec, ("jax_cuda12_plugin", "jax_cuda13_plugin")))
    has_gpu = any(dev.glob("nvidia*")) or (dev / "dxg").exists()  # dxg: WSL
    if has_wheels and not has_gpu and not os.environ.get("JAX_PLATFORMS"):
        jax.config.update("jax_platforms", "cpu")


@contextlib.contextmanager
def lost_process_errors() -> Iterator[None]:
    """Turns the failure of a collective operation into `LostProcessError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        why = str(error).splitlines()[0].split(" [type.")[0]
        raise LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()} has lost another one: read "
            f"the error that the others printed, then start all of them again ({why})"
        ) from error


def wait_for_all(name: str) -> None:
    """Waits until every process has reached this barrier."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(name)


def agree(condition: bool) -> bool:
    """Whether a condition holds in all processes; all of them must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())


def first_says(condition: bool) -> bool:
    """Whether a condition holds in the first process; all of them must call this."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.broadcast_one_to_all(np.array(condition)))


class Stop:
    """Turns signals into a request to stop after the current step; use as a context.

    SIGTERM, SIGINT and SIGUSR1 request a stop; SLURM sends SIGUSR1 before a time limit. A second
    SIGINT calls the handler that was there before, which raises KeyboardInterrupt by default: the
    user does not want to wait for the step. SIGHUP is ignored: the run continues when its terminal
    is lost.

    With several processes any of them may get the signal. All must stop after the same step, which
    JAX's coordination service chooses; it also handles SIGTERM.
    """

    def __init__(self) -> None:
        self._is_requested = False  # by a signal that this process received
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> Self:
        # Python allows signal handlers only in the main thread.
        if threading.current_thread() is threading.main_thread():
            numbers = [signal.SIGINT, signal.SIGUSR1]
            if jax.process_count() == 1:
                numbers.append(signal.SIGTERM)
            for number in numbers:
                self._previous[number] = signal.signal(number, self._handle)
            self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    @property
    def requested(self) -> bool:
        """Whether a stop is requested. Always False with several processes: only a step decides."""
        return self._is_requested and jax.process_count() == 1

    def should_stop(self, step: int) -> bool:
        """Whether to stop after `step`; all processes must call this after every step."""
        if jax.process_count() > 1:
            return multihost_utils.reached_preemption_sync_point(step)
        return self.requested

    def _handle(self, number: int, frame: Any) -> None:
        if self._is_requested and number == signal.SIGINT:
            before = self._previous[number]  # a shell script starts background jobs without one
            (before if callable(before) else signal.default_int_handler)(number, frame)
        self._is_requested = True
        if jax.process_count() > 1:
            os.kill(os.getpid(), signal.SIGTERM)


def make_mesh(sizes: MeshConfig, batch_size: int, microbatches: int) -> Mesh:
    """Returns the mesh of all devices of all processes.

    Raises:
      ConfigError: There are too few or too many devices for the sizes, or the batch cannot be
        sharded over them.
    """
    try:
        mesh = sharding.make_mesh(**vars(sizes))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise ConfigError(
            f"mesh: it has {mesh.size} devices and the processes {jax.device_count()}; set one "
            "size to -1 to use them all"
        )
    check_batch(mesh, batch_size, microbatches)
    return mesh


def check_batch(mesh: Mesh | AbstractMesh, batch_size: int, microbatches: int) -> None:
    """Raises ConfigError if a microbatch cannot be sharded evenly over the devices."""
    sizes = {name: mesh.shape[name] for name in sharding.BATCH}
    parts = int(np.prod(list(sizes.values())))
    rows = batch_size // microbatches
    if rows % parts:
        of = f"batch_size / microbatches = {rows}" if microbatches > 1 else f"{batch_size}"
        axes = " * ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        fits = -(-rows // parts) * parts * microbatches
        raise ConfigError(
            f"batch_size: {of} must be a multiple of {axes} = {parts} devices; use "
            f"--config.batch_size={fits}, or raise mesh.tensor"
        )


def describe(mesh: Mesh) -> str:
    """Describes the devices in a line."""
    kind, processes = mesh.devices.flat[0].device_kind, jax.process_count()
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of = f" of {processes} processes" if processes > 1 else ""
    return f"{mesh.size} x {kind}{of}: {axes}"


def batch_shapes(
    batch_size: int, sequence_length: int, mesh: Mesh | AbstractMesh, *, seeds: bool = False
) -> dict[str, jax.ShapeDtypeStruct]:
    """Returns the shapes [B, T] of a `data.Batch`, its rows sharded over the devices.

    With `seeds`, there is a random seed for each row, [B], for dropout.
    """
    shape = (batch_size, sequence_length)
    sharded = NamedSharding(mesh, PartitionSpec(sharding.BATCH, None))
    int32, float32 = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=sharded) for dtype in (jnp.int32, jnp.float32)
    )
    names = ("tokens", "positions", "segments", "targets")
    shapes = dict.fromkeys(names, int32) | {"weights": float32}
    if seeds:
        of_rows = NamedSharding(mesh, PartitionSpec(sharding.BATCH))
        shapes["seeds"] = jax.ShapeDtypeStruct((batch_size,), jnp.uint32, sharding=of_rows)
    return shapes


def local_rows(shapes: Mapping[str, jax.ShapeDtypeStruct]) -> list[int]:
    """Returns the rows of a batch that the devices of this process hold.

    Args:
      shapes: The shapes from `batch_shapes`.
    """
    return sorted({row for rows in _rows_by_device(shapes["tokens"]).values() for row in rows})


def row_seeds(seed: int, step: int, rows: Sequence[int]) -> np.ndarray:
    """Returns the random seeds of rows of the batch of a step, uint32; the same in each run."""
    of_row = [np.random.SeedSequence((seed, step, row)).generate_state(1) for row in rows]
    return np.concatenate(of_row)


def batch_sender(
    shapes: Mapping[str, jax.ShapeDtypeStruct],
) -> Callable[[Mapping[str, Any]], dict[str, jax.Array]]:
    """Returns a function that sends the rows of a batch to the devices.

    It maps arrays [local rows, ...], by name, to global arrays [B, ...]. The local rows are those
    of `local_rows`.

    Args:
      shapes: The shapes from `batch_shapes`.
    """
    tokens = shapes["tokens"]
    local = {row: index for index, row in enumerate(local_rows(shapes))}
    places = {
        device: [local[row] for row in rows] for device, rows in _rows_by_device(tokens).items()
    }

    def send(batch: Mapping[str, Any]) -> dict[str, jax.Array]:
        # One call for all arrays: each transfer costs host time. Not
        # make_array_from_callback: a transfer guard refuses its implicit transfers.
        parts = {name: [x[part] for part in places.values()] for name, x in batch.items()}
        sent: Any = jax.device_put(parts, {name: list(places) for name in batch})
        return {
            name: jax.make_array_from_single_device_arrays(
                shapes[name].shape, shapes[name].sharding, sent[name]
            )
            for name in batch
        }

    return send


def _rows_by_device(tokens: jax.ShapeDtypeStruct) -> dict[Any, range]:
    """Returns the rows that each device of this process holds."""
    assert tokens.sharding is not None
    indices: Any = tokens.sharding.addressable_devices_indices_map(tokens.shape)
    return {device: range(len(tokens))[rows] for device, (rows, _) in indices.items()}
