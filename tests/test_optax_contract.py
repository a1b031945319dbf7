"""Both rules are ordinary optax transformations."""

import functools
import subprocess
import sys

import chex
import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx
from flax.training.train_state import TrainState

import lomo_jax

RULES = {
    "lomo": lomo_jax.lomo,
    "lomo_all": functools.partial(lomo_jax.lomo, weight_decay=0.1, clip_value=1.0),
    "adalomo": lomo_jax.adalomo,
    "adalomo_all": functools.partial(lomo_jax.adalomo, weight_decay=0.1, clip_value=1.0, beta=0.9),
}
rules = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
TARGET = jnp.array([[1.0, -2.0], [0.5, 3.0]])


def params(dtype=jnp.float32):
    return {"w": jnp.ones((2, 2), dtype), "b": jnp.full(2, 0.5, dtype)}


def distance(params):
    error = params["w"].astype(jnp.float32) + params["b"].astype(jnp.float32) - TARGET
    return jnp.mean(error**2)


@rules
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
def test_learns_under_jit(rule, dtype, standard_promotion):
    tx = rule(optax.linear_schedule(0.2, 0.01, 80))

    @jax.jit
    def step(params, state):
        updates, state = tx.update(jax.grad(distance)(params), state, params)
        return optax.apply_updates(params, updates), state

    trained, state = params(dtype), tx.init(params(dtype))
    for _ in range(80):
        trained, state = step(trained, state)
    chex.assert_trees_all_equal_shapes_and_dtypes(trained, params(dtype))
    assert distance(trained) < 0.1 * distance(params())


@rules
def test_composes(rule):
    tx = optax.multi_transform(
        {
            "rule": optax.chain(optax.clip(0.5), rule(0.1)),
            "frozen": optax.set_to_zero(),
        },
        {"w": "rule", "b": "frozen"},
    )
    tx = optax.chain(optax.masked(optax.scale(2.0), {"w": True, "b": False}), tx)
    updates, _ = tx.update(jax.grad(distance)(params()), tx.init(params()), params())
    assert jnp.all(updates["b"] == 0)
    assert jnp.any(updates["w"] != 0)


@rules
def test_injected_hyperparams(rule):
    tx = optax.inject_hyperparams(rule)(learning_rate=0.1)
    state = tx.init(params())
    gradient = jax.grad(distance)(params())
    once, _ = tx.update(gradient, state, params())
    state.hyperparams["learning_rate"] = jnp.float32(0.2)
    twice, _ = tx.update(gradient, state, params())
    chex.assert_trees_all_close(twice, jax.tree.map(lambda u: 2 * u, once), rtol=1e-6)


@rules
def test_train_state(rule):
    state = TrainState.create(apply_fn=None, params=params(), tx=rule(0.1))
    new = state.apply_gradients(grads=jax.grad(distance)(state.params))
    assert distance(new.params) < distance(state.params)


@rules
def test_nnx_optimizer(rule):
    model = nnx.Linear(2, 2, rngs=nnx.Rngs(0))
    optimizer = nnx.Optimizer(model, rule(0.1), wrt=nnx.Param)
    loss = lambda model: jnp.mean((model(TARGET) - 1.0) ** 2)  # noqa: E731
    before = loss(model)
    for _ in range(20):
        optimizer.update(model, nnx.grad(loss)(model))
    assert loss(model) < 0.9 * before


def test_import_brings_no_more_than_it_needs():
    heavy = ["flax", "transformers", "orbax", "grain", "torch", "rich", "safetensors"]
    code = f"import sys, lomo_jax; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_every_way_to_import_the_rules():
    code = """
import lomo_jax.adalomo, lomo_jax.lomo
from lomo_jax.adalomo import adalomo
from lomo_jax.lomo import lomo
assert lomo_jax.adalomo is adalomo and lomo_jax.lomo is lomo
lomo_jax.adalomo(0.1), lomo_jax.lomo(0.1)
"""
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("rule", [lomo_jax.lomo, lomo_jax.adalomo])
def test_complex_parameters_are_refused(rule):
    """A cast to float32 would lose their imaginary part in silence."""
    params, tx = {"a": jnp.ones(2), "b": {"c": jnp.ones((2, 3), jnp.complex64)}}, rule(0.1)
    message = rf"{rule.__name__} is not defined for complex .* \['b'\]\['c'\] is complex64"
    with pytest.raises(ValueError, match=message):
        tx.init(params)
    state = tx.init(jax.tree.map(jnp.real, params))
    with pytest.raises(ValueError, match=message):
        tx.update(params, state, params)
