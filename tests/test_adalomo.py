import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import lomo_jax


def draw(seed, *shape, scale=1.0):
    return jnp.asarray(scale * np.random.default_rng(seed).normal(size=shape), jnp.float32)


def params():
    return {"matrix": draw(0, 5, 3), "vector": draw(1, 4, scale=1e-5), "scalar": jnp.float32(0.7)}


def grads(step):
    return {
        "matrix": draw(10 + step, 5, 3),
        "vector": draw(20 + step, 4, scale=1e-3),
        "scalar": jnp.float32(0.1 * step - 0.3),
    }


def rms(x):
    return np.sqrt(np.mean(np.square(x)))


def by_hand(p, gradients, *, lr, eps, decay_rate, threshold, decay, clip, min_scale, beta):
    """The equations of the paper with the square root of its code, in float64, one parameter."""
    p, row, col, v = np.float64(p), 0.0, 0.0, 0.0
    for t, g in enumerate(gradients, start=1):
        g = np.float64(g) if clip is None else np.clip(np.float64(g), -clip, clip)
        beta_t = 1 - t**-decay_rate if beta is None else beta
        g2 = g**2 + eps
        if p.ndim == 2:
            row = beta_t * row + (1 - beta_t) * g2.mean(1)
            col = beta_t * col + (1 - beta_t) * g2.mean(0)
            u = g / np.sqrt(np.outer(row, col) / row.mean())
        else:
            v = beta_t * v + (1 - beta_t) * g2
            u = g / np.sqrt(v)
        u = u / max(1.0, rms(u) / threshold)
        step = lr * max(min_scale, rms(p))
        p = p * (1 - step * decay) - step * u
    return p


@pytest.mark.parametrize("beta", [None, 0.9])
@pytest.mark.parametrize("clip", [None, 0.5])
@pytest.mark.parametrize("threshold", [1.0, 0.3])
def test_rule(beta, clip, threshold):
    tx = lomo_jax.adalomo(
        0.05,
        eps=1e-12,
        decay_rate=0.7,
        clip_threshold=threshold,
        weight_decay=0.2,
        clip_value=clip,
        min_param_scale=1e-2,
        beta=beta,
    )
    actual = params()
    state = tx.init(actual)
    for step in range(4):
        updates, state = tx.update(grads(step), state, actual)
        actual = optax.apply_updates(actual, updates)
    for name, p in params().items():
        expected = by_hand(
            p,
            [grads(step)[name] for step in range(4)],
            lr=0.05,
            eps=1e-12,
            decay_rate=0.7,
            threshold=threshold,
            decay=0.2,
            clip=clip,
            min_scale=1e-2,
            beta=beta,
        )
        np.testing.assert_allclose(actual[name], expected, rtol=3e-6, err_msg=name)


def test_equals_optax_adafactor(standard_promotion):
    """Without weight decay AdaLomo is Adafactor with relative steps, as optax writes it."""
    ours = lomo_jax.adalomo(0.02)
    theirs = optax.adafactor(0.02, min_dim_size_to_factor=1)
    p_ours = p_theirs = {k: v for k, v in params().items() if k != "scalar"}
    s_ours, s_theirs = ours.init(p_ours), theirs.init(p_theirs)
    for step in range(5):
        g = {k: v for k, v in grads(step).items() if k != "scalar"}
        u_ours, s_ours = ours.update(g, s_ours, p_ours)
        u_theirs, s_theirs = theirs.update(g, s_theirs, p_theirs)
        p_ours, p_theirs = (
            optax.apply_updates(p_ours, u_ours),
            optax.apply_updates(p_theirs, u_theirs),
        )
    chex.assert_trees_all_close(p_ours, p_theirs, rtol=1e-5, atol=1e-9)


def test_stack_of_matrices_is_matrices():
    """More than two axes: every matrix has factors, update and parameter scale of its own."""
    stack, gradient = draw(0, 2, 3, 5, 4), draw(1, 2, 3, 5, 4)
    stack = stack * jnp.arange(1.0, 7.0).reshape(2, 3, 1, 1)
    tx = lomo_jax.adalomo(0.1, weight_decay=0.1)
    update = lambda g, p: tx.update(g, tx.init(p), p)[0]  # noqa: E731
    chex.assert_trees_all_close(
        update(gradient, stack), jax.vmap(jax.vmap(update))(gradient, stack), rtol=1e-6
    )


def test_zero_gradient_gives_a_zero_update():
    tx = lomo_jax.adalomo(0.1)
    zeros = jax.tree.map(jnp.zeros_like, params())
    updates, _ = tx.update(zeros, tx.init(params()), params())
    chex.assert_trees_all_equal(updates, zeros)


def test_state_is_factored():
    state = lomo_jax.adalomo(0.1).init({"w": jnp.zeros((7, 5), jnp.bfloat16), "b": jnp.zeros(5)})
    assert state.moments["w"].row.shape == (7,)
    assert state.moments["w"].col.shape == (5,)
    assert state.moments["b"].shape == (5,)
    assert {x.dtype for x in jax.tree.leaves(state.moments)} == {jnp.dtype("float32")}


def test_schedule_sees_the_number_of_updates_made():
    constant = lomo_jax.adalomo(1.0)
    scheduled = lomo_jax.adalomo(lambda count: 1.0 + 2.0 * count.astype(jnp.float32))
    state = same = constant.init(params())
    for step, factor in enumerate((1.0, 3.0, 5.0)):
        expected, state = constant.update(grads(step), state, params())
        updates, same = scheduled.update(grads(step), same, params())
        scaled = jax.tree.map(functools.partial(jnp.multiply, factor), expected)
        chex.assert_trees_all_close(updates, scaled, rtol=1e-6)
    assert same.count == 3


def test_needs_params():
    tx = lomo_jax.adalomo(0.1)
    with pytest.raises(ValueError, match="params"):
        tx.update(grads(0), tx.init(params()))


@pytest.mark.parametrize(
    ("argument", "value"),
    [
        ("eps", 0.0),
        ("decay_rate", 0),
        ("decay_rate", -0.8),
        ("clip_threshold", 0.0),
        ("min_param_scale", -1e-3),
        ("beta", 1.0),
        ("beta", -0.1),
        ("beta", "0.9"),
    ],
)
def test_bad_arguments(argument, value):
    with pytest.raises(ValueError, match=f"{argument} must be a number in .* got {value!r}"):
        lomo_jax.adalomo(0.1, **{argument: value})
