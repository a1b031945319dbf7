"""The plan of a run, and its advice when memory runs out."""

import re
import types

import jax
import jax.numpy as jnp
import pytest

from lomo_jax import Offload
from lomo_jax.errors import ConfigError, OutOfMemoryError
from lomo_jax.fused import StepState
from lomo_jax.models import DecoderConfig
from lomo_jax.plan import MemoryPlan, find, read_time
from lomo_jax.sharding import abstract_mesh
from lomo_jax.training import Config, MeshConfig, ModelConfig
from lomo_jax.training import model as model_lib
from lomo_jax.training.config import set_fields
from lomo_jax.training.devices import batch_shapes, check_batch, make_mesh
from lomo_jax.training.planning import (
    CompiledRun,
    MemoryGuard,
    as_flags,
    describe,
    memory_savings,
    mesh_shape,
    plan_step,
)
from lomo_jax.training.step import CompiledStep, make_step
from lomo_jax.training.validation import validate

PLAN = MemoryPlan(12.0, 0.5, 1.0, 1.2, 0.0, 14.7, 12.0, 11.0, False, "GPU", 1)


def _allocate_too_much():
    # 4 PiB. Compiled, so that XLA raises the error, not Python.
    jax.jit(lambda: jnp.zeros((2**20, 2**30), jnp.float32))().block_until_ready()


def _out_of_memory(config, plan=None):
    """Returns the error message of a run that needs too much memory."""
    guard = MemoryGuard(config)
    if plan is not None:
        guard.plan = plan
    with pytest.raises(OutOfMemoryError) as caught, guard:
        _allocate_too_much()
    return str(caught.value)


def test_out_of_memory_is_a_one_line_error_with_advice():
    message = _out_of_memory(Config(), PLAN)
    assert message.startswith("the device is out of memory: the step needs 14.7 GiB and an alloc")
    assert re.search(r"an allocation of [\d.]+ ?\w+ failed; try --config", message)
    assert "--config.offload.activations=true" in message
    assert "\n" not in message


def test_before_the_plan_the_error_has_no_figures():
    message = _out_of_memory(Config())
    assert re.match(r"the device is out of memory: an allocation of [^\n]* failed; try ", message)
    assert "the step needs" not in message


def test_the_advice_names_the_optimizer_state_if_it_is_large():
    assert "--config.offload.state=true" in _out_of_memory(Config(), PLAN)
    assert "--config.offload.state" not in _out_of_memory(Config())


def test_the_advice_names_each_field_once():
    message = _out_of_memory(Config(batch_size=64))
    assert message.count("--config.microbatches=") == 1
    assert "--config.microbatches=2," in message


def test_the_error_says_if_all_options_are_in_use():
    used = Offload(params=True, activations=True, state=True)
    message = _out_of_memory(Config(offload=used, batch_size=8, sequence_length=63))
    assert message.endswith("; use a smaller model or a device with more memory")


@pytest.mark.parametrize("error", [ValueError("RESOURCE_EXHAUSTED"), KeyboardInterrupt()])
def test_other_errors_pass_unchanged(error):
    with pytest.raises(type(error)) as caught, MemoryGuard(Config()):
        raise error
    assert caught.value is error


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            Config(batch_size=4, sequence_length=64),
            "--config.offload.activations=true|"
            "--config.offload.params=true --config.offload.activations=true|"
            "--config.offload.state=true|--config.microbatches=2|--config.microbatches=4|"
            "--config.batch_size=2|--config.sequence_length=32",
        ),
        (
            Config(
                offload=Offload(params=True, activations=True, state=True),
                batch_size=1,
                sequence_length=64,
            ),
            "--config.sequence_length=32",
        ),
        (Config(fused=False, batch_size=1, sequence_length=5), "--config.fused=true"),
    ],
)
def test_savings_omit_options_already_in_use(config, expected):
    savings = memory_savings(config, 1, state_gib=1.0)
    assert "|".join(map(as_flags, savings)) == expected


def test_recomputation_lowers_the_plan():
    first = next(memory_savings(Config(remat="none"), 1))
    assert first == {"remat": "full"}


@pytest.mark.parametrize("devices", [1, 2, 4])
@pytest.mark.parametrize("microbatches", [1, 2, 3])
def test_every_saving_gives_a_valid_config(devices, microbatches):
    config = Config(batch_size=48, microbatches=microbatches, mesh=MeshConfig(1, -1, 1))
    before = repr(config)
    found = list(memory_savings(config, devices, state_gib=1.0))
    assert {"microbatches", "batch_size"} <= {name for changes in found for name in changes}
    mesh = abstract_mesh((1, devices, 1))
    for changes in found:
        changed = set_fields(config, changes)
        assert changed != config
        validate(changed, for_plan=True)
        check_batch(mesh, changed.batch_size, changed.microbatches)
    assert repr(config) == before


@pytest.mark.parametrize(
    ("sizes", "devices", "shape"),
    [
        ((1, -1, 1), None, (1, 1, 1)),
        ((1, 8, 1), None, (1, 8, 1)),
        ((2, 4, 2), None, (2, 4, 2)),
        ((-1, 4, 2), None, (1, 4, 2)),
        ((2, -1, 1), 8, (2, 4, 1)),
        ((1, 8, 1), 8, (1, 8, 1)),
    ],
)
def test_the_sizes_of_a_mesh_give_the_number_of_devices(sizes, devices, shape):
    assert mesh_shape(MeshConfig(*sizes), devices) == shape


@pytest.mark.parametrize(
    ("sizes", "devices", "message"),
    [
        ((1, 8, 1), 1, "--devices: 1, but mesh.data=1 * mesh.fsdp=8 * mesh.tensor=1 is 8; leave"),
        ((1, 4, 1), 8, "--devices: 8, but mesh.data=1 * mesh.fsdp=4 * mesh.tensor=1 is 4; leave"),
        ((1, -1, 3), 8, "mesh: data=1 fsdp=-1 tensor=3 takes a multiple of 3 devices and there"),
        ((1, -1, 1), 0, "--devices: 0; set 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_a_one_line_error(sizes, devices, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}[^\n]*$"):
        mesh_shape(MeshConfig(*sizes), devices)


def test_a_plan_is_described_in_one_line():
    assert describe(PLAN) == (
        "14.7 of 11.0 GiB planned for the step: weights 12.0, optimizer state 0.5, "
        "layer inputs 1.0, other temporaries 1.2"
    )
    plan = MemoryPlan(0.0, 0.0, 1.0, 1.25, 12.5, 2.25, None, None, None, "GPU", 1)
    assert describe(plan) == (
        "2.2 GiB planned for the step: weights 0.0, optimizer state 0.0, layer inputs 1.0, "
        "other temporaries 1.2; in host memory 12.5"
    )


@pytest.mark.parametrize(("offloaded", "inputs"), [(False, 3 * 16 * 32 * 4), (True, 0)])
def test_the_plan_of_a_run_is_per_device(offloaded, inputs):
    config = Config(
        model=ModelConfig(init="random", architecture=DecoderConfig(64, 32, 64, 3, 2, 2, 16)),
        batch_size=8,
        sequence_length=16,
        param_dtype="float32",
        offload=Offload(activations=offloaded),
    )
    mesh = make_mesh(config.mesh, config.batch_size, config.microbatches)
    model = model_lib.abstract(config.model, "float32", 16, mesh=mesh)
    # A CPU reports no host memory; a GPU with offloaded arrays does.
    sizes = ("argument", "output", "alias", "temp")
    stats = {f"{prefix}{size}_size_in_bytes": 4096 for size in sizes for prefix in ("", "host_")}
    executable = types.SimpleNamespace(memory_analysis=lambda: types.SimpleNamespace(**stats))
    batch = batch_shapes(config.batch_size, config.sequence_length, mesh)
    step = make_step(model.loss, config.make_optimizer(), **config.step_options())
    compiled = CompiledStep(step, batch, executable, None, StepState({}, None, None))
    plan = plan_step(compiled, model)
    assert plan.devices == 8
    assert plan.layer_inputs_gib * 2**30 == inputs  # one sequence of 16 tokens, in three layers
    assert plan.total_gib * 2**30 == plan.host_gib * 2**30 == 2 * 4096


def test_the_largest_buffers_come_first():
    params = {"a": jax.ShapeDtypeStruct((3,), jnp.float32)}
    params |= {"b": jax.ShapeDtypeStruct((5,), jnp.float32)}
    state = StepState({"a": jax.ShapeDtypeStruct((7,), jnp.float32)}, None, None)
    function = jax.jit(lambda x: (jnp.outer(x, x).sum(0) * jnp.cumsum(x), jnp.sort(x)))
    executable = function.lower(jax.ShapeDtypeStruct((50,), jnp.float32)).compile()
    time = read_time(executable, find("h100"), tokens=1)
    run = CompiledRun(Config(), PLAN, executable, params, state, Offload(state=True), 0, time)
    assert [(b.size, b.on_host) for b in run.argument_buffers()] == [
        (28, True),
        (20, False),
        (12, False),
    ]
    temporaries = [buffer.size for buffer in run.temporary_buffers()]
    assert len(set(temporaries)) > 1
    assert temporaries == sorted(temporaries, reverse=True)
