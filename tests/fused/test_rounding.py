"""Stochastic rounding: right on average, reproducible, better than rounding to nearest."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick_jit

import lomo_jax
from lomo_jax.fused.update import stochastic_round

DTYPES = ["bfloat16", "float16"]


def draws(x, dtype, count=4096):
    keys = jax.random.split(jax.random.key(0), count)
    rounded = jax.jit(jax.vmap(lambda key: stochastic_round(x, dtype, key)))(keys)
    assert rounded.dtype == dtype
    return np.asarray(rounded).astype(np.float64)


def neighbours(x, dtype):
    """The largest number of `dtype` that is no larger than x, and the next one above it."""
    nearest, infinity = np.asarray(x).astype(dtype), np.asarray(np.inf, dtype)
    is_above = nearest.astype(np.float64) > x
    below = np.where(is_above, np.nextafter(nearest, -infinity), nearest)
    return below.astype(np.float64), np.nextafter(below, infinity).astype(np.float64)


def some_numbers(dtype):
    """Numbers of both signs and of all magnitudes."""
    rng = np.random.default_rng(0)
    low, high = (2e-36, 1e38) if dtype == "bfloat16" else (7e-5, 6e4)
    magnitudes = np.exp(rng.uniform(np.log(low), np.log(high), 60))
    return (magnitudes * rng.choice([-1, 1], 60)).astype(np.float32)


@pytest.mark.parametrize("dtype", DTYPES)
def test_rounds_to_a_neighbour_with_the_right_mean(dtype):
    x = some_numbers(dtype)
    below, above = neighbours(x.astype(np.float64), jnp.dtype(dtype))
    rounded = draws(x, dtype)
    assert np.all((rounded == below) | (rounded == above))
    up = (x - below) / (above - below)
    deviation = np.sqrt(up * (1 - up) / len(rounded)) + 1e-9
    share = (rounded == above).mean(0)
    assert np.all(np.abs(share - up) < 5 * deviation)


@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_of_the_dtype_do_not_change(dtype):
    info = jnp.finfo(dtype)
    special = [0.0, -0.0, 1.0, -1.5, float(info.max), float(info.min), float(info.tiny)]
    tiny = [3e-38, -4e-37] if dtype == "bfloat16" else [3e-7, -4e-6]
    numbers = np.array([*special, *tiny, np.inf, -np.inf, np.nan, *some_numbers(dtype)])
    exact = numbers.astype(jnp.dtype(dtype)).astype(np.float32)
    rounded = draws(exact, dtype, 64)
    np.testing.assert_array_equal(rounded, np.broadcast_to(exact, rounded.shape))


def test_numbers_below_the_normal_range_of_float16():
    spacing = 2.0**-24
    x = np.array([0.3, -5.75, 100.5], np.float32) * np.float32(spacing)
    rounded = draws(x, "float16") / spacing
    assert np.all(rounded == np.round(rounded))
    np.testing.assert_allclose(rounded.mean(0), [0.3, -5.75, 100.5], atol=5 * 0.5 / 64)


def one_step(make_step, seed=0):
    """Moves equal layers by a third of the spacing of the dtype."""
    params = jnp.ones((3, 8, 32), jnp.bfloat16)
    x = jnp.ones((1, 8), jnp.bfloat16)

    def loss(params, x):
        body = lambda total, w: (total + jnp.sum(x @ w).astype(jnp.float32), None)  # noqa: E731
        return jax.lax.scan(body, jnp.float32(0.0), params)[0]

    step = make_step(loss, optax.sgd(2.0**-7 / 3), rounding="stochastic")
    state = step.init(params, x)
    state = state._replace(rounding=jax.random.key_data(jax.random.key(seed)))
    new, new_state, _ = quick_jit(step)(params, state, x)
    return np.asarray(new).astype(np.float32), new_state.rounding


def test_is_reproducible_and_differs_between_steps_and_layers():
    new, next_key = one_step(lomo_jax.fused_step)
    assert set(np.unique(new)) == {1.0, 1.0 - 2.0**-8}
    again, _ = one_step(lomo_jax.fused_step)
    np.testing.assert_array_equal(new, again)
    reference, reference_key = one_step(lomo_jax.reference_step)
    np.testing.assert_array_equal(new, reference)
    np.testing.assert_array_equal(next_key, reference_key)
    assert not np.array_equal(next_key, jax.random.key_data(jax.random.key(0)))
    assert not np.array_equal(new, one_step(lomo_jax.fused_step, seed=1)[0])
    assert not np.array_equal(new[0], new[1])


def fit(dtype, rounding):
    """Fits a deep linear map by many small steps; returns the losses in float32."""
    rng = np.random.default_rng(0)
    depth, width = 3, 16
    target = rng.standard_normal((width, width)) / np.sqrt(width)
    start = np.eye(width) + 0.05 * rng.standard_normal((depth, width, width))
    params = jnp.asarray(start, dtype)
    x = rng.standard_normal((64, width)).astype(np.float32)
    batch = {"x": x, "y": (x @ target).astype(np.float32)}

    def loss(params, batch):
        layer = lambda x, w: (x @ w.astype(jnp.float32), None)  # noqa: E731
        y, _ = jax.lax.scan(layer, batch["x"], params)
        return jnp.mean(jnp.square(y - batch["y"]))

    step = lomo_jax.fused_step(loss, lomo_jax.lomo(1e-3), rounding=rounding)
    state = step.init(params, batch)

    def advance(carry, _):
        params, state, out = step(*carry, batch)
        return (params, state), out.loss

    losses = jax.jit(lambda *carry: jax.lax.scan(advance, carry, length=2000)[1])(params, state)
    return np.asarray(losses, np.float64)


@pytest.mark.parametrize("dtype", DTYPES)
def test_follows_float32_where_rounding_to_nearest_stalls(dtype):
    exact = fit("float32", "nearest")
    nearest = fit(dtype, "nearest")
    stochastic = fit(dtype, "stochastic")
    fallen = exact[0] - exact[-1]
    assert fallen > 0.5 * exact[0]
    assert stochastic[-1] == pytest.approx(exact[-1], abs=0.05 * fallen)
    remaining = 0.5 if dtype == "bfloat16" else 0.1
    assert nearest[-1] - exact[-1] > remaining * fallen
