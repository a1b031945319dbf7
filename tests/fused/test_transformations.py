"""Any optax transformation, against optax itself on a model whose layers are not stacked."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick_jit

import lomo_jax

L, B, D, F = 3, 4, 6, 8
PARAMETERS = {"in": (D, D), "bias": (D,), "out": (D, D)}
LAYERS = {"up": (D, F), "down": (F, D), "gain": (D,)}


def normal(rng, *shape):
    return jnp.asarray(0.4 * rng.standard_normal(shape), jnp.float32)


def stacked_params():
    rng = np.random.default_rng(0)
    params = {name: normal(rng, *shape) for name, shape in PARAMETERS.items()}
    return params | {"layers": {name: normal(rng, L, *shape) for name, shape in LAYERS.items()}}


def unstack(params):
    layers = [jax.tree.map(lambda w, i=i: w[i], params["layers"]) for i in range(L)]
    return params | {"layers": layers}


def layer(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"] * w["gain"]


def loss_of(run):
    def loss(params, x):
        x = run(x @ params["in"] + params["bias"], params["layers"])
        return jnp.mean(jnp.square(x @ params["out"] - 1))

    return loss


def scanned(x, layers):
    return jax.lax.scan(lambda x, w: (layer(x, w), None), x, layers)[0]


def unrolled(x, layers):
    return functools.reduce(layer, layers, x)


def names(params):
    """The last key of every path."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key, params)


def is_matrix(params):
    return jax.tree.map(lambda name: name not in ("bias", "gain"), names(params))


def labels(params):
    kinds = {"bias": "small", "gain": "small", "in": "frozen"}
    return jax.tree.map(lambda name: kinds.get(name, "large"), names(params))


SCHEDULE = optax.linear_schedule(0.1, 0.0, 4)
TRANSFORMATIONS = {
    "schedule": optax.adam(SCHEDULE),
    "mask_by_path": optax.adamw(1e-2, weight_decay=0.1, mask=is_matrix),
    "masked": optax.chain(
        optax.sgd(0.1), optax.masked(optax.add_decayed_weights(-0.01), is_matrix)
    ),
    "partition": optax.partition(
        {
            "large": lomo_jax.adalomo(SCHEDULE),
            "small": optax.adam(1e-2),
            "frozen": optax.set_to_zero(),
        },
        labels,
    ),
    "inject_hyperparams": optax.inject_hyperparams(lomo_jax.adalomo)(
        SCHEDULE, weight_decay=0.1, clip_value=0.01
    ),
    "inject_hyperparams_of_adamw": optax.inject_hyperparams(optax.adamw)(
        SCHEDULE, weight_decay=0.1
    ),
    "momentum_and_block_clipping": optax.chain(
        optax.clip_by_block_rms(0.02), optax.sgd(0.1, momentum=0.9, nesterov=True)
    ),
    "accumulation": optax.MultiSteps(optax.adam(1e-2), 2).gradient_transformation(),
    "lookback": optax.chain(optax.scale_by_rms(), optax.ema(0.9), optax.scale(-0.01)),
}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_as_optax_itself_does(name, assert_close, standard_promotion):
    tx = TRANSFORMATIONS[name]
    batches = [normal(np.random.default_rng(seed), B, D) for seed in range(4)]
    step = lomo_jax.fused_step(loss_of(scanned), tx)
    start = stacked_params()
    params, state = start, step.init(start, batches[0])

    @quick_jit
    def plain(params, state, batch):
        grads = jax.grad(loss_of(unrolled))(params, batch)
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    expected = unstack(start)
    plain_state = tx.init(expected)
    run = quick_jit(step)
    for batch in batches:
        params, state, _ = run(params, state, batch)
        expected, plain_state = plain(expected, plain_state, batch)
    assert_close(unstack(params), expected)
    with pytest.raises(AssertionError):
        assert_close(unstack(start), expected)


def test_clipping_by_norm_as_optax_does(assert_close):
    """`optax.clip_by_global_norm` needs all gradients at once, and clip_norm does not."""
    batch = normal(np.random.default_rng(1), B, D)
    start = stacked_params()
    grads = jax.grad(loss_of(unrolled))(unstack(start), batch)
    norm = optax.tree.norm(grads)
    for clip_norm in (0.3 * float(norm), 2.0 * float(norm), float("inf")):
        step = lomo_jax.fused_step(loss_of(scanned), optax.sgd(1.0), clip_norm=clip_norm)
        new, _, out = quick_jit(step)(start, step.init(start, batch), batch)
        assert out.grad_norm == pytest.approx(float(norm), rel=1e-5)
        clipped, _ = optax.clip_by_global_norm(clip_norm).update(grads, optax.EmptyState())
        assert_close(unstack(new), jax.tree.map(jnp.subtract, unstack(start), clipped))


def test_clipping_a_zero_gradient_leaves_it_zero():
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    step = lomo_jax.fused_step(
        lambda p, x: 0.0 * loss_of(scanned)(p, x), optax.sgd(1.0), clip_norm=1.0
    )
    new, _, out = quick_jit(step)(params, step.init(params, batch), batch)
    assert out.grad_norm == 0
    assert all(map(np.array_equal, jax.tree.leaves(new), jax.tree.leaves(params)))


def test_clipping_adds_1e_6_to_the_norm():
    """As `torch.nn.utils.clip_grad_norm_` does."""
    step = lomo_jax.fused_step(lambda p, x: p * x, optax.sgd(1.0), clip_norm=1e-6)
    params, x = jnp.float32(0.0), jnp.float32(1e-6)
    new, _, _ = step(params, step.init(params, x), x)
    assert new == pytest.approx(-0.5e-6, rel=1e-4)


def test_the_norm_counts_a_tied_parameter_once():
    def loss(params, x):
        y = scanned(x @ params["tied"], params["layers"])
        return jnp.mean(jnp.square(y @ params["tied"].T))

    params = {"tied": stacked_params()["in"], "layers": stacked_params()["layers"]}
    batch = normal(np.random.default_rng(1), B, D)
    step = lomo_jax.fused_step(loss, optax.sgd(0.1), clip_norm=float("inf"))
    _, _, out = quick_jit(step)(params, step.init(params, batch), batch)
    expected = optax.tree.norm(jax.grad(loss)(params, batch))
    assert out.grad_norm == pytest.approx(float(expected), rel=1e-5)


def test_hyperparameters_can_be_set_between_steps():
    tx = optax.inject_hyperparams(optax.sgd)(learning_rate=1.0)
    step = lomo_jax.fused_step(loss_of(scanned), tx)
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    state = step.init(params, batch)
    still = jax.tree_util.tree_map_with_path(
        lambda path, x: jnp.zeros_like(x) if "learning_rate" in str(path) else x, state
    )
    for a, b in zip(*map(jax.tree.leaves, (step(params, still, batch)[0], params)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_state_keeps_its_dtype(standard_promotion):
    """Gradients come in float32; the moments of bfloat16 parameters stay in bfloat16."""
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), stacked_params())
    batch = normal(np.random.default_rng(1), B, D).astype(jnp.bfloat16)
    seen = set()

    def spy(updates, state, params=None):
        seen.update(u.dtype for u in jax.tree.leaves(updates))
        return updates, state

    tx = optax.chain(
        optax.GradientTransformation(lambda params: optax.EmptyState(), spy), optax.adam(0.1)
    )
    step = lomo_jax.fused_step(loss_of(scanned), tx)
    state = step.init(params, batch)
    new, new_state, _ = quick_jit(step)(params, state, batch)
    assert seen == {jnp.dtype("float32")}
    dtypes = functools.partial(jax.tree.map, lambda x: x.dtype)
    assert dtypes(new_state) == dtypes(state)
    assert dtypes(new) == dtypes(params)
