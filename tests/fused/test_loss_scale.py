"""Loss scaling: only steps that overflow are skipped, and small gradients survive."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, quick_jit

import lomo_jax
from lomo_jax import DynamicLossScale, LossScaleState

L, D = 3, 4


@jax.custom_vjp
def spiked(w, gain):
    """Returns w; its gradient is multiplied by `gain`."""
    return w


spiked.defvjp(lambda w, gain: (w, gain), lambda gain, g: (g * gain.astype(g.dtype), None))


def loss_fn(params, batch):
    def layer(x, scanned):
        w, gain = scanned
        return jnp.tanh(x @ spiked(w, gain)), None

    x = batch["x"] @ spiked(params["in"], batch["gain"]["in"])
    x, _ = jax.lax.scan(layer, x, (params["layers"], batch["gain"]["layers"]))
    return jnp.mean(jnp.square(x @ spiked(params["out"], batch["gain"]["out"]))).astype(jnp.float32)


def make_params():
    shapes = {"in": (D, D), "layers": (L, D, D), "out": (D, D)}
    return {
        name: normal(seed, *shape, scale=0.5, dtype=jnp.float16)
        for seed, (name, shape) in enumerate(shapes.items())
    }


def make_batch(overflow=None):
    gain = {"in": np.float32(1), "layers": np.ones(L, np.float32), "out": np.float32(1)}
    if isinstance(overflow, int):
        gain["layers"][overflow] = np.inf
    elif overflow:
        gain[overflow] = np.float32(np.inf)
    return {"x": normal(3, 8, D, scale=0.5, dtype=jnp.float16), "gain": gain}


@pytest.mark.parametrize("options", [{}, {"clip_norm": 1.0}])
@pytest.mark.parametrize("overflow", ["in", 0, L - 1, "out"])
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_overflow_anywhere_changes_nothing_but_the_scale(make_step, overflow, options):
    scale = DynamicLossScale(2.0**10, growth_interval=3)
    step = make_step(
        loss_fn, lomo_jax.adalomo(0.1), loss_scale=scale, rounding="stochastic", **options
    )
    params = make_params()
    state = step.init(params, make_batch())
    run = quick_jit(step)
    params, state, out = run(params, state, make_batch())
    assert out.finite
    new, new_state, out = run(params, state, make_batch(overflow))
    assert not out.finite
    assert np.isfinite(out.loss)
    assert (out.grad_norm is None) == ("clip_norm" not in options)
    chex.assert_trees_all_equal(new, params)
    assert new_state.loss_scale == LossScaleState(2.0**9, 0)
    chex.assert_trees_all_equal(new_state._replace(loss_scale=state.loss_scale), state)
    moved, _, out = run(new, new_state, make_batch())
    assert out.finite
    assert not np.array_equal(moved["layers"], params["layers"])


@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_overflow_in_a_layer_skips_all_later_updates(make_step):
    scale = DynamicLossScale(2.0**10, skip="layers")
    step = make_step(loss_fn, lomo_jax.lomo(0.1), loss_scale=scale)
    params = make_params()
    state = step.init(params, make_batch())
    new, new_state, out = quick_jit(step)(params, state, make_batch(1))
    changed = [not np.array_equal(new["layers"][i], params["layers"][i]) for i in range(L)]
    assert changed == [False, False, True]
    assert not np.array_equal(new["out"], params["out"])
    assert np.array_equal(new["in"], params["in"])
    assert np.isfinite(new["layers"]).all()
    assert not out.finite
    assert new_state.loss_scale.scale == 2.0**9


def test_small_gradients_of_float16_survive():
    """The smallest float16 is 6e-8; a gradient of 1e-8 reaches the optimizer all the same."""
    loss = lambda w, x: jnp.float32(1e-8) * jnp.sum(w * x).astype(jnp.float32)  # noqa: E731
    params, x = jnp.zeros(3, jnp.float16), jnp.ones(3, jnp.float16)
    moved = {}
    for loss_scale in (None, 2.0**16, DynamicLossScale()):
        step = lomo_jax.fused_step(loss, lomo_jax.lomo(1e6), loss_scale=loss_scale)
        moved[loss_scale] = step(params, step.init(params, x), x)[0]
    assert (moved[None] == 0).all()
    # Gradient and parameter are rounded to float16.
    np.testing.assert_allclose(moved[2.0**16], -0.01, rtol=2.0**-9)
    np.testing.assert_allclose(moved[DynamicLossScale()], -0.01, rtol=2.0**-9)


def test_the_scale_falls_and_grows():
    scale = DynamicLossScale(16.0, growth_interval=2, factor=4.0, minimum=2.0)
    state = scale.init()
    history = []
    for finite in [True, True, True, False, False, False, True, True]:
        state = scale.update(state, jnp.array(finite))
        history.append((float(state.scale), int(state.good_steps)))
    assert history == [(16, 1), (64, 0), (64, 1), (16, 0), (4, 0), (2, 0), (2, 1), (8, 0)]


def test_the_scale_stays_where_its_reciprocal_is_a_normal_number():
    scale = DynamicLossScale(2.0**126, growth_interval=1)
    state = scale.update(scale.init(), jnp.array(True))
    assert state.scale == 2.0**126


def test_the_norm_is_of_the_unscaled_gradient():
    norms = []
    for loss_scale in (None, 2.0**6, DynamicLossScale(2.0**6)):
        step = lomo_jax.fused_step(
            loss_fn, optax.sgd(0.1), loss_scale=loss_scale, clip_norm=float("inf")
        )
        params = make_params()
        norms.append(step(params, step.init(params, make_batch()), make_batch())[2].grad_norm)
    np.testing.assert_allclose(norms, norms[0], rtol=1e-3)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"initial": 0.5}, r"initial must be a number in \[1, .*\), got 0.5"),
        ({"initial": 1e39}, r"initial must be a number in \[1, .*\), got 1e\+39"),
        ({"growth_interval": 0}, "growth_interval must be a whole number, 1 or more, got 0"),
        ({"factor": 1.0}, r"factor must be a number in \(1, inf\), got 1.0"),
        ({"minimum": -1.0}, r"minimum must be a number in \[1.* got -1.0"),
        ({"skip": "all"}, "skip must be one of 'step', 'layers', got 'all'"),
    ],
)
def test_argument_out_of_range(arguments, message):
    with pytest.raises(ValueError, match=message):
        DynamicLossScale(**arguments)
