"""Losses, transformations and states that the fused step refuses, and the errors it raises."""

import jax
import jax.numpy as jnp
import optax
import pytest

import lomo_jax

L, D = 4, 6


def layer(x, w):
    return jnp.tanh(x @ w), None


def stack():
    return jax.random.normal(jax.random.key(0), (L, D, D))


def simple(params, x):
    return jax.lax.scan(layer, x @ params["in"], params["layers"])[0].sum()


def simple_params():
    return {"in": jnp.eye(D), "layers": stack()}


def norm_of_the_last_step():
    """Mixes parameters through its state only: the norm of one step scales the next update."""

    def init(params):
        return optax.tree.norm(params)

    def update(updates, state, params=None):
        del params
        return jax.tree.map(lambda g: -g / state, updates), optax.tree.norm(updates)

    return optax.GradientTransformation(init, update)


@pytest.mark.parametrize(
    ("tx", "remedy"),
    [
        (optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)), "use clip_norm"),
        (optax.apply_if_finite(optax.sgd(0.1), 3), r"DynamicLossScale\(\).* StepOutput.finite"),
        (norm_of_the_last_step(), "use clip_norm"),
    ],
    ids=["clip_by_global_norm", "apply_if_finite", "through_the_state"],
)
def test_transformation_that_mixes_parameters(tx, remedy):
    step = lomo_jax.fused_step(simple, tx)
    with pytest.raises(ValueError, match=rf"tx updates parameter .* from .*{remedy}"):
        step.init(simple_params(), jnp.ones((2, D)))


@pytest.mark.parametrize(
    "tx",
    [
        optax.adam(1e-3),
        optax.lion(1e-3),
        optax.adafactor(1e-3),
        optax.chain(optax.clip(1.0), optax.sgd(optax.linear_schedule(1.0, 0.0, 10), momentum=0.9)),
        optax.inject_hyperparams(optax.sgd)(learning_rate=0.1),
        optax.clip_by_block_rms(1.0),
        optax.MultiSteps(optax.sgd(0.1), 2).gradient_transformation(),
        optax.novograd(0.1),
        lomo_jax.adalomo(1e-3),
    ],
    ids=[
        "adam",
        "lion",
        "adafactor",
        "chain",
        "inject_hyperparams",
        "block_rms",
        "MultiSteps",
        "novograd",
        "adalomo",
    ],
)
def test_transformation_that_does_not_mix_parameters(tx, standard_promotion):
    lomo_jax.fused_step(simple, tx).init(simple_params(), jnp.ones((2, D)))


@pytest.mark.parametrize(
    ("loss", "has_aux", "message"),
    [
        (lambda p, x: x @ p["in"], False, r"floating-point scalar, got float32\[2, 6\]"),
        (lambda p, x: jnp.int32(1), False, r"floating-point scalar, got int32\[\]"),
        (lambda p, x: (p["in"].sum(), 1), False, "pass has_aux=True"),
        (lambda p, x: p["in"].sum(), True, r"must return \(loss, aux\)"),
    ],
)
def test_loss_must_be_a_scalar(loss, has_aux, message):
    step = lomo_jax.fused_step(loss, lomo_jax.lomo(0.1), has_aux=has_aux)
    with pytest.raises(TypeError, match=message):
        step.init(simple_params(), jnp.ones((2, D)))


def test_state_of_another_transformation():
    batch, params = jnp.ones((2, D)), simple_params()
    state = lomo_jax.fused_step(simple, lomo_jax.adalomo(0.1)).init(params, batch)
    step = lomo_jax.fused_step(simple, lomo_jax.lomo(0.1))
    with pytest.raises(ValueError, match=r"make it with step.init\(params, batch\)"):
        step(params, state, batch)


@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_the_state_of_a_whole_tree(make_step, standard_promotion):
    """As a `TrainState` has it, in place of the step's state or of the optimizer's in it."""
    batch, params, tx = jnp.ones((2, D)), simple_params(), optax.adam(0.1)
    step = make_step(simple, tx)
    whole = tx.init(params)
    message = r"one optimizer state for all parameters.* make it with step.init\(params, batch\)"
    for state in (whole, step.init(params, batch)._replace(optimizer=whole)):
        with pytest.raises(ValueError, match=message):
            step(params, state, batch)


def test_tx_sees_one_layer():
    def only_matrices(params):
        assert {p.ndim for p in jax.tree.leaves(params)} <= {2}
        return optax.EmptyState()

    tx = optax.GradientTransformation(only_matrices, lambda g, s, p=None: (g, only_matrices(p)))
    lomo_jax.fused_step(simple, tx).init(simple_params(), jnp.ones((2, D)))


def test_state_of_another_depth():
    batch, params = jnp.ones((2, D)), simple_params()
    step = lomo_jax.fused_step(simple, lomo_jax.adalomo(0.1))
    state = step.init(params, batch)
    deeper = params | {"layers": jnp.ones((L + 1, D, D))}
    with pytest.raises(ValueError, match=r"state has int32\[4\] at .*count, not int32\[5\]"):
        step(deeper, state, batch)


def test_names_of_parameters_are_unique():
    params = {"a": {"b": jnp.ones(2)}, "a/b": jnp.ones(3), "c": [jnp.ones(1)]}
    step = lomo_jax.reference_step(
        lambda p, x: sum(map(jnp.sum, jax.tree.leaves(p))), optax.sgd(1.0)
    )
    assert step.init(params, None).optimizer.keys() == {"['a']['b']", "['a/b']", "['c'][0]"}


def list_of_layers(params, x):
    for w in params["layers"]:
        x, _ = layer(x, w)
    return x.sum()


def test_a_model_without_a_layer_scan_warns_at_init():
    params = {"layers": [jnp.zeros((512, 256)), jnp.zeros((256, 256))]}  # 0.75 MiB
    x = jnp.ones((2, 512))
    step = lomo_jax.fused_step(list_of_layers, lomo_jax.lomo(0.1))
    message = r"^no trainable parameter is in a layer scan: .* all 0.75 MiB .* jax.lax.scan"
    with pytest.warns(UserWarning, match=message) as caught:
        state = step.init(params, x)
    assert len(caught) == 1
    assert caught[0].filename == __file__
    # Warnings are errors: neither a call nor the reference warns.
    step(params, state, x)
    lomo_jax.reference_step(list_of_layers, lomo_jax.lomo(0.1)).init(params, x)


def test_one_parameter_has_one_gradient_and_needs_no_scan():
    step = lomo_jax.fused_step(list_of_layers, lomo_jax.lomo(0.1))
    step.init({"layers": [jnp.zeros((6, 6))]}, jnp.ones((2, 6)))
    step = lomo_jax.fused_step(
        list_of_layers, lomo_jax.lomo(0.1), trainable={"layers": [False, True]}
    )
    step.init({"layers": [jnp.zeros((6, 6)), jnp.zeros((6, 6))]}, jnp.ones((2, 6)))


def test_parameters_must_be_arrays():
    step = lomo_jax.fused_step(lambda p, x: p["gain"] * x.sum(), lomo_jax.lomo(0.1))
    with pytest.raises(TypeError, match=r"parameter gain is 1.5, not an array"):
        step.init({"gain": 1.5}, jnp.ones(3))


def test_init_takes_shapes():
    batch, params = jnp.ones((2, D)), simple_params()
    step = lomo_jax.fused_step(simple, lomo_jax.adalomo(0.1))
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (params, batch))
    abstract = jax.eval_shape(step.init, *shapes)
    concrete = step.init(params, shapes[1])
    assert jax.tree.map(lambda x: (x.shape, x.dtype), abstract) == jax.tree.map(
        lambda x: (x.shape, x.dtype), concrete
    )
    assert concrete.optimizer["layers"].moments["layers"].row.shape == (L, D)
    assert concrete.optimizer["layers"].count.shape == (L,)
    assert concrete.optimizer["in"].moments["in"].row.shape == (D,)


def test_columns_of_a_matrix_with_as_many_rows_as_there_are_chunks_of_it(assert_close):
    """A slice of a matrix in a loop of that length picks a layer only if it takes one row."""

    def loss(params, x):
        def chunk(total, i):
            columns = jax.lax.dynamic_slice_in_dim(params["head"], 2 * i, 2, axis=1)
            return total + (jnp.tanh(x @ columns) ** 2).sum(), None

        return jax.lax.scan(chunk, jnp.float32(0), jnp.arange(4))[0]

    params, x = {"head": jax.random.normal(jax.random.key(0), (4, 8))}, jnp.ones((3, 4))
    step = lomo_jax.fused_step(loss, optax.sgd(1.0))
    new, _, _ = step(params, step.init(params, x), x)
    assert_close(new["head"], params["head"] - jax.grad(loss)(params, x)["head"])


def test_rows_of_an_embedding_with_as_many_rows_as_the_loop_has_steps(assert_close):
    """A gather from a matrix looks up rows, here one for each step; it takes no layer."""

    def loss(params, tokens):
        look_up = lambda total, row: (total + params["embedding"][row].sum(), None)  # noqa: E731
        return jax.lax.scan(look_up, jnp.float32(0), tokens)[0]

    params, tokens = {"embedding": jnp.ones((4, 8))}, jnp.array([[2, 2], [0, 1], [1, 1], [0, 0]])
    step = lomo_jax.fused_step(loss, optax.sgd(1.0))
    new, _, _ = step(params, step.init(params, tokens), tokens)
    counts = jnp.array([3.0, 3.0, 2.0, 0.0])[:, None]
    assert_close(new["embedding"], params["embedding"] - counts)
