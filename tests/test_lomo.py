import chex
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lomo_jax


def params():
    rng = np.random.default_rng(0)
    return {"w": jnp.asarray(rng.normal(size=(3, 4)), jnp.float32), "b": jnp.float32(0.5)}


def grads():
    rng = np.random.default_rng(1)
    return {"w": jnp.asarray(3 * rng.normal(size=(3, 4)), jnp.float32), "b": jnp.float32(-2.0)}


def test_rule():
    tx = lomo_jax.lomo(0.1, weight_decay=0.3, clip_value=1.5)
    updates, _ = tx.update(grads(), tx.init(params()), params())
    for name, p in params().items():
        g = np.clip(np.float64(grads()[name]), -1.5, 1.5)
        expected = np.float64(p) * (1 - 0.1 * 0.3) - 0.1 * g
        np.testing.assert_allclose(np.float64(p + updates[name]), expected, rtol=1e-6, atol=1e-7)


def test_is_sgd_without_decay_and_clipping():
    ours, sgd = lomo_jax.lomo(0.1), optax.sgd(0.1)
    chex.assert_trees_all_close(
        ours.update(grads(), ours.init(params()))[0], sgd.update(grads(), sgd.init(params()))[0]
    )


def test_schedule_sees_the_number_of_updates_made():
    tx = lomo_jax.lomo(lambda count: 1.0 + count.astype(jnp.float32))
    state = tx.init(params())
    for factor in (1.0, 2.0, 3.0):
        updates, state = tx.update(grads(), state)
        np.testing.assert_allclose(updates["w"], -factor * grads()["w"], rtol=1e-6)
    assert state.count == 3


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_is_rounded_once(dtype):
    """The sum with the parameter is formed in float32: an update in `dtype` would round twice."""
    tx = lomo_jax.lomo(0.1, weight_decay=0.01)
    p, g = params()["w"].astype(dtype), grads()["w"].astype(dtype)
    update, _ = tx.update(g, tx.init(p), p)
    assert update.dtype == jnp.float32
    p32, g32 = np.float32(p), np.float32(g)
    exact = p32 * np.float32(1 - 0.1 * 0.01) - np.float32(0.1) * g32
    np.testing.assert_array_equal(
        np.float32((p.astype(jnp.float32) + update).astype(dtype)),
        np.float32(jnp.asarray(exact).astype(dtype)),
    )


def test_decay_needs_params():
    tx = lomo_jax.lomo(0.1, weight_decay=0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(grads(), tx.init(params()))


@pytest.mark.parametrize("rule", [lomo_jax.lomo, lomo_jax.adalomo])
@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("learning_rate", -0.1),
        ("learning_rate", "fast"),
        ("learning_rate", float("nan")),
        ("weight_decay", -1.0),
        ("weight_decay", None),
        ("clip_value", 0.0),
        ("clip_value", float("inf")),
    ],
)
def test_bad_arguments(rule, argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a number in .* got {value!r}"):
        rule(**({"learning_rate": 0.1} | {argument: value}))
