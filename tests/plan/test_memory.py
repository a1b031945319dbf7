"""Reading the memory of a compiled step."""

import types
from importlib.util import find_spec

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lomo_jax
from lomo_jax.plan import compile_step, find, make_mesh, read_memory
from lomo_jax.plan.memory import Buffer, argument_buffers, temporary_buffers

L, B, T, D = 6, 8, 16, 64
WEIGHTS, STATE, BATCH = L * D * D * 4, L * (2 * D + 1) * 4, B * T * D * 4
INPUTS = L * BATCH


def loss(params, batch):
    def layer(x, w):
        return jnp.tanh(x @ w), None

    return jnp.mean(jax.lax.scan(layer, batch, params["w"])[0] ** 2)


@pytest.fixture(scope="module")
def compiled():
    """A compiled step, its parameters and its state."""
    step = lomo_jax.fused_step(loss, lomo_jax.adalomo(1e-3))
    params = {"w": jax.ShapeDtypeStruct((L, D, D), jnp.float32)}
    batch = jax.ShapeDtypeStruct((B, T, D), jnp.float32)
    state = jax.eval_shape(step.init, params, batch)
    return (
        jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile(),
        params,
        state,
    )


@pytest.mark.parametrize(("usable_gib", "fits"), [(None, None), (1.0, True), (1e-6, False)])
def test_the_parts_add_up(compiled, usable_gib, fits):
    plan = read_memory(
        *compiled, gpu="x", layer_inputs=INPUTS, device_gib=2.0, usable_gib=usable_gib
    )
    assert plan.weights_gib * 2**30 == WEIGHTS
    assert plan.state_gib * 2**30 == STATE  # row, column and count
    assert plan.layer_inputs_gib * 2**30 == INPUTS
    assert plan.host_gib == 0
    parts = plan.weights_gib + plan.state_gib + plan.layer_inputs_gib + plan.temporaries_gib
    assert parts == pytest.approx(plan.total_gib)
    assert (plan.fits, plan.device_gib, plan.usable_gib) == (fits, 2.0, usable_gib)
    assert (plan.gpu, plan.devices) == ("x", 1)


def test_a_plan_of_exactly_the_usable_memory_fits(compiled):
    total = read_memory(*compiled, gpu="x").total_gib
    assert read_memory(*compiled, gpu="x", usable_gib=total).fits
    assert not read_memory(*compiled, gpu="x", usable_gib=np.nextafter(total, 0)).fits


def test_donated_arguments_count_once(compiled):
    plan = read_memory(*compiled, gpu="x")
    stats = compiled[0].memory_analysis()
    beside_temporaries = plan.total_gib * 2**30 - stats.temp_size_in_bytes
    # The outputs are parameters and state, updated in place, and a few scalars.
    assert beside_temporaries == pytest.approx(WEIGHTS + STATE + BATCH, abs=1024)
    assert stats.temp_size_in_bytes >= INPUTS


def test_a_plan_for_a_cpu_ignores_offloading(compiled):
    offload = lomo_jax.Offload(params=True, activations=True, state=True)
    assert read_memory(*compiled, gpu="x", offload=offload) == read_memory(*compiled, gpu="x")


@pytest.mark.parametrize(
    ("offload", "expected"),
    [
        (lomo_jax.Offload(), (WEIGHTS, STATE, INPUTS)),
        (lomo_jax.Offload(params=True), (0, STATE, INPUTS)),
        (lomo_jax.Offload(state=True), (WEIGHTS, 0, INPUTS)),
        (lomo_jax.Offload(activations=True), (WEIGHTS, STATE, 0)),
    ],
)
def test_offloaded_parts_are_not_in_device_memory(compiled, offload, expected):
    # Sizes as XLA reports them for a GPU; for a CPU it reports no host memory.
    sizes = {"argument": 800_000, "output": 700_000, "alias": 600_000, "temp": 500_000}
    sizes |= {"host_argument": 8_000, "host_output": 700, "host_alias": 60, "host_temp": 5}
    stats = types.SimpleNamespace(**{f"{k}_size_in_bytes": v for k, v in sizes.items()})
    executable = types.SimpleNamespace(memory_analysis=lambda: stats)
    plan = read_memory(executable, *compiled[1:], gpu="x", layer_inputs=INPUTS, offload=offload)  # pyright: ignore
    parts = [plan.weights_gib, plan.state_gib, plan.layer_inputs_gib]
    assert [part * 2**30 for part in parts] == list(expected)
    assert plan.total_gib * 2**30 == 1_400_000
    assert plan.host_gib * 2**30 == 8_645
    assert plan.temporaries_gib * 2**30 == 1_400_000 - sum(expected)


def test_sharded_arguments_count_the_shard_of_one_device(compiled):
    mesh = jax.make_mesh((4,), ("x",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "x"))
    params = {"w": jax.ShapeDtypeStruct((L, D, D), jnp.float32, sharding=sharding)}
    plan = read_memory(compiled[0], params, compiled[2], gpu="x", devices=4)
    assert plan.weights_gib * 2**30 == WEIGHTS / 4
    assert plan.devices == 4
    (buffer,) = argument_buffers(params, on_host=False)
    assert buffer == Buffer("w", f"float32[{L},{D // 4},{D}]", WEIGHTS // 4, on_host=False)


def test_argument_buffers_are_named_by_their_paths():
    tree = {"a": {"b": np.zeros((2, 3), np.float16)}}
    assert argument_buffers(tree, on_host=True) == [Buffer("a/b", "float16[2,3]", 12, on_host=True)]


def test_temporary_buffers_of_a_step(compiled):
    executable, params, state = compiled
    found = temporary_buffers(executable.as_text(), (params, state), INPUTS)
    by_name = {buffer.name: buffer for buffer in found}
    # Layer inputs saved by the forward pass, one for each layer.
    assert by_name["layer inputs"] == Buffer(
        "layer inputs", f"float32[{L},{B},{T},{D}]", INPUTS, on_host=False
    )
    assert by_name["tanh"].size in (BATCH, INPUTS)
    # One buffer for each operation and shape; none is larger than all temporaries.
    assert len({(buffer.name, buffer.shape) for buffer in found}) == len(found)
    assert max(buffer.size for buffer in found) <= executable.memory_analysis().temp_size_in_bytes
    assert not [b for b in found if b.name in ("parameter", "get-tuple-element", "tuple", "while")]


def test_updates_in_place_are_not_listed_as_temporaries(compiled):
    executable, params, state = compiled
    stack = f"float32[{L},{D},{D}]"

    def names(arguments):
        found = temporary_buffers(executable.as_text(), arguments, INPUTS)
        return {buffer.name for buffer in found if buffer.shape == stack}

    assert names(())
    assert not names((params, state))


def test_a_copy_of_an_argument_is_listed_as_a_temporary():
    w = jax.ShapeDtypeStruct((L, D, D), jnp.float32)
    # The argument is not donated: the update needs a copy.
    text = jax.jit(lambda w: w.at[1, 2].add(1.0)).lower(w).compile().as_text()
    (buffer,) = temporary_buffers(text, w, 0)
    assert buffer == Buffer("copy", f"float32[{L},{D},{D}]", WEIGHTS, on_host=False)


@pytest.mark.plan
@pytest.mark.skipif(find_spec("jax_cuda13_plugin") is None, reason="needs the extra `cuda`")
def test_a_step_is_planned_from_arrays_as_from_shapes():
    step = lomo_jax.fused_step(loss, lomo_jax.adalomo(1e-3))
    arrays = {"w": jnp.zeros((L, D, D))}, np.zeros((B, T, D), np.float32)
    mesh = make_mesh(find("rtx3090"))
    plans = []
    for params, batch in (arrays, jax.eval_shape(lambda x: x, arrays)):
        compiled, state = compile_step(step, params, batch, mesh)
        plans.append(read_memory(compiled, params, state, gpu="rtx3090"))
    assert plans[0] == plans[1]
    assert plans[0].total_gib > 0
