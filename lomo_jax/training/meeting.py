"""How the processes of a run meet: all of them are there, and all run the same."""

import contextlib
import hashlib
import importlib.metadata
import json
import os
import platform
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

import lomo_jax
from lomo_jax.errors import ConfigError

_HEARTBEAT_TIMEOUT = 60  # seconds without a heartbeat after which a process counts as dead
_GO = "go"  # the answer of process 0 when all are there; anything else is an error


def start(
    coordinator: str | None,
    num_processes: int | None,
    process_id: int | None,
    connect_timeout: int,
) -> None:
    """Connects the processes of a run; does nothing if there is only one.

    Args:
      coordinator: HOST:PORT where process 0 listens. None: as the environment of SLURM, Open MPI
        or Kubernetes says.
      num_processes: Number of processes.
      process_id: Index of this one, from 0.
      connect_timeout: Seconds for all processes to come.

    Raises:
      ConfigError: Some of the first three are missing or out of range, or processes did not come;
        the message names the address and, with a `coordinator`, the missing processes.
    """
    given = {"--coordinator": coordinator, "--num_processes": num_processes}
    given["--process_id"] = process_id
    missing = [name for name, value in given.items() if value is None]
    if missing and len(missing) < len(given):
        raise ConfigError(
            f"{missing[0]}: missing; a run of several processes needs {', '.join(given)} in each, "
            "or none of them under srun, mpirun or in an indexed Job of Kubernetes"
        )
    if missing and not _is_launched():
        return
    if coordinator is not None and num_processes is not None and process_id is not None:
        meet(coordinator, num_processes, process_id, connect_timeout)
    with _time_limit(coordinator, connect_timeout):
        try:
            jax.distributed.initialize(
                coordinator,
                num_processes,
                process_id,
                initialization_timeout=2 * connect_timeout,  # ours comes first: JAX's aborts
                heartbeat_timeout_seconds=_HEARTBEAT_TIMEOUT,
            )
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"--coordinator: the processes could not connect: {str(error).splitlines()[0]}"
            ) from error


def _is_launched() -> bool:
    """Whether srun, mpirun or an indexed Job of Kubernetes started several processes."""
    sizes = (os.environ.get(name) for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"))
    return any(int(size or 1) > 1 for size in sizes) or "JOB_COMPLETION_INDEX" in os.environ


@contextlib.contextmanager
def _time_limit(coordinator: str | None, timeout: int) -> Iterator[None]:
    """Ends this process with one line if the block takes longer: JAX cannot be interrupted."""

    def end() -> None:
        place = coordinator or "the address that the launcher gave"
        print(
            f"error: --coordinator: not all processes came to {place} within {timeout} seconds; "
            "look at the others' output, or raise --connect_timeout",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    timer = threading.Timer(timeout, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def meet(coordinator: str, num_processes: int, process_id: int, timeout: float) -> None:
    """Waits until all processes have come to the address of process 0.

    Before `jax.distributed.initialize`, which says neither who is missing nor where, and aborts.

    Raises:
      ConfigError: The address is wrong or taken, or a process did not come in time.
    """
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"--coordinator: {coordinator!r} must be HOST:PORT")
    if not 0 <= process_id < num_processes:
        raise ConfigError(
            f"--process_id: {process_id} must be from 0 to {num_processes - 1}, one less than "
            "--num_processes"
        )
    deadline = time.monotonic() + timeout
    if process_id == 0:
        _wait_for_others(coordinator, int(port), num_processes, deadline, timeout)
    else:
        _come(coordinator, host, int(port), process_id, deadline, timeout)


def _wait_for_others(
    coordinator: str, port: int, num_processes: int, deadline: float, timeout: float
) -> None:
    try:
        both = socket.has_dualstack_ipv6()
        family = socket.AF_INET6 if both else socket.AF_INET
        server = socket.create_server(
            ("", port), family=family, backlog=num_processes, dualstack_ipv6=both
        )
    except OSError as error:
        raise ConfigError(
            f"--coordinator: {coordinator}: process 0 cannot listen there ({error.strerror}); use "
            "another port"
        ) from None
    with contextlib.ExitStack() as stack:
        stack.enter_context(server)
        here: dict[int, socket.socket] = {}
        problem = None
        while problem is None and len(here) < num_processes - 1:
            try:
                server.settimeout(max(0.001, deadline - time.monotonic()))
                connection = stack.enter_context(server.accept()[0])
                connection.settimeout(5)
                name = int(connection.makefile().readline(20))
            except TimeoutError:
                if time.monotonic() >= deadline:
                    missing = sorted(set(range(1, num_processes)) - here.keys())
                    problem = (
                        f"process {', '.join(map(str, missing))} of {num_processes} did not come "
                        f"to {coordinator} within {timeout:g} seconds; start all of them, or raise "
                        "--connect_timeout"
                    )
                continue
            except (OSError, ValueError):
                continue  # not one of ours
            if name in here:
                problem = f"two processes have --process_id={name}; give each another one"
            elif not 0 < name < num_processes:
                problem = f"process {name} came, but --num_processes is {num_processes}"
            here[name] = connection
        for connection in here.values():
            with contextlib.suppress(OSError):  # it has ended since
                connection.sendall(f"{problem or _GO}\n".encode())
        if problem is not None:
            raise ConfigError(f"--coordinator: {problem}")


def _come(
    coordinator: str, host: str, port: int, process_id: int, deadline: float, timeout: float
) -> None:
    while True:
        remaining = deadline - time.monotonic()
        try:
            connection = socket.create_connection((host, port), max(0.001, remaining))
            break
        except OSError as error:
            if remaining > 0:
                time.sleep(min(0.2, remaining))
                continue
            reason = error.strerror or str(error)
            raise ConfigError(
                f"--coordinator: process {process_id} found no process 0 at {coordinator} within "
                f"{timeout:g} seconds ({reason}); start process 0 on that host, or raise "
                "--connect_timeout"
            ) from None
    with connection:
        answer = ""
        with contextlib.suppress(OSError):
            connection.sendall(f"{process_id}\n".encode())
            connection.settimeout(timeout + 10)  # process 0 may have started later
            answer = connection.makefile().readline(10_000).strip()
    if answer != _GO:
        answer = answer or f"process 0 at {coordinator} ended before all processes had come"
        raise ConfigError(f"--coordinator: {answer}")


def versions() -> dict[str, str]:
    """Returns what has to be the same in all processes, apart from the config."""
    code = hashlib.sha256()
    package = Path(lomo_jax.__file__).parent
    for file in sorted(package.rglob("*.py")):
        code.update(file.relative_to(package).as_posix().encode() + file.read_bytes())
    return {
        "the version of Python": platform.python_version(),
        "the version of jax": jax.__version__,
        "the version of jaxlib": importlib.metadata.version("jaxlib"),
        "the version of lomo_jax": lomo_jax.__version__,
        "the code of lomo_jax": code.hexdigest()[:12],
    }


def check_same(facts: Mapping[str, Any]) -> None:
    """Compares facts between the processes of a run; all must call this with the same names.

    Args:
      facts: JSON values by name; an inner object is compared by its own names.

    Raises:
      ConfigError: A fact differs; the same message in all processes.
    """
    own = np.frombuffer(json.dumps(_flat(facts)).encode(), np.uint8)
    lengths = np.ravel(multihost_utils.process_allgather(np.array([len(own)])))
    padded = np.zeros(lengths.max(), np.uint8)
    padded[: len(own)] = own
    gathered = np.asarray(multihost_utils.process_allgather(padded))
    first, *others = (
        json.loads(bytes(row[:length])) for row, length in zip(gathered, lengths, strict=True)
    )
    for process, other in enumerate(others, start=1):
        for name in sorted(first.keys() | other.keys()):
            if first.get(name) != other.get(name):
                raise ConfigError(
                    f"{name}: {first.get(name)!r} in process 0, but {other.get(name)!r} in process "
                    f"{process}; start all processes alike"
                )


def _flat(facts: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in facts.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = value
    return found
