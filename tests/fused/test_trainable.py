"""Frozen parameters: no gradient, no state, no change, and no backward pass below the others."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, quick_jit

import lomo_jax

L, B, D = 3, 4, 6


def make_params():
    return {
        "in": normal(0, D, D),
        "lower": {"w": normal(1, L, D, D)},
        "upper": {"w": normal(2, L, D, D), "bias": normal(3, L, D)},
        "out": normal(4, D, D),
        "count": jnp.int32(3),
    }


@jax.custom_vjp
def one_way(x):
    return x


def _no_way_back(_, g):
    raise AssertionError("backward pass")


one_way.defvjp(lambda x: (x, None), _no_way_back)


def make_loss(lower=jnp.tanh):
    def loss(params, x):
        x, _ = jax.lax.scan(
            lambda x, w: (lower(x @ w["w"]), None), x @ params["in"], params["lower"]
        )
        x, _ = jax.lax.scan(
            lambda x, w: (jnp.tanh(x @ w["w"] + w["bias"]), None), x, params["upper"]
        )
        return jnp.mean(jnp.square(x @ params["out"] - 1))

    return loss


CHOICES = {
    "by_name": lambda name: name in ("upper/w", "out"),
    "prefix": {
        "in": False,
        "lower": False,
        "upper": {"w": True, "bias": False},
        "out": True,
        "count": True,
    },
}


@pytest.mark.parametrize("choice", CHOICES)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_frozen_parameters_stay_as_they_are(make_step, choice):
    params, x = make_params(), normal(5, B, D)
    step = make_step(
        make_loss(), lomo_jax.adalomo(0.1, weight_decay=0.1), trainable=CHOICES[choice]
    )
    state = step.init(params, x)
    assert state.optimizer.keys() == {"upper/w", "out"}
    run = quick_jit(step)
    new = params
    for _ in range(3):
        new, state, _ = run(new, state, x)
    for name in ("in", "lower", "count"):
        chex.assert_trees_all_equal(new[name], params[name])
    chex.assert_trees_all_equal(new["upper"]["bias"], params["upper"]["bias"])
    assert not np.array_equal(new["upper"]["w"], params["upper"]["w"])
    assert not np.array_equal(new["out"], params["out"])


def test_the_backward_pass_stops_at_the_first_trainable_parameter():
    loss, params, x = make_loss(one_way), make_params(), normal(5, B, D)
    tx = optax.sgd(0.1)
    above = lomo_jax.fused_step(loss, tx, trainable=lambda name: name.startswith("upper"))
    new, _, _ = above(params, above.init(params, x), x)
    assert not np.array_equal(new["upper"]["w"], params["upper"]["w"])
    below = lomo_jax.fused_step(loss, tx, trainable=lambda name: name == "in")
    state = below.init(params, x)
    with pytest.raises(AssertionError, match="backward pass"):
        below(params, state, x)


@pytest.mark.parametrize("trained", ["in", "upper/bias", "out"])
def test_one_trainable_parameter(trained, assert_steps_agree):
    """With frozen layers above it, around it and below it."""
    batches = [normal(seed, B, D) for seed in range(3)]
    params = make_params()
    params.pop("count")
    for loss_scale in (None, lomo_jax.DynamicLossScale(skip="layers")):
        assert_steps_agree(
            make_loss(),
            optax.sgd(0.5),
            params,
            batches,
            trainable=lambda name: name == trained,
            loss_scale=loss_scale,
        )


def test_only_the_inputs_of_frozen_layers_in_between_are_saved():
    """The backward pass through a frozen layer needs its input and nothing else."""

    def temporaries(num_layers):
        def loss(params, x):
            layer = lambda x, w: (x + jnp.tanh(jnp.tanh(x @ w) @ w.T), None)  # noqa: E731
            return jnp.mean(jax.lax.scan(layer, x @ params["in"], params["layers"])[0] ** 2)

        step = lomo_jax.fused_step(loss, optax.sgd(0.1), trainable=lambda name: name == "in")
        params = {
            "in": jax.ShapeDtypeStruct((32, 32), jnp.float32),
            "layers": jax.ShapeDtypeStruct((num_layers, 32, 128), jnp.float32),
        }
        x = jax.ShapeDtypeStruct((64, 32), jnp.float32)
        lowered = quick_jit(step).lower(params, jax.eval_shape(step.init, params, x), x)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    growth = temporaries(32) - temporaries(8)
    assert growth == pytest.approx(24 * 64 * 32 * 4, rel=0.05)


def test_a_frozen_stack_may_be_used_in_any_way(assert_steps_agree):
    """A frozen stack may be cast before it is scanned: no gradient is formed."""

    def loss(params, x):
        base = params["base"].astype(jnp.float32) * 2

        def layer(x, scanned):
            w, a, b = scanned
            return jnp.tanh(x @ (w + a @ b)), None

        x, _ = jax.lax.scan(layer, x, (base, params["a"], params["b"]))
        return jnp.mean(jnp.square(x)) + jnp.sum(params["base"][0].astype(jnp.float32))

    params = {
        "base": normal(0, L, D, D).astype(jnp.bfloat16),
        "a": normal(1, L, D, 2),
        "b": normal(2, L, 2, D),
    }
    assert_steps_agree(
        loss, optax.sgd(0.5), params, [normal(5, B, D)], trainable=lambda name: name != "base"
    )


@pytest.mark.parametrize(
    ("trainable", "message"),
    [
        (
            lambda name: False,
            "none of the 6 parameters .*'count'.* floating-point and trainable",
        ),
        (lambda name: name == "count", "none of the 6 parameters .* floating-point and trainable"),
        (lambda name: None, "must be True or False for each parameter, got None for count"),
        (
            {"in": True},
            "trainable has the structure .*, which is neither that of params",
        ),
        (["in"], "trainable has the structure .*, which is neither that of params"),
    ],
)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_trainable_that_does_not_fit(make_step, trainable, message):
    step = make_step(make_loss(), optax.sgd(0.1), trainable=trainable)
    with pytest.raises(ValueError, match=re.compile(message)) as error:
        step.init(make_params(), normal(5, B, D))
    assert "\n" not in str(error.value)
