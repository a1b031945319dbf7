"""Schedules against their formulas, optimizers by name."""

import math

import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lomo_jax
from lomo_jax.training.optimizer import make_optimizer, make_schedule


def _rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    return np.asarray([schedule(step) for step in range(steps)])


@pytest.mark.parametrize("warmup", [0.2, 2])
def test_warmup_by_fraction_and_by_steps(warmup):
    schedule = make_schedule("constant", 0.3, 10, warmup)
    np.testing.assert_allclose(_rates(schedule, 5), [0.1, 0.2, 0.3, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "decay"),
    [("linear", lambda x: 1 - x), ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2)],
)
def test_decay_reaches_zero_one_step_after_the_last(kind, decay):
    schedule = make_schedule(kind, 2.0, 10, 2)
    rates = _rates(schedule, 11)
    np.testing.assert_allclose(rates[2:], [2 * decay(i / 8) for i in range(9)], atol=1e-6)
    assert np.all(rates[:10] > 0)


def test_no_warmup_starts_at_the_peak():
    np.testing.assert_allclose(_rates(make_schedule("linear", 2.0, 10, 0), 1), 2.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lomo", lambda rate: lomo_jax.lomo(rate, weight_decay=0.1)),
        ("adalomo", lambda rate: lomo_jax.adalomo(rate, weight_decay=0.1)),
        ("adamw", lambda rate: optax.adamw(rate, weight_decay=0.1)),
        ("lion", lambda rate: optax.lion(rate, weight_decay=0.1)),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_optimizers_by_name_get_their_arguments(name, expected):
    params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}
    grads = {"w": jnp.cos(params["w"])}

    def update(tx):
        return tx.update(grads, tx.init(params), params)[0]["w"]

    made = make_optimizer(name, 0.1, {"weight_decay": 0.1})
    np.testing.assert_array_equal(update(made), update(expected(0.1)))
