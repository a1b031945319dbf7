"""Checkpoints: restoring, checksums, failures of orbax. Damage is in test_damage.py."""

import asyncio
import json
import sys
import threading
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lomo_jax
from lomo_jax.errors import CheckpointError
from lomo_jax.training import Config, to_dict
from lomo_jax.training.checkpoint import (
    CheckpointMetadata,
    Checkpoints,
    Progress,
    _of_array,
    checksums,
    reason,
    settle,
    silence_orbax,
)

_PARAMS = nnx.State({"w": nnx.Param(jnp.arange(6.0).reshape(2, 3))})
# Values that differ from every initial state.
_STATE = lomo_jax.StepState(
    optimizer={"count": jnp.int32(7), "row": jnp.array([0.5, 0.25])},
    loss_scale=lomo_jax.LossScaleState(jnp.float32(512.0), jnp.int32(33)),
    rounding=jnp.array([11, 22], jnp.uint32),
)
_PROGRESS = Progress(
    step=3,
    data={"next_index": 12, "nested": {"rows": [1, 2]}},
    evaluated=2,
    best=1.25,
    best_step=2,
    skipped=5,
    skipped_in_a_row=4,
)
_CONFIG = json.loads(json.dumps(to_dict(Config(param_dtype="float32"))))  # tuples: lists


def _shapes(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


@pytest.mark.parametrize(
    "state",
    [
        _STATE,
        _STATE._replace(loss_scale=None),
        _STATE._replace(rounding=None),
        _STATE._replace(loss_scale=None, rounding=None),
    ],
)
def test_a_restore_returns_all_saved_items(tmp_path, state, assert_close):
    saved = CheckpointMetadata(_PROGRESS, _CONFIG, "fingerprint", {})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.start_anew()
        assert checkpoints.save(_PARAMS, state, saved)
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        metadata = checkpoints.metadata(3)
        # This run's step has a loss scale and a key, even if the checkpoint lacks them.
        params, restored = checkpoints.restore(metadata, _shapes(_PARAMS), _shapes(_STATE))
    assert metadata == saved
    assert metadata.progress == _PROGRESS
    assert_close(params, _PARAMS, tolerance=0)
    for name in state._fields:
        expected, found = getattr(state, name), getattr(restored, name)
        assert (found is None) == (expected is None)
        if expected is not None:
            assert_close(found, expected, tolerance=0)


_REMOVED = object()


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("progress.step", 9, "it says that it is of step 9"),
        ("progress.step", "3", "progress.step='3' must be an integer"),
        ("progress.best", "low", "progress.best='low' must be a number"),
        ("progress.data", [], r"progress.data=\[\] must be an object"),
        ("progress.skipped", -1, "progress.skipped=-1 must be an integer from 0"),
        ("progress.evaluated", _REMOVED, "the key 'progress.evaluated' is missing"),
        ("progress", 3, "progress=3 must be an object"),
        ("config.param_dtype", "int8", "config.param_dtype='int8' must be 'float32' or"),
        ("config.model", None, "config.model=None must be an object"),
        ("config", [], r"config=\[\] must be an object"),
        ("dataset", 3, "dataset=3 must be a string"),
        ("checksums.params", "x", "checksums.params='x' must be a list"),
        ("checksums.params", [1], "the bits of params are not those that were saved"),
        ("checksums.optimizer", _REMOVED, "the key 'checksums.optimizer' is missing"),
    ],
)
def test_metadata_that_were_edited_are_one_line(tmp_path, path, value, message):
    folder = tmp_path / "checkpoints"
    with Checkpoints(folder) as checkpoints:
        checkpoints.start_anew()
        saved = CheckpointMetadata(_PROGRESS, _CONFIG, "fingerprint", {})
        assert checkpoints.save(_PARAMS, _STATE, saved)
    file = folder / "3/metadata/metadata"
    metadata = node = json.loads(file.read_text())
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    if value is _REMOVED:
        del node[last]
    file.write_text(json.dumps(metadata))
    damaged = pytest.raises(CheckpointError, match=f"3 is damaged: {message}")
    with Checkpoints(folder) as checkpoints, damaged as caught:
        checkpoints.restore(checkpoints.metadata(3), _shapes(_PARAMS), _shapes(_STATE))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("space", [jax.memory.Space.Device, jax.memory.Space.Host])
def test_a_save_waits_only_for_arrays_in_host_memory(tmp_path, space):
    """The next step updates them in place, and orbax has no copy of them."""
    params = jax.device_put(_PARAMS, space)
    saved = CheckpointMetadata(_PROGRESS, _CONFIG, "fingerprint", {})
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.start_anew()
        assert checkpoints.save(params, _STATE, saved)
        is_on_disk = checkpoints.last == 3
        assert is_on_disk == (space == jax.memory.Space.Host)
        checkpoints.wait()
        assert checkpoints.last == 3


SHAPES = [(), (6,), (4, 6), (3, 4, 6)]
DTYPES = ["float32", "bfloat16", "float16", "int32", "uint8", "bool"]


def _array(shape, dtype):
    numbers = np.random.default_rng(0).normal(size=shape) * 10
    return numbers.astype(jnp.dtype(dtype))


def _sum_of_bits(x: np.ndarray) -> int:
    words = np.frombuffer(x.tobytes(), f"uint{8 * x.dtype.itemsize}")
    return int(words.sum(dtype=np.uint64) % 2**32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_checksums_are_sums_of_bits(dtype):
    arrays = [_array(shape, dtype) for shape in SHAPES]
    expected = ([_sum_of_bits(x) for x in arrays], True)
    assert checksums([jnp.asarray(x) for x in arrays]) == expected
    host = [jax.device_put(x, jax.memory.Space.Host) for x in map(jnp.asarray, arrays)]
    assert checksums(host) == expected


@pytest.mark.parametrize("spec", [P(), P(None, "x"), P("x", None, None), P(None, "x", "y")])
@pytest.mark.parametrize("kind", [jax.sharding.AxisType.Auto, jax.sharding.AxisType.Explicit])
def test_checksums_do_not_depend_on_the_sharding(spec, kind):
    mesh = jax.make_mesh((2, 3), ("x", "y"), (kind, kind), devices=jax.devices()[:6])
    x = _array((4, 4, 6), "bfloat16")
    with jax.set_mesh(mesh):
        divided = jax.device_put(x, NamedSharding(mesh, spec))
        assert checksums({"w": divided}) == ([_sum_of_bits(x)], True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "float8_e4m3fn"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_nonfinite_values_are_found(dtype, shape, value):
    x = np.zeros(shape, dtype)
    x[(-1,) * x.ndim] = value
    assert not checksums([jnp.asarray(x)]).finite
    assert checksums([jnp.full(shape, jnp.finfo(dtype).max, dtype)]).finite


def test_checksums_of_float64():
    with jax.enable_x64(True):
        x = jnp.asarray([[1.5, -2e300], [3.0, 0.1]])
        assert checksums([x]).finite
        assert not checksums([x.at[1, 0].set(jnp.nan)]).finite
        assert checksums([x]).sums != checksums([x.at[0, 1].set(2e300)]).sums


def test_a_flipped_bit_changes_the_checksum():
    x = _array((3, 4, 6), "bfloat16")
    flipped = x.view(np.uint16).copy()
    flipped[1, 2, 3] ^= 4
    before, after = (checksums([jnp.asarray(a)]) for a in (x, flipped.view(x.dtype)))
    assert before.sums != after.sums


def test_checksums_on_a_cpu_take_little_memory():
    """`lomo-jax export` may run on a machine whose memory holds the model only once."""
    x = jax.ShapeDtypeStruct((32, 1024, 1024), jnp.bfloat16)
    memory = _of_array.lower(x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 1.2 * x.size * x.dtype.itemsize


def test_tasks_of_a_closed_event_loop_are_awaited():
    loop, done = asyncio.new_event_loop(), threading.Event()
    loop.run_in_executor(None, lambda: (time.sleep(0.5), done.set()))
    loop.close()
    settle()
    assert done.is_set()


def test_waiting_for_a_thread_that_is_just_starting():
    stop = threading.Event()

    def start_threads():
        while not stop.is_set():
            threading.Thread(target=str, name="asyncio_0").start()

    starter = threading.Thread(target=start_threads)
    starter.start()
    try:
        end = time.monotonic() + 2
        while time.monotonic() < end:
            settle(seconds=0.01)
    finally:
        stop.set()
        starter.join()


def test_an_error_that_comes_late_is_dropped():
    """A read of orbax may end after its event loop was closed and the checkpoint given up."""
    loop = asyncio.new_event_loop()
    loop.close()
    with silence_orbax():
        pass
    with pytest.raises(RuntimeError, match="Event loop is closed") as error:
        loop.call_soon_threadsafe(print)
    late = types.SimpleNamespace(
        **{"exc_type": error.type, "exc_value": error.value, "exc_traceback": error.tb},
        **{"err_msg": None, "object": None},
    )
    sys.unraisablehook(late)  # pytest's own makes it an error


def test_waiting_for_threads_of_an_open_event_loop_times_out():
    loop, go = asyncio.new_event_loop(), threading.Event()
    loop.run_in_executor(None, go.wait)
    settle(seconds=0.1)
    assert not go.is_set()
    go.set()
    loop.run_until_complete(loop.shutdown_default_executor())
    loop.close()


def test_the_reason_of_an_error_is_one_line():
    error = ValueError("OUT_OF_RANGE: Error writing x: No space left on device [os_error_code=28]")
    assert reason(error) == "the disk is full"
    assert reason(ValueError("one\n  two. See full log")) == "one two."
    assert reason(KeyError()) == "KeyError"
    assert reason(ValueError("x" * 300)) == "x" * 200 + "..."
