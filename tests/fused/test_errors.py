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


def cast_stack(params, x):
    stacked = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["layers"])
    return jax.lax.scan(layer, x.astype(jnp.bfloat16), stacked["w"])[0].astype(jnp.float32).sum()


def cast_inside_jit(params, x):
    return jax.jit(cast_stack)(params, x)


def transposed_stack(params, x):
    return jax.lax.scan(layer, x, params["layers"]["w"].transpose(1, 0, 2)[:D])[0].sum()


def used_twice(params, x):
    w = params["layers"]["w"]
    return jax.lax.scan(layer, x, w)[0].sum() + jnp.sum(w**2)


def scanned_twice(params, x):
    w = params["layers"]["w"]
    return jax.lax.scan(layer, jax.lax.scan(layer, x, w)[0], w)[0].sum()


def in_cond(params, x):
    run = lambda x: jax.lax.scan(layer, x, params["layers"]["w"])[0]  # noqa: E731
    return jax.lax.cond(x.sum() > 0, run, lambda x: x, x).sum()


def in_an_outer_scan(params, x):
    run = lambda x, _: (jax.lax.scan(layer, x, params["layers"]["w"])[0], None)  # noqa: E731
    return jax.lax.scan(run, x, None, length=2)[0].sum()


def in_a_custom_vjp(params, x):
    @jax.custom_vjp
    def run(w, x):
        return jax.lax.scan(layer, x, w)[0]

    run.defvjp(lambda w, x: (run(w, x), None), lambda _, g: (None, g))
    return run(params["layers"]["w"], x).sum()


def indexed_in_a_loop(params, x):
    body = lambda i, x: jnp.tanh(x @ params["layers"]["w"][i])  # noqa: E731
    return jax.lax.fori_loop(0, L, body, x).sum()


def taken_in_a_scan(params, x):
    body = lambda x, i: layer(x, jnp.take(params["layers"]["w"], i, axis=0))  # noqa: E731
    return jax.lax.scan(body, x, jnp.arange(L))[0].sum()


def reshaped_stack(params, x):
    return jax.lax.scan(layer, x, params["layers"]["w"].reshape(-1, D, D))[0].sum()


def half_a_stack(params, x):
    return jax.lax.scan(layer, x, params["layers"]["w"][: L // 2])[0].sum()


def in_cond_inside_jit(params, x):
    return jax.jit(in_cond)(params, x)


def indexed_in_a_loop_inside_jit(params, x):
    return jax.jit(indexed_in_a_loop)(params, x)


@pytest.mark.parametrize(
    ("loss", "fault", "fix"),
    [
        (cast_stack, "`convert_element_type` of the whole stack", "inside the scanned function"),
        (cast_inside_jit, "`convert_element_type` of the whole stack", "to one layer"),
        (transposed_stack, "of the whole stack", "layers on axis 0"),
        (used_twice, "also used by `integer_pow`|also used by `square`", "a parameter of its own"),
        (scanned_twice, "also used by `scan`", "a parameter of its own"),
        (in_cond, "inside `cond`", "move the layer scan out of"),
        (taken_in_a_scan, "indexed by layer inside a loop", "scanned input"),
        (reshaped_stack, "`reshape` of the whole stack", "inside the scanned function"),
        (half_a_stack, "`slice` of the whole stack", "inside the scanned function"),
        (in_cond_inside_jit, "inside `cond`", "move the layer scan out of"),
        (in_an_outer_scan, "inside `scan`", "move the layer scan out of"),
        (in_a_custom_vjp, "inside `custom_vjp_call", "move the layer scan out of"),
        (indexed_in_a_loop_inside_jit, "indexed by layer inside a loop", "scanned input"),
        (indexed_in_a_loop, "indexed by layer inside a loop", r"scanned input of lax.scan \(xs\)"),
    ],
)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_stack_that_cannot_be_fused(make_step, loss, fault, fix):
    w = {transposed_stack: jnp.ones((D, L, D)), reshaped_stack: jnp.ones((2, 2, D, D))}.get(
        loss, stack()
    )
    step = make_step(loss, lomo_jax.lomo(0.1))
    for pattern in ("parameter layers/w ", fault, fix):
        with pytest.raises(ValueError, match=pattern) as error:
            step.init({"layers": {"w": w}}, jnp.ones((2, D)))
        assert "\n" not in str(error.value)


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
    "tx",
    [
        optax.chain(optax.clip_by_global_norm(1.0), optax.sgd(0.1)),
        optax.apply_if_finite(optax.sgd(0.1), 3),
        norm_of_the_last_step(),
    ],
    ids=["clip_by_global_norm", "apply_if_finite", "through_the_state"],
)
def test_transformation_that_mixes_parameters(tx):
    step = lomo_jax.fused_step(simple, tx)
    with pytest.raises(ValueError, match=r"tx updates parameter .* from .* use clip_norm"):
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
