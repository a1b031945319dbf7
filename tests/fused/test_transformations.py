"""Any optax transformation, against optax itself on a model whose layers are not stacked."""

import functools
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import before_release, quick_jit

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


@pytest.mark.parametrize(
    ("make_step", "value"),
    [
        (lomo_jax.fused_step, 0.0),
        (lomo_jax.fused_step, jnp.asarray(0.0)),
        (lomo_jax.reference_step, 0.0),
        before_release(lomo_jax.fused_step, jnp.float32(0.0)),
    ],
)
def test_a_learning_rate_set_for_all_layers(make_step, value, standard_promotion):
    """`optax.tree_utils.tree_set` sets a scalar where a stack has [L]."""
    tx = optax.inject_hyperparams(optax.adam)(learning_rate=1.0)
    step = make_step(loss_of(scanned), tx)
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    _, state, _ = step(params, step.init(params, batch), batch)
    still = state._replace(
        optimizer=optax.tree_utils.tree_set(state.optimizer, learning_rate=value)
    )
    new, after, _ = step(params, still, batch)
    jax.tree.map(np.testing.assert_array_equal, new, params)
    jax.tree.map(np.testing.assert_array_equal, new, quick_jit(step)(params, still, batch)[0])
    # Nothing else in the state is lost.
    _, expected, _ = step(params, state, batch)
    for name, found in after.optimizer.items():
        rate = found.hyperparams["learning_rate"]
        assert rate.shape == ((L,) if name.startswith("layers") else ())
        assert not rate.any()
        jax.tree.map(
            np.testing.assert_array_equal, found.inner_state, expected.optimizer[name].inner_state
        )


def test_a_scalar_is_no_moment_of_a_stack():
    step = lomo_jax.fused_step(loss_of(scanned), optax.sgd(0.1, momentum=0.9))
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    state = step.init(params, batch)
    wrong = jax.tree.map(lambda x: jnp.float32(0), state.optimizer)
    with pytest.raises(ValueError, match=r"float32\[\] at .* not float32\["):
        step(params, state._replace(optimizer=wrong), batch)


OF_THE_VALUE = {
    "reduce_on_plateau": optax.chain(
        optax.adam(0.1), optax.contrib.reduce_on_plateau(factor=0.1, patience=1, cooldown=1)
    ),
    "schedule_free": optax.contrib.schedule_free_sgd(0.1),
    "step_size_of_the_loss": optax.GradientTransformationExtraArgs(
        lambda params: optax.EmptyState(),
        lambda g, s, p=None, *, value, **_: (jax.tree.map(lambda g: -0.1 * value * g, g), s),
    ),
}


@pytest.mark.parametrize("name", OF_THE_VALUE)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_a_transformation_that_takes_the_value(make_step, name, assert_close, standard_promotion):
    """The loss scale is not in the value, and microbatches do not change it."""
    tx = OF_THE_VALUE[name]
    batches = [normal(np.random.default_rng(seed % 2), B, D) for seed in range(6)]
    step = make_step(loss_of(scanned), tx, microbatches=2, loss_scale=8.0)
    start = stacked_params()
    params, state = start, step.init(start, batches[0])

    @quick_jit
    def plain(params, state, batch):
        value, grads = jax.value_and_grad(loss_of(unrolled))(params, batch)
        updates, state = tx.update(grads, state, params, value=value)
        return optax.apply_updates(params, updates), state

    expected = unstack(start)
    plain_state = tx.init(expected)
    run = quick_jit(step)
    for batch in batches:
        params, state, _ = run(params, state, batch)
        expected, plain_state = plain(expected, plain_state, batch)
    assert_close(unstack(params), expected)
    if name == "reduce_on_plateau":
        assert plain_state[1].scale < 1  # the loss stopped falling
        for of_name in state.optimizer.values():
            np.testing.assert_allclose(of_name[1].scale, plain_state[1].scale)


def test_the_value_is_weighted():
    seen = optax.GradientTransformationExtraArgs(
        lambda params: jnp.float32(0),
        lambda g, s, p=None, *, value, **_: (jax.tree.map(jnp.zeros_like, g), value),
    )

    def loss(params, batch):
        count = batch["mask"].sum()
        total = jnp.vdot((params * batch["x"]) ** 2, batch["mask"])
        return lomo_jax.WeightedLoss(total / jnp.maximum(count, 1), count)

    batch = {"x": jnp.arange(4.0), "mask": jnp.array([1.0, 0.0, 1.0, 1.0])}
    params = jnp.float32(1.0)
    for make_step in (lomo_jax.fused_step, lomo_jax.reference_step):
        step = make_step(loss, seen, microbatches=2, loss_scale=4.0)
        _, state, out = step(params, step.init(params, batch), batch)
        assert state.optimizer["params"] == out.loss == pytest.approx(13 / 3)


@pytest.mark.parametrize(
    ("tx", "names"),
    [
        (optax.adamw(0.1, mask=lambda p: jax.tree.map(lambda x: x.ndim > 1, p)), "layers/gain"),
        (optax.contrib.muon(0.1), "layers/down, layers/gain, layers/up"),
        (optax.masked(optax.sgd(0.1, 0.9), lambda p: jax.tree.map(lambda x: x.ndim > 2, p)), "up"),
    ],
    ids=["decay_of_matrices", "muon", "momentum_of_stacks"],
)
def test_a_rule_by_ndim_warns(tx, names, standard_promotion):
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    step = lomo_jax.fused_step(loss_of(scanned), tx)
    with pytest.warns(
        UserWarning, match=rf"^tx has another rule for .*{names} as a whole"
    ) as found:
        state = step.init(params, batch)
    assert len(found) == 1
    step(params, state, batch)
    lomo_jax.reference_step(loss_of(scanned), tx).init(params, batch)


@pytest.mark.parametrize(
    "tx",
    [
        lomo_jax.adalomo(0.1),
        lomo_jax.lomo(0.1),
        optax.adafactor(0.1, min_dim_size_to_factor=2),
        optax.adafactor(0.1),
        optax.lamb(0.1),
        optax.novograd(0.1),
        optax.sm3(0.1),
        optax.adamw(0.1, mask=is_matrix),
    ],
    ids=["adalomo", "lomo", "factored", "adafactor", "lamb", "novograd", "sm3", "mask_by_path"],
)
def test_no_rule_by_ndim(tx, standard_promotion):
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    lomo_jax.fused_step(loss_of(scanned), tx).init(params, batch)


@pytest.mark.parametrize(
    "make_step", [lomo_jax.fused_step, before_release(lomo_jax.reference_step)]
)
def test_without_jit(make_step, assert_close):
    """`jax.disable_jit` unrolls loops: the layers are found all the same."""
    params, batch = stacked_params(), normal(np.random.default_rng(1), B, D)
    step = make_step(
        loss_of(scanned),
        lomo_jax.adalomo(0.1),
        clip_norm=0.1,
        microbatches=2,
        loss_scale=lomo_jax.DynamicLossScale(),
    )
    expected = quick_jit(step)(params, step.init(params, batch), batch)
    with jax.disable_jit():
        found = step(params, step.init(params, batch), batch)
        explanation = step.explain(params, batch)
    assert_close(found, expected)
    assert str(explanation) == str(step.explain(params, batch))
    assert "scan of 3 layers" in str(explanation)


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


def test_a_chain_of_operations_may_be_longer_than_pythons_stack():
    params, batch = {"w": jnp.full((4,), 1.0001)}, jnp.ones((2, 4))

    def loss(params, batch):
        for _ in range(2 * sys.getrecursionlimit()):
            batch = batch * params["w"]
        return jnp.mean(batch)

    step = lomo_jax.fused_step(loss, optax.sgd(0.1))
    state = step.init(params, batch)
    assert isinstance(state, lomo_jax.StepState)


@pytest.mark.parametrize(
    ("flag", "value", "options"),
    [
        ("jax_debug_nans", True, {"clip_norm": 0.1}),
        before_release("jax_numpy_rank_promotion", "raise", {"microbatches": 2}),
        ("jax_numpy_rank_promotion", "raise", {"clip_norm": 0.1}),
        ("jax_disable_jit", True, {}),
        ("jax_enable_x64", True, {"clip_norm": 0.1}),
        before_release("jax_enable_x64", True, {"microbatches": 2}),
        before_release("jax_debug_nans", True, {}),
        before_release("jax_debug_nans", True, {"microbatches": 2}),
        before_release("jax_numpy_rank_promotion", "raise", {}),
        before_release("jax_disable_jit", True, {"clip_norm": 0.1}),
        before_release("jax_disable_jit", True, {"microbatches": 2}),
        before_release("jax_enable_x64", True, {}),
    ],
    ids=str,
)
def test_under_the_flags_of_jax(flag, value, options, assert_close):
    def loss(params, x):  # as `loss_of(scanned)`, with ranks that are equal
        def body(x, w):
            return x + jnp.tanh(x @ w["up"]) @ w["down"] * w["gain"][None], None

        x, _ = jax.lax.scan(body, x @ params["in"] + params["bias"][None], params["layers"])
        return jnp.mean(jnp.square(x @ params["out"] - 1))

    before = getattr(jax.config, flag)
    jax.config.update(flag, value)
    try:
        dtype = jnp.float64 if flag == "jax_enable_x64" else jnp.float32
        inputs = stacked_params(), normal(np.random.default_rng(1), B, D)
        params, batch = jax.tree.map(lambda x: x.astype(dtype), inputs)
        results = []
        for make_step in (lomo_jax.fused_step, lomo_jax.reference_step):
            step = make_step(loss, lomo_jax.adalomo(0.1), **options)
            results.append(step(params, step.init(params, batch), batch)[:2])
        assert_close(*results)
        assert results[0][0]["in"].dtype == dtype
    finally:
        jax.config.update(flag, before)


@pytest.mark.slow
def test_two_thousand_parameters():
    """`init` takes little longer for each of many parameters than for each of a few."""

    def loss(params, x):
        return sum(jnp.sum(x * w * w) for w in params.values())

    x, seconds = jnp.ones(2), []
    for count in (500, 2000):
        params = {f"w{i}": jnp.ones(2) for i in range(count)}
        step = lomo_jax.fused_step(loss, lomo_jax.lomo(0.1))
        start = time.process_time()
        with pytest.warns(UserWarning, match="no trainable parameter is in a layer scan"):
            step.init(params, x)
        seconds.append(time.process_time() - start)
    assert seconds[1] < 12 * seconds[0]  # 16 times, if it grew with the square
