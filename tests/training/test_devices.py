"""The mesh of a run, and the rows of a batch on each device."""

import importlib.util

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from lomo_jax.errors import ConfigError
from lomo_jax.training import MeshConfig, devices


def _mesh(batch_size=8, microbatches=1, **sizes):
    return devices.make_mesh(MeshConfig(**sizes), batch_size, microbatches)


def test_the_mesh_has_all_devices():
    assert dict(_mesh().shape) == {"data": 1, "fsdp": 8, "tensor": 1}
    assert devices.describe(_mesh(tensor=2)).endswith("data 1, fsdp 4, tensor 2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"fsdp": 16}, "fsdp=16 tensor=1 takes 16 devices and there are 8"),
        ({"batch_size": 12}, r"^batch_size: 12 must be .* = 8 devices; use --config.batch_size=16"),
        (
            {"batch_size": 16, "microbatches": 4},
            r"^batch_size: batch_size / microbatches = 4 must be .*--config.batch_size=32, ",
        ),
        (
            {"batch_size": 12, "data": 2, "fsdp": 4},
            r"a multiple of mesh.data=2 \* mesh.fsdp=4 = 8 devices; use",
        ),
    ],
)
def test_mesh_sizes_that_do_not_fit_raise_an_error(arguments, message):
    with pytest.raises(ConfigError, match=message):
        _mesh(**arguments)


def test_each_row_goes_to_its_device():
    mesh = _mesh(16, data=2, fsdp=2, tensor=2)
    shapes = devices.batch_shapes(16, 3, mesh)
    assert devices.local_rows(shapes) == list(range(16))  # this process has all devices
    tokens = np.arange(48).reshape(16, 3)
    sent = devices.batch_sender(shapes)({"tokens": tokens})["tokens"]
    np.testing.assert_array_equal(sent, tokens)
    assert sent.sharding.spec == P(("data", "fsdp"), None)
    assert {shard.data.shape for shard in sent.addressable_shards} == {(4, 3)}


@pytest.mark.parametrize(
    ("wheels", "nodes", "environment", "expected"),
    [
        (["jax_cuda13_plugin"], [], {}, "cpu"),
        (["jax_cuda12_plugin"], [], {}, "cpu"),
        (["jax_cuda13_plugin"], ["nvidia0", "nvidiactl"], {}, ""),
        (["jax_cuda13_plugin"], ["dxg"], {}, ""),
        (["jax_cuda13_plugin"], [], {"JAX_PLATFORMS": "cuda"}, ""),
        ([], [], {}, ""),
    ],
)
def test_without_a_gpu_jax_does_not_load_the_cuda_wheels(
    wheels, nodes, environment, expected, tmp_path, monkeypatch
):
    """Otherwise each start prints a traceback about cuPTI."""
    chosen = {"jax_platforms": ""}
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name in wheels)
    monkeypatch.setattr(jax.config, "update", chosen.__setitem__)
    monkeypatch.delenv("JAX_PLATFORMS", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    for node in nodes:
        (tmp_path / node).touch()
    devices.use_cpu_without_gpu(tmp_path)
    assert chosen == {"jax_platforms": expected}
