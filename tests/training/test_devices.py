"""Which devices a run takes, and which rows of a batch go to which."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lomo_jax.errors import ConfigError
from lomo_jax.training import Config, MeshConfig, devices


def config(batch_size=8, microbatches=1, **mesh):
    return Config(
        batch_size=batch_size,
        sequence_length=3,
        microbatches=microbatches,
        mesh=MeshConfig(**mesh),
    )


def test_all_devices_are_taken():
    assert dict(devices.make_mesh(config()).shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert devices.describe(devices.make_mesh(config(tensor=2))).endswith(
        "data 1, fsdp 4, tensor 2"
    )


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (config(fsdp=16), "fsdp=16 tensor=1 takes 16 devices and there are 8"),
        (config(12), r"^batch_size: 12 is not divided by the 8 devices .*config.batch_size=16,"),
        (config(16, 4), r"^batch_size: 16 in microbatches=4 is not .*config.batch_size=32, "),
        (config(12, data=2, fsdp=4), r"of mesh.data=2 \* mesh.fsdp=4; set"),
    ],
)
def test_what_does_not_divide(run, message):
    with pytest.raises(ConfigError, match=message):
        devices.make_mesh(run)


def test_rows_go_where_they_belong():
    run = config(16, data=2, fsdp=2, tensor=2)
    mesh = devices.make_mesh(run)
    rows = devices.rows_here(run, mesh)
    assert rows == list(range(16))  # this process has all devices
    tokens = np.arange(48).reshape(16, 3)
    sent = devices.sender(run, mesh, rows)({"tokens": tokens})["tokens"]
    np.testing.assert_array_equal(sent, tokens)
    assert sent.sharding.spec == P(("data", "fsdp"), None)
    assert {shard.data.shape for shard in sent.addressable_shards} == {(4, 3)}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("localhost:1", None, None), "^--num_processes: missing"),
        ((None, 2, 0), "^--coordinator: missing"),
    ],
)
def test_a_process_that_is_told_too_little(arguments, message):
    with pytest.raises(ConfigError, match=message):
        devices.start(*arguments)


def test_one_process_starts_nothing(monkeypatch):
    for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.setenv(name, "1")
    devices.start(None, None, None)
    assert not jax.distributed.is_initialized()


def test_open_mpi_says_who_is_there(monkeypatch):
    """JAX reads the rest of it: without a launcher's address it says what is missing."""
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match=r"^--coordinator: the processes did not come together"):
        devices.start(None, None, None)
