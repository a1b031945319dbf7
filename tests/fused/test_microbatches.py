"""Microbatches: the result equals the whole batch's, and each draws its own random numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, quick_jit

import lomo_jax
from lomo_jax.fused.microbatches import split

L, B, T, D, F, V = 3, 32, 5, 6, 8, 11


def make_params(dtype=jnp.float32):
    params = {
        "embedding": normal(0, V, D),
        "layers": {"up": normal(1, L, D, F), "down": normal(2, L, F, D)},
        "head": normal(3, D, V),
    }
    return jax.tree.map(lambda x: x.astype(dtype), params)


def make_batch(seed=0):
    rng = np.random.default_rng(seed)
    weights = rng.random((B, T - 1)) < rng.random((B, 1))
    weights[::8] = False  # the first of eight microbatches has no tokens at all
    return {
        "tokens": rng.integers(0, V, (B, T), np.int32),
        "weights": weights.astype(np.float32),
    }


def token_losses(params, batch):
    tokens = batch["tokens"]
    layer = lambda x, w: (x + jnp.tanh(x @ w["up"]) @ w["down"], None)  # noqa: E731
    x, _ = jax.lax.scan(layer, params["embedding"][tokens], params["layers"])
    logits = jax.nn.log_softmax((x @ params["head"]).astype(jnp.float32))
    return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]


def plain_loss(params, batch):
    return token_losses(params, batch).mean()


def weighted_loss(params, batch):
    weights = batch["weights"]
    total = weights.sum()
    loss = jnp.vdot(token_losses(params, batch), weights) / jnp.where(total > 0, total, 1)
    return lomo_jax.WeightedLoss(loss, total)


def run(make_step, loss_fn, steps=5, tx=None, **options):
    step = make_step(loss_fn, tx or lomo_jax.adalomo(0.05), **options)
    params = make_params()
    state = step.init(params, make_batch())
    jitted = quick_jit(step)
    losses = []
    for seed in range(steps):
        params, state, out = jitted(params, state, make_batch(seed))
        losses.append(out.loss)
    return params, state, losses


@pytest.mark.parametrize("loss_fn", [plain_loss, weighted_loss])
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_microbatches_equal_the_whole_batch(make_step, loss_fn, assert_close):
    expected = run(make_step, loss_fn)
    for microbatches in (2, 8):
        assert_close(run(make_step, loss_fn, microbatches=microbatches), expected)


def test_microbatch_k_has_every_kth_row():
    batch = {"x": jnp.arange(12).reshape(6, 2), "scale": jnp.float32(2.0)}
    parts = split(batch, 3)
    np.testing.assert_array_equal(parts["x"][:, :, 0], [[0, 6], [2, 8], [4, 10]])
    np.testing.assert_array_equal(parts["x"][:, :, 1], parts["x"][:, :, 0] + 1)
    np.testing.assert_array_equal(parts["scale"], [2.0, 2.0, 2.0])


def test_uneven_microbatches_need_weights():
    """The mean of the means of uneven microbatches is another loss."""

    def unweighted(params, batch):
        return weighted_loss(params, batch).loss

    _, _, (weighted,) = run(lomo_jax.fused_step, weighted_loss, 1, microbatches=8)
    _, _, (mean_of_means,) = run(lomo_jax.fused_step, unweighted, 1, microbatches=8)
    assert abs(weighted - mean_of_means) > 0.05 * weighted


def test_no_weight_at_all():
    batch = make_batch() | {"weights": np.zeros((B, T - 1), np.float32)}
    step = lomo_jax.fused_step(weighted_loss, lomo_jax.lomo(0.1), microbatches=4)
    params = make_params()
    new, _, out = quick_jit(step)(params, step.init(params, batch), batch)
    assert out.loss == 0
    for a, b in zip(jax.tree.leaves(new), jax.tree.leaves(params), strict=True):
        np.testing.assert_array_equal(a, b)


def test_the_sum_is_in_float32():
    """In bfloat16 256 + 1 is 256, so that 1 added 256 times to 256 would leave it there."""
    params = {"layers": jnp.zeros((1, 1, 1), jnp.bfloat16)}
    batch = jnp.array([[256.0]] + 256 * [[1.0]], jnp.bfloat16)[:257]

    def loss(params, x):
        layer = lambda total, w: (total + jnp.sum(x @ w), None)  # noqa: E731
        return jax.lax.scan(layer, jnp.bfloat16(0.0), params["layers"])[0]

    def keep(updates, state, params=None):
        return updates, updates

    tx = optax.GradientTransformation(
        lambda params: jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params), keep
    )
    step = lomo_jax.fused_step(loss, tx, microbatches=257)
    _, state, _ = quick_jit(step)(params, step.init(params, batch), batch)
    (total,) = jax.tree.leaves(state.optimizer)
    assert float(total.item()) == pytest.approx(512 / 257, rel=1e-2)


def random_loss(params, batch):
    """The gradient is the draw of the recomputed layer; aux is the draw of the forward pass."""

    def layer(total, scanned):
        w, key = scanned
        u = jax.random.uniform(key)
        return total + u * w, u

    keys = jax.random.split(batch["key"], L)
    return jax.lax.scan(layer, 0.0, (params, keys))


@pytest.mark.parametrize("microbatches", [1, 4])
def test_every_step_layer_and_microbatch_draws_its_own_numbers(microbatches):
    step = lomo_jax.fused_step(random_loss, optax.sgd(1.0), has_aux=True, microbatches=microbatches)
    params = jnp.zeros(L)
    draws = []
    for seed in range(2):
        batch = {"key": jax.random.key(seed), "tokens": jnp.zeros(8)}
        new, _, out = quick_jit(step)(params, step.init(params, batch), batch)
        assert out.aux.shape == ((L,) if microbatches == 1 else (microbatches, L))
        # The layer that was computed again drew the same numbers.
        np.testing.assert_allclose(-new, out.aux.reshape(microbatches, L).mean(0), rtol=1e-6)
        draws.append(out.aux)
    assert len(np.unique(draws)) == 2 * microbatches * L


def test_one_microbatch_at_a_time_needs_less_memory():
    def temporaries(microbatches):
        step = lomo_jax.fused_step(plain_loss, lomo_jax.adalomo(0.1), microbatches=microbatches)
        width = {"embedding": (V, 64), "head": (64, V)}
        layers = {"up": (8, 64, 256), "down": (8, 256, 64)}
        params = {
            name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in width.items()
        } | {
            "layers": {
                name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in layers.items()
            }
        }
        batch = {"tokens": jax.ShapeDtypeStruct((32, 64), jnp.int32)}
        state = jax.eval_shape(step.init, params, batch)
        lowered = quick_jit(step, donate_argnums=(0, 1)).lower(params, state, batch)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    layer_inputs = 8 * 32 * 64 * 64 * 4
    one, eight = temporaries(1), temporaries(8)
    # All memory except layer inputs shrinks to less than half.
    assert eight - layer_inputs < (one - layer_inputs) / 2


@pytest.mark.parametrize(
    ("batch", "message"),
    [
        ({"tokens": jnp.zeros((6, 2))}, r"batch leaf \['tokens'\] has a leading axis of 6, .*=4"),
        ({"scale": jnp.float32(1.0)}, "no leaf of the batch has a leading axis to split"),
        ({}, "no leaf of the batch has a leading axis to split"),
    ],
)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_batch_that_does_not_split(make_step, batch, message):
    step = make_step(lambda p, b: p.sum(), optax.sgd(1.0), microbatches=4)
    with pytest.raises(ValueError, match=message):
        step.init(jnp.ones(3), batch)


def test_scalars_go_to_every_microbatch():
    loss = lambda p, b: (p * b["x"]).mean() * b["scale"]  # noqa: E731
    step = lomo_jax.fused_step(loss, optax.sgd(1.0), microbatches=2)
    batch = {"x": jnp.arange(4.0), "scale": 3.0}
    params = jnp.float32(0.0)
    new, _, _ = step(params, step.init(params, batch), batch)
    assert new == pytest.approx(-3.0 * 1.5)


def test_aux_of_a_loss_that_does_not_depend_on_the_batch(assert_steps_agree):
    loss = lambda p, x: (jnp.sum(p**2), {"mean": x.mean(), "one": 1})  # noqa: E731
    _, out = assert_steps_agree(
        loss, optax.sgd(0.1), jnp.ones(3), [jnp.arange(6.0)], has_aux=True, microbatches=2
    )
    np.testing.assert_array_equal(out.aux["mean"], [2.0, 3.0])  # of every second number
    np.testing.assert_array_equal(out.aux["one"], [1, 1])


def test_python_scalars_of_the_batch_promote_nothing(assert_steps_agree):
    loss = lambda p, b: jnp.mean(p * b["x"] * b["scale"]).astype(jnp.float32)  # noqa: E731
    batch = {"x": jnp.arange(4, dtype=jnp.bfloat16), "scale": 2.0}
    assert_steps_agree(
        loss, optax.sgd(1.0), jnp.bfloat16(1.0), [batch], microbatches=2, tolerance=2.0**-7
    )


def test_key_of_the_old_kind():
    step = lomo_jax.fused_step(plain_loss, optax.sgd(1.0), microbatches=4)
    batch = make_batch() | {"key": jax.random.PRNGKey(0)}
    with pytest.raises(ValueError, match=r"batch leaf \['key'\] has a .* use jax.random.key"):
        step.init(make_params(), batch)


def test_two_unsigned_numbers_are_no_key():
    loss = lambda p, x: p * x.astype(jnp.float32).mean()  # noqa: E731
    step = lomo_jax.fused_step(loss, optax.sgd(1.0), microbatches=2)
    params, batch = jnp.float32(0.0), jnp.array([1, 4], jnp.uint32)
    assert step(params, step.init(params, batch), batch)[0] == -2.5


def test_weight_that_depends_on_a_parameter():
    loss = lambda p, x: lomo_jax.WeightedLoss((p["w"] * x).mean(), p["w"].sum())  # noqa: E731
    step = lomo_jax.fused_step(loss, optax.sgd(1.0), microbatches=2)
    with pytest.raises(ValueError, match=r"weight of the loss depends on parameter w: .* batch"):
        step.init({"w": jnp.ones(2)}, jnp.ones((4, 2)))


def test_weight_must_be_a_scalar():
    loss = lambda p, x: lomo_jax.WeightedLoss(p.mean(), x)  # noqa: E731
    step = lomo_jax.fused_step(loss, optax.sgd(1.0))
    with pytest.raises(TypeError, match="weight of a WeightedLoss must be a real scalar"):
        step.init(jnp.ones(2), jnp.ones((4, 2)))
    with pytest.raises(TypeError, match="weight of a WeightedLoss must be a real scalar"):
        step.init(jnp.ones(2), jax.random.key(0))
