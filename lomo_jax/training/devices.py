"""The devices of a run: its processes, their mesh, and the part of a batch that each reads."""

import contextlib
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AbstractMesh, Mesh, NamedSharding, PartitionSpec

from lomo_jax import sharding
from lomo_jax.errors import ConfigError, LostProcessError
from lomo_jax.training.config import Config

_SILENCE = 60  # seconds without a sign of life after which a process is taken for dead


def start(coordinator: str | None, num_processes: int | None, process_id: int | None) -> None:
    """Joins the processes of a run together; does nothing where there is only one.

    Args:
      coordinator: HOST:PORT where process 0 can be reached. None: as the environment says, that of
        SLURM, Open MPI or Kubernetes.
      num_processes: how many there are.
      process_id: which of them this one is, from 0.

    Raises:
      ConfigError: the three are not given together, or the others cannot be reached.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes}
    given["--process_id"] = process_id
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ConfigError(
            f"{missing[0]}: missing; a run of several processes takes {', '.join(given)} in each, "
            "or none of them under srun, mpirun or in an indexed Job of Kubernetes"
        )
    if missing and not _is_launched():
        return
    try:
        jax.distributed.initialize(
            coordinator, num_processes, process_id, heartbeat_timeout_seconds=_SILENCE
        )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(
            f"--coordinator: the processes did not come together: {str(error).splitlines()[0]}"
        ) from error


@contextlib.contextmanager
def together() -> Iterator[None]:
    """Turns the failure of an operation of all processes into `LostProcessError`."""
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if jax.process_count() == 1:
            raise
        why = str(error).splitlines()[0].split(" [type.")[0]
        raise LostProcessError(
            f"process {jax.process_index()} of {jax.process_count()} has lost another one: look in "
            f"what the others printed for the error, then start all of them again ({why})"
        ) from error


def wait_for_all(what: str) -> None:
    """Returns when every process has come here, to `what`."""
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(what)


def _is_launched() -> bool:
    """Whether srun, mpirun or Kubernetes, as an indexed Job, started several processes."""
    sizes = (os.environ.get(name) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(int(size or 1) > 1 for size in sizes) or "JOB_COMPLETION_INDEX" in os.environ


def make_mesh(config: Config) -> Mesh:
    """Returns the mesh of all devices of all processes.

    Raises:
      ConfigError: There are too few or too many devices for `config.mesh`, or the batch cannot be
        divided among them.
    """
    try:
        mesh = sharding.make_mesh(**vars(config.mesh))
    except ValueError as error:
        raise ConfigError(str(error)) from error
    if jax.process_count() > 1 and mesh.size < jax.device_count():
        raise ConfigError(
            f"mesh: it has {mesh.size} devices and the processes {jax.device_count()}; set one "
            "size to -1, for those that are left"
        )
    check_batch(config, mesh)
    return mesh


def check_batch(config: Config, mesh: Mesh | AbstractMesh) -> None:
    """Raises ConfigError if a microbatch cannot be divided among the devices."""
    sizes = {name: mesh.shape[name] for name in sharding.BATCH}
    parts = int(np.prod(list(sizes.values())))
    rows = config.batch_size // config.microbatches
    if rows % parts:
        each = f" in microbatches={config.microbatches}" if config.microbatches > 1 else ""
        axes = " * ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        fits = -(-rows // parts) * parts * config.microbatches
        raise ConfigError(
            f"batch_size: {config.batch_size}{each} is not divided by the {parts} devices of "
            f"{axes}; set --config.batch_size={fits}, or a larger mesh.tensor: it divides no batch"
        )


def describe(mesh: Mesh) -> str:
    """Says in a line which devices there are."""
    kind, processes = mesh.devices.flat[0].device_kind, jax.process_count()
    axes = ", ".join(f"{name} {size}" for name, size in mesh.shape.items())
    of = f" of {processes} processes" if processes > 1 else ""
    return f"{mesh.size} x {kind}{of}: {axes}"


def batch_sharding(mesh: Mesh | AbstractMesh) -> NamedSharding:
    """Says how a batch is divided: by its rows."""
    return NamedSharding(mesh, PartitionSpec(sharding.BATCH, None))


def rows_here(config: Config, mesh: Mesh) -> list[int]:
    """Returns the rows of a batch that the devices of this process hold."""
    shape = (config.batch_size, config.sequence_length)
    indices: Any = batch_sharding(mesh).addressable_devices_indices_map(shape).values()
    every = range(config.batch_size)
    return sorted({row for rows, _ in indices for row in every[rows]})


def sender(config: Config, mesh: Mesh, rows: Sequence[int]) -> Callable[[Mapping[str, Any]], Any]:
    """Returns what sends the rows of a batch that this process has read to its devices.

    Args:
      config: Of the run.
      mesh: Of all devices.
      rows: Of `rows_here`.

    Returns:
      A function from arrays of these rows, by name, to global arrays of the whole batch.
    """
    shape, divided = (config.batch_size, config.sequence_length), batch_sharding(mesh)
    here = {row: place for place, row in enumerate(rows)}
    indices: Any = divided.addressable_devices_indices_map(shape)
    places = {
        device: [here[row] for row in range(config.batch_size)[index[0]]]
        for device, index in indices.items()
    }

    def send(batch: Mapping[str, Any]) -> Any:
        # All at once, as each transfer takes time of the host's. Not make_array_from_callback: its
        # transfers are implicit, which a transfer guard refuses.
        parts = {name: [x[part] for part in places.values()] for name, x in batch.items()}
        sent: Any = jax.device_put(parts, {name: list(places) for name in batch})
        return {
            name: jax.make_array_from_single_device_arrays(shape, divided, sent[name])
            for name in batch
        }

    return send
