"""Meshes, partition rules, and sharded weights: initialised, loaded, saved, used."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import quick_jit, tiny_llama
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lomo_jax
from lomo_jax import models, sharding

CONFIG = tiny_llama()


@pytest.fixture(scope="module")
def mesh():
    return sharding.make_mesh(2, 2, 2)


def test_a_mesh_uses_the_remaining_devices():
    assert sharding.make_mesh().devices.shape == (1, 8, 1)
    assert sharding.make_mesh(2, -1, 2).devices.shape == (2, 2, 2)
    assert sharding.make_mesh(1, 1, 2).devices.shape == (1, 1, 2)
    assert set(sharding.make_mesh().axis_types) == {AxisType.Explicit}


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((2, 8, 1), "data=2 fsdp=8 tensor=1 takes 16 devices and there are 8; .* 1, 2, 4, 8$"),
        ((3, -1, 1), "data=3 fsdp=-1 tensor=1 takes a multiple of 3 devices and there are 8"),
        ((-1, -1, 1), "only one size can be -1"),
        ((0, 8, 1), "a size must be 1 or more"),
    ],
)
def test_a_mesh_that_does_not_fit_the_devices_is_an_error(sizes, message):
    with pytest.raises(ValueError, match=message):
        sharding.make_mesh(*sizes)


def test_the_first_matching_rule_applies(mesh):
    params = {"a": {"kernel": np.zeros((4, 6))}, "b": np.zeros(3)}
    found = sharding.shardings(((r"/kernel$", P("fsdp", "tensor")), ("", P())), params, mesh)
    assert found["a"]["kernel"].spec == P("fsdp", "tensor")
    assert found["b"].spec == P()


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ((("c", P()),), r"no partition rule matches the parameter a"),
        (
            (("a", P(("fsdp", "tensor"))),),
            r"\[6, 4\]: 6, its axis 0, .* fsdp=2 \* tensor=2; .* 1, 2, 3$",
        ),
        ((("a", P(None, None, "data")),), r"shape \[6, 4\], fewer axes than"),
    ],
)
def test_rules_that_do_not_fit_are_an_error(rules, message, mesh):
    with pytest.raises(ValueError, match=message):
        sharding.shardings(rules, {"a": np.zeros((6, 4))}, mesh)


def test_heads_that_cannot_be_sharded_are_an_error():
    _, params = models.abstract(CONFIG)
    with pytest.raises(ValueError, match=r"^num_kv_heads=2 .* tensor=4; tensor could be 1, 2$"):
        models.shardings(CONFIG, params, sharding.make_mesh(1, 2, 4))


@pytest.mark.parametrize("on_host", [False, True])
def test_weights_are_initialised_loaded_and_saved_in_shards(mesh, tmp_path, on_host):
    _, expected = models.init(CONFIG, 3)
    drawn = models.init_layer_by_layer(CONFIG, 3, jnp.float32, on_host=on_host, mesh=mesh)
    models.save(tmp_path / "whole", models.abstract(CONFIG)[0], expected)
    _, read = models.load(tmp_path / "whole", on_host=on_host, mesh=mesh)
    # The rounding of random numbers depends on how XLA fuses their computation.
    for params, tolerance in ((drawn, 1e-6), (read, 0)):
        chex.assert_trees_all_close(
            *jax.tree.map(np.asarray, (params, expected)), rtol=tolerance, atol=0
        )
        places = models.shardings(CONFIG, expected, mesh)
        for leaf, place in zip(jax.tree.leaves(params), jax.tree.leaves(places), strict=True):
            assert leaf.sharding.is_equivalent_to(
                place.with_memory_kind(leaf.sharding.memory_kind), leaf.ndim
            )
            assert (leaf.sharding.memory_kind == "pinned_host") == on_host
    kernel = read["layers"]["mlp"]["down"]["kernel"][...]
    assert {shard.data.shape for shard in kernel.addressable_shards} == {(3, 10, 32)}
    with jax.set_mesh(mesh):
        models.save(tmp_path / "parts", models.abstract(CONFIG)[0], read)
    files = [tmp_path / name / "model.safetensors" for name in ("whole", "parts")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_no_device_gets_a_whole_stack(mesh, tmp_path, monkeypatch):
    """While weights are loaded, only shards of stacks and one tensor are alive."""
    from lomo_jax.models import weights

    models.save(tmp_path / "export", models.abstract(CONFIG)[0], models.init(CONFIG, 3)[1])
    before = {id(x) for x in jax.live_arrays()}
    largest, fill = [0], weights._fill

    def watched(*args, **kwargs):
        shards = [s for x in jax.live_arrays() if id(x) not in before for s in x.addressable_shards]
        largest.append(max(s.data.nbytes for s in shards))
        return fill(*args, **kwargs)

    monkeypatch.setattr(weights, "_fill", watched)
    models.load(tmp_path / "export", mesh=mesh)
    assert max(largest) <= 3 * 40 * 32 * 4 / 4  # `down`, in four shards


def test_generation_is_the_same_as_on_one_device(mesh):
    graphdef, params = models.init(CONFIG, 3)
    prompt = np.array([[1, 2, 3]])
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9], [1, 9]]
    sampled = models.Sampling(repetition_penalty=1.1, temperature=2.0, top_k=30, top_p=0.9)
    settings = ({}, {"sampling": sampled}, {"stop_tokens": [3, 4, 5, 6]})
    expected = [models.generate(graphdef, params, prompts, 5, **each) for each in settings]
    with jax.set_mesh(mesh):
        params = jax.device_put(params, models.shardings(CONFIG, params, mesh))
        found = [models.generate(graphdef, params, prompts, 5, **each) for each in settings]
        assert found == expected
        logits = nnx.merge(graphdef, params)(np.tile(prompt, (4, 1)))
    whole = nnx.merge(*models.init(CONFIG, 3))(np.tile(prompt, (4, 1)))
    np.testing.assert_allclose(logits, whole, rtol=0, atol=1e-5)


def test_the_state_is_sharded_like_its_parameter(mesh):
    params = {"w": np.ones((8, 6), np.float32), "b": np.ones(6, np.float32)}
    places = {"w": NamedSharding(mesh, P("fsdp", "tensor")), "b": NamedSharding(mesh, P("tensor"))}
    with jax.set_mesh(mesh):
        params = jax.device_put(params, places)
        factors = lomo_jax.adalomo(1e-3).init(params).moments["w"]
        assert jax.typeof(factors.row).sharding.spec == P("fsdp")
        assert jax.typeof(factors.col).sharding.spec == P("tensor")
        # The states of optax's own transformations are unsharded zeros.
        unsharded = optax.GradientTransformation(
            lambda p: jax.tree.map(lambda x: jnp.zeros(x.shape), p), optax.identity().update
        )
        step = lomo_jax.reference_step(lambda p, x: (x @ p["w"] + p["b"]).sum(), unsharded)
        state = step.init(params, np.ones((4, 8), np.float32))
        assert jax.typeof(state.optimizer["w"]["w"]).sharding.spec == P("fsdp", "tensor")


def scanned(params, batch):
    """A loss that does not mention the mesh."""
    x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), batch, params)
    return (x**2).mean()


@pytest.mark.parametrize("microbatches", [1, 2])
def test_a_mesh_with_auto_axes_gives_the_same_results(microbatches, assert_close):
    auto = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Auto,) * 2)
    params = jax.random.normal(jax.random.key(0), (3, 8, 8))
    batch = jax.random.normal(jax.random.key(1), (16, 8))
    step = lomo_jax.fused_step(scanned, lomo_jax.adalomo(0.1), microbatches=microbatches)
    expected = quick_jit(step)(params, step.init(params, batch), batch)
    places = NamedSharding(auto, P(None, None, "y")), NamedSharding(auto, P("x"))
    params, batch = jax.device_put((params, batch), places)
    assert_close(quick_jit(step)(params, step.init(params, batch), batch), expected)


def test_a_microbatch_with_fewer_rows_than_devices_is_an_error(mesh):
    with jax.set_mesh(mesh):
        batch = jax.device_put(np.ones((8, 4), np.float32), P(sharding.BATCH))
        params = jax.device_put(np.ones((2, 4, 4), np.float32), P())
        step = lomo_jax.fused_step(scanned, lomo_jax.lomo(0.1), microbatches=4)
        with pytest.raises(ValueError, match=r"of microbatches=4 has 2 rows, .* the 4 devices"):
            step.init(params, batch)


def test_gathered_weights_are_not_saved(mesh):
    """Not even with remat="none": together they are the whole model, on every device."""

    def loss(params, x):
        layer = lambda x, w: (jnp.tanh(x @ sharding.gather(w)), None)  # noqa: E731
        return (jax.lax.scan(layer, x, params)[0] ** 2).mean()

    with jax.set_mesh(mesh):
        params = jax.device_put(np.ones((3, 8, 8), np.float32), P(None, "fsdp"))
        x = jax.device_put(np.ones((4, 8), np.float32), P(sharding.BATCH))
        step = lomo_jax.fused_step(loss, lomo_jax.lomo(0.1), remat="none")
        jaxpr = jax.make_jaxpr(step)(params, step.init(params, x), x)
    forward = next(e for e in jaxpr.eqns if e.primitive.name == "scan")
    assert {v.aval.shape for v in forward.outvars if v.aval.ndim == 3} == {(3, 4, 8)}


@pytest.mark.parametrize("identity", ["copy", "name", "constraint"])
def test_a_stack_is_recognised_after_an_identity(identity, assert_close):
    auto = jax.make_mesh((2,), ("x",), axis_types=(AxisType.Auto,))
    apply = {
        "copy": jnp.copy,
        "name": lambda x: checkpoint_name(x, "weights"),
        "constraint": lambda x: jax.lax.with_sharding_constraint(
            x, NamedSharding(auto, P(None, "x"))
        ),
    }[identity]
    params = jax.random.normal(jax.random.key(0), (3, 8, 8))
    batch = jax.random.normal(jax.random.key(1), (16, 8))
    results = []
    for loss in (scanned, lambda params, batch: scanned(apply(params), batch)):
        step = lomo_jax.fused_step(loss, lomo_jax.adalomo(0.1))
        state = step.init(params, batch)
        assert jax.tree.leaves(state.optimizer)[0].shape == (3,)  # a stack, updated layer by layer
        results.append(quick_jit(step)(params, state, batch))
    assert_close(*results)
