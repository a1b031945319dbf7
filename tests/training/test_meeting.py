"""How processes meet; tests/sharding/test_processes.py starts whole runs."""

import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import jax
import pytest

from lomo_jax.errors import ConfigError
from lomo_jax.training import meeting


@pytest.fixture
def address():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return f"localhost:{listener.getsockname()[1]}"


def meet(address, num_processes, ids, timeout=2.0):
    """Lets processes meet, each in a thread; returns the message of each, None without error."""

    def one(process_id):
        try:
            meeting.meet(address, num_processes, process_id, timeout)
        except ConfigError as error:
            return str(error)

    with ThreadPoolExecutor(len(ids)) as pool:
        return list(pool.map(one, ids))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "^--num_processes: missing"),
        ((None, 2, 0), "^--coordinator: missing"),
    ],
)
def test_missing_flags_of_a_process_raise_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        meeting.start(*arguments, 120)


def test_a_single_process_does_not_connect(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    meeting.start(None, None, None, 120)
    assert not jax.distributed.is_initialized()


def test_processes_of_open_mpi_are_detected(monkeypatch):
    """JAX does not find the address of the launcher there."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^--coordinator: the processes could not connect"):
        meeting.start(None, None, None, 120)


@pytest.mark.parametrize("num_processes", [2, 5])
def test_processes_that_come_meet(address, num_processes):
    for _ in range(2):  # the address is free again at once
        assert meet(address, num_processes, range(num_processes)) == [None] * num_processes


def test_a_process_that_comes_late_is_waited_for(address):
    late = threading.Timer(1.0, meeting.meet, (address, 2, 1, 5.0))
    late.start()
    meeting.meet(address, 2, 0, 5.0)
    late.join()


def test_all_name_the_processes_that_are_missing(address):
    started = time.monotonic()
    found = meet(address, 5, [0, 1, 3])
    assert time.monotonic() - started < 5
    assert set(found) == {
        f"--coordinator: process 2, 4 of 5 did not come to {address} within 2 seconds; start all "
        "of them, or raise --connect_timeout"
    }


def test_nobody_at_the_address(address):
    (found,) = meet(address, 2, [1], timeout=0.5)
    assert found == (
        f"--coordinator: process 1 found no process 0 at {address} within 0.5 seconds (Connection "
        "refused); start process 0 on that host, or raise --connect_timeout"
    )
    (found,) = meet("no-such-host.invalid:9999", 2, [1], timeout=0.5)
    assert "found no process 0 at no-such-host.invalid:9999 within 0.5 seconds" in found
    assert "\n" not in found


def test_a_port_in_use(address):
    port = address.partition(":")[2]
    with socket.create_server(("", int(port))):
        (found,) = meet(address, 2, [0])
    assert f"{address}: process 0 cannot listen there (Address already in use" in found


@pytest.mark.parametrize(
    ("ids", "message"),
    [
        ([0, 1, 1], "two processes have --process_id=1; give each another one"),
        ([3], "--process_id: 3 must be from 0 to 2, one less than --num_processes"),
    ],
)
def test_wrong_ids(address, ids, message):
    assert any(message in (found or "") for found in meet(address, 3, ids))


@pytest.mark.parametrize("wrong", ["localhost", "localhost:", ":99", "x:0", "a:b", "x:70000"])
def test_an_address_needs_host_and_port(wrong):
    with pytest.raises(ConfigError, match=f"{wrong!r} must be HOST:PORT"):
        meeting.meet(wrong, 2, 0, 1.0)


def test_strangers_are_ignored(address):
    host, _, port = address.partition(":")

    def disturb():
        for message in (b"GET / HTTP/1.1\r\n", b"\xff\xfe\n", b"", b"x" * 10_000):
            time.sleep(0.05)
            with socket.create_connection((host, int(port))) as stranger:
                stranger.sendall(message)

    thread = threading.Timer(0.1, disturb)
    thread.start()
    late = threading.Timer(1.0, meeting.meet, (address, 2, 1, 5.0))
    late.start()
    meeting.meet(address, 2, 0, 5.0)
    thread.join()
    late.join()


def test_the_time_limit_is_one_line_and_ends_the_process(address):
    """Where a launcher gives the address, JAX alone knows it, and JAX would abort."""
    code = (
        "import time; from lomo_jax.training import meeting\n"
        "with meeting._time_limit(None, 1): time.sleep(30)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (1, "", 1)
    assert done.stderr.startswith("error: --coordinator: not all processes came to the address")
