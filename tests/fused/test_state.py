"""The state: a plain pytree whose shapes are known in advance, saved and restored bit for bit."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from helpers import quick_jit

import lomo_jax

L, B, D = 3, 4, 6


def loss_fn(params, batch):
    def layer(x, scanned):
        w, key = scanned
        keep = jax.random.bernoulli(key, 0.8, x.shape).astype(x.dtype)
        return x + jnp.tanh(x @ w["up"]) * keep @ w["down"], None

    xs = params["layers"], jax.random.split(batch["key"], L)
    x, _ = jax.lax.scan(layer, batch["x"] @ params["in"], xs)
    return jnp.mean(jnp.square((x @ params["in"].T).astype(jnp.float32)))


def make_params():
    rng = np.random.default_rng(0)
    shapes = {"in": (D, D), "layers": {"up": (L, D, D), "down": (L, D, D)}}
    return jax.tree.map(
        lambda shape: jnp.asarray(0.5 * rng.standard_normal(shape), jnp.bfloat16),
        shapes,
        is_leaf=lambda shape: isinstance(shape, tuple),
    )


def make_batch(seed):
    x = np.random.default_rng(seed).standard_normal((B, D))
    return {"x": jnp.asarray(x, jnp.bfloat16), "key": jax.random.key(seed)}


def make_step(make=lomo_jax.fused_step, tx=None):
    return make(
        loss_fn,
        tx or lomo_jax.adalomo(optax.linear_schedule(0.1, 0.0, 10)),
        clip_norm=1.0,
        microbatches=2,
        loss_scale=lomo_jax.DynamicLossScale(growth_interval=2),
        rounding="stochastic",
    )


def run(step, params, state, seeds):
    jitted = quick_jit(step)
    for seed in seeds:
        params, state, _ = jitted(params, state, make_batch(seed))
    return params, state


def test_a_restored_run_continues_bit_for_bit(tmp_path):
    step = make_step()
    params = make_params()
    state = step.init(params, make_batch(0))
    expected = run(step, params, state, range(6))

    halfway = run(step, params, state, range(3))
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "state", halfway)
    # A new process has shapes only.
    step = make_step()
    shapes = jax.eval_shape(lambda p: (p, step.init(p, make_batch(0))), make_params())
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    with ocp.StandardCheckpointer() as checkpointer:
        restored = checkpointer.restore(tmp_path / "state", target)
    chex.assert_trees_all_equal(restored, halfway)
    chex.assert_trees_all_equal_dtypes(restored, halfway)
    assert jax.tree.structure(restored) == jax.tree.structure(halfway)
    chex.assert_trees_all_equal(run(step, *restored, range(3, 6)), expected)


@pytest.mark.parametrize("make", [lomo_jax.fused_step, lomo_jax.reference_step])
@pytest.mark.parametrize("rule", ["adalomo", "adamw"])
def test_init_under_eval_shape(make, rule, standard_promotion):
    tx = {"adalomo": lomo_jax.adalomo(0.1), "adamw": optax.adamw(0.1)}[rule]
    step = make_step(make, tx)
    params, batch = make_params(), make_batch(0)
    abstract = jax.eval_shape(step.init, params, batch)
    state = step.init(params, batch)
    assert jax.tree.structure(abstract) == jax.tree.structure(state)
    jitted = jax.jit(step.init)(params, batch)
    chex.assert_trees_all_equal(state, jitted)
    for expected, leaf in zip(jax.tree.leaves(abstract), jax.tree.leaves(state), strict=True):
        assert (expected.shape, expected.dtype) == (leaf.shape, leaf.dtype)
    _, new_state, _ = jax.eval_shape(step, params, state, batch)
    assert jax.tree.map(jnp.shape, new_state) == jax.tree.map(jnp.shape, state)


def test_the_state_does_not_depend_on_the_options_of_the_batch():
    """A run may continue with other microbatches, or with the reference."""
    params, batch = make_params(), make_batch(0)
    states = [
        make(loss_fn, lomo_jax.adalomo(0.1), microbatches=k).init(params, batch)
        for make in (lomo_jax.fused_step, lomo_jax.reference_step)
        for k in (1, 2)
    ]
    for state in states[1:]:
        chex.assert_trees_all_equal(state, states[0])
