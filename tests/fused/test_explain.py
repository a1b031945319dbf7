"""What `Step.explain` says of a loss, and when `init` warns; the results are right in any case."""

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import normal

import lomo_jax

L, B, D = 4, 2, 6


def layer(x, w):
    return jnp.tanh(x @ w), None


def scan(x, w):
    return jax.lax.scan(layer, x, w)[0]


WALKED, WHOLE = {}, {}


def walked(loss):
    WALKED[loss.__name__] = loss
    return loss


def whole(reason, remedy):
    def add(loss):
        WHOLE[loss.__name__] = (loss, reason, remedy)
        return loss

    return add


@walked
def cast_of_the_stack(params, x):
    stacked = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params["layers"])
    return scan(x.astype(jnp.bfloat16), stacked["w"]).astype(jnp.float32).sum()


@walked
def cast_inside_jit(params, x):
    return jax.jit(cast_of_the_stack)(params, x)


@walked
def transposed_stack(params, x):
    return scan(x, params["layers"]["w"].transpose(2, 0, 1)).sum()


@walked
def penalty(params, x):
    w = params["layers"]["w"]
    return scan(x, w).sum() + jnp.sum(w**2)


@walked
def taken_in_a_scan(params, x):
    body = lambda x, i: layer(x, jnp.take(params["layers"]["w"], i, axis=0))  # noqa: E731
    return jax.lax.scan(body, x, jnp.arange(L))[0].sum()


@walked
def indexed_in_a_loop(params, x):
    body = lambda i, x: jnp.tanh(x @ params["layers"]["w"][i])  # noqa: E731
    return jax.lax.fori_loop(0, L, body, x).sum()


@walked
def indexed_in_a_loop_inside_jit(params, x):
    return jax.jit(indexed_in_a_loop)(params, x)


@walked
def stack_of_two_copies(params, x):
    """`jnp.stack` on another axis keeps the layers apart."""
    w = params["layers"]["w"]
    both = jnp.stack([w, 2 * w], axis=1)
    return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w[0] + x @ w[1]), None), x, both)[0].sum()


@whole("used by `cumsum` outside of its scan too", "in the scan, layer by layer")
def used_outside_of_the_scan(params, x):
    w = params["layers"]["w"]
    return scan(x, w).sum() + jnp.sum(jnp.cumsum(w, 0) ** 2)


@whole("two scans of it depend on each other", "concatenate the inputs .* its own parameters")
def scanned_twice(params, x):
    w = params["layers"]["w"]
    return scan(scan(x, w), w).sum()


@whole("two scans of it read .* in another order", "the same layers in the same order")
def scanned_in_both_directions(params, x):
    w = params["layers"]["w"]
    return (scan(x, w) + jax.lax.scan(layer, x, w, reverse=True)[0]).sum()


@whole("two scans of it have different layer axes", "along the same axis")
def scanned_along_two_axes(params, x):
    w = params["layers"]["w"]
    rows = jax.lax.scan(lambda x, w: (jnp.tanh(x + w.sum()), None), x, w.swapaxes(0, 1))[0]
    return (scan(x, w) + rows).sum()


@whole("its layer scan is inside `cond`", "move the layer scan out of it")
def in_cond(params, x):
    run = lambda x: scan(x, params["layers"]["w"])  # noqa: E731
    return jax.lax.cond(x.sum() > 0, run, lambda x: x, x).sum()


@whole("its layer scan is inside `cond`", "move the layer scan out of it")
def in_cond_inside_jit(params, x):
    return jax.jit(in_cond)(params, x)


@whole("its layer scan is inside `cond`", "move the layer scan out of it")
def cast_before_cond(params, x):
    w = params["layers"]["w"].astype(jnp.bfloat16)
    run = lambda x: scan(x, w.astype(jnp.float32))  # noqa: E731
    return jax.lax.cond(x.sum() > 0, run, lambda x: x, x).sum()


@whole(
    "inside another loop, `scan`, and this needs accumulation over the outer loop",
    "move the layer scan out of the loop",
)
def in_an_outer_scan(params, x):
    run = lambda x, _: (scan(x, params["layers"]["w"]), None)  # noqa: E731
    return jax.lax.scan(run, x, None, length=2)[0].sum()


@whole(r"inside `custom_vjp_call` \(run\)", "move the layer scan out of it")
def in_a_custom_vjp(params, x):
    @jax.custom_vjp
    def run(w, x):
        return scan(x, w)

    def backward(inputs, cotangent):
        return jax.vjp(lambda w, x: scan(x, w), *inputs)[1](cotangent)

    run.defvjp(lambda w, x: (run(w, x), (w, x)), backward)
    return run(params["layers"]["w"], x).sum()


@whole(r"through `custom_jvp_call` \(quantise\)", "to one layer, in the scanned function")
def custom_derivative_on_the_stack(params, x):
    @jax.custom_jvp
    def quantise(w):
        return jnp.round(8 * w) / 8

    quantise.defjvp(lambda primals, tangents: (quantise(*primals), *tangents))
    return scan(x, quantise(params["layers"]["w"])).sum()


@whole("through `reshape`, which changes the layer axis", r"the shape that the scan reads")
def layers_of_several_matrices(params, x):
    w = jnp.concatenate([params["layers"]["w"]] * 2, axis=1).reshape(2 * L, D, D)
    return scan(x, w).sum()


@whole("its scan reads layers 0 to 1 only", "keep the other layers in a parameter of their own")
def half_a_stack(params, x):
    return scan(x, params["layers"]["w"][: L // 2]).sum()


@whole("a Python loop indexes its layers", "with jax.lax.scan")
def python_loop(params, x):
    w = params["layers"]["w"].astype(jnp.float32)
    for i in range(L):
        x, _ = layer(x, w[i])
    return x.sum()


@whole("in an order that is not that of the loop's counter", "in the order in which they are used")
def in_another_order(params, x):
    order = jnp.array([2, 0, 3, 1])
    return jax.lax.scan(lambda x, i: layer(x, params["layers"]["w"][i]), x, order)[0].sum()


def params_of(loss):
    shape = {"transposed_stack": (D, D, L)}.get(loss.__name__, (L, D, D))
    return {"layers": {"w": normal(0, *shape)}, "out": normal(1, D)}


def with_output(loss):
    """The loss, and a small dense parameter."""
    return lambda params, x: loss(params, x) + params["out"].sum()


@pytest.mark.parametrize("name", WALKED)
def test_what_is_walked_layer_by_layer(name, assert_steps_agree):
    loss = WALKED[name]
    loss, params, x = with_output(loss), params_of(loss), normal(2, B, D)
    tolerance = 2e-2 if "cast" in name else 1e-5
    assert_steps_agree(loss, optax.sgd(0.1), params, [x, 2 * x], tolerance=tolerance)
    for make_step in (lomo_jax.fused_step, lomo_jax.reference_step):
        explanation = make_step(loss, optax.sgd(0.1)).explain(params, x)
        assert not explanation.whole_stacks
        assert [piece.walked for piece in explanation.pieces if piece.walked] == [("layers/w",)]
        assert [piece.layers for piece in explanation.pieces if piece.walked] == [L]


@pytest.mark.parametrize("name", WHOLE)
def test_a_stack_that_gets_a_whole_gradient(name, assert_steps_agree):
    loss, reason, remedy = WHOLE[name]
    loss, params, x = with_output(loss), params_of(loss), normal(2, B, D)
    message = rf"^layers/w: the whole gradient, .* MiB, exists at once: .*{reason}[^;]*; .*{remedy}"
    with pytest.warns(UserWarning, match=message) as caught:
        assert_steps_agree(loss, optax.sgd(0.1), params, [x, 2 * x])
    assert len(caught) == 1  # `init` of the fused step alone
    assert "\n" not in str(caught[0].message)
    for make_step in (lomo_jax.fused_step, lomo_jax.reference_step):
        explanation = make_step(loss, optax.sgd(0.1)).explain(params, x)
        (found,) = explanation.whole_stacks
        assert (found.parameters, found.of) == (("layers/w",), "gradient")
        assert found.mib == L * D * D * 4 / 2**20
        assert explanation.gradient_mib >= found.mib
        assert str(caught[0].message) == str(found)


def test_a_list_of_layers_stacked_in_the_loss():
    def loss(params, x):
        return scan(x, jnp.stack(params["layers"])).sum()

    params = {"layers": [normal(i, D, D) for i in range(8)]}
    step = lomo_jax.fused_step(loss, optax.sgd(0.1))
    message = r"layers/0, .* and 3 more: .* list of layers .*; pass the layers stacked"
    with pytest.warns(UserWarning, match=message) as caught:
        step.init(params, jnp.ones((B, D)))
    assert len(caught) == 1


def test_noise_for_the_whole_stack():
    def noisy(params, batch):
        w = params["layers"]
        return scan(batch["x"], w + 0.1 * jax.random.normal(batch["key"], w.shape)).sum()

    def noise_of_a_layer(x, scanned):
        w, rate, key = scanned
        return layer(x, w + rate * jax.random.normal(key, w.shape))

    def noisy_by_layer(params, batch):
        keys = jax.random.split(batch["key"], L)
        xs = params["layers"], jnp.linspace(0.1, 0.2, L), keys
        return jax.lax.scan(noise_of_a_layer, batch["x"], xs)[0].sum()

    params = {"layers": normal(0, L, D, D)}
    batch = {"x": jnp.ones((B, D)), "key": jax.random.key(0)}
    message = r"MiB are computed for all layers at once before the scan of layers, .*random.*split"
    with pytest.warns(UserWarning, match=message):
        lomo_jax.fused_step(noisy, optax.sgd(0.1)).init(params, batch)
    lomo_jax.fused_step(noisy_by_layer, optax.sgd(0.1)).init(params, batch)


def test_a_mask_in_the_batch_is_no_value_for_the_stack():
    loss = lambda params, batch: scan(batch["x"], params["w"] * batch["mask"]).sum()  # noqa: E731
    batch = {"x": jnp.ones((B, D)), "mask": jnp.ones((L, D, D))}
    lomo_jax.fused_step(loss, optax.sgd(0.1)).init({"w": normal(0, L, D, D)}, batch)


def test_a_copy_that_is_stopped():
    """The gradient of a target network is zero; only its optimizer needs memory."""

    def loss(params, x):
        target = jax.lax.stop_gradient(scan(x, params["target"]))
        return jnp.sum((scan(x, params["layers"]) - target) ** 2)

    params, x = {"layers": normal(0, L, D, D), "target": normal(1, L, D, D)}, jnp.ones((B, D))
    step = lomo_jax.fused_step(loss, optax.sgd(0.1))
    step.init(params, x)
    (found,) = step.explain(params, x).whole_stacks
    assert found.of == "zeros"
    assert str(found).startswith("target: its gradient is zero: ")
    assert str(found).endswith("stop_gradient, if at all; freeze it with trainable=")
    trainable = {"layers": True, "target": False}
    frozen = lomo_jax.fused_step(loss, optax.sgd(0.1), trainable=trainable)
    assert not frozen.explain(params, x).whole_stacks


def test_dense_parameters_and_small_stacks_do_not_warn():
    def loss(params, x):
        x = scan(x @ params["in"], params["layers"])
        chunks = params["head"].reshape(-1, 4, D)  # a scan over chunks of a matrix
        total, _ = jax.lax.scan(lambda t, w: (t + jnp.exp(x @ w.T).sum(), None), 0.0, chunks)
        heads = jnp.einsum("bd,dhk->bhk", x, params["heads"])
        return total + heads.sum() + sum(params["gains"][i].sum() for i in range(2))

    params = {
        "in": normal(0, 64, D),
        "head": normal(1, 64, D),
        "heads": normal(2, D, 8, 8),
        "layers": normal(3, L, D, D),
        "gains": normal(4, 2, 1, 3),  # indexed in Python, and too small to matter
    }
    step = lomo_jax.fused_step(loss, optax.sgd(0.1))
    step.init(params, jnp.ones((B, 64)))
    (small,) = step.explain(params, jnp.ones((B, 64))).whole_stacks
    assert small.parameters == ("gains",)


def tied(params, x):
    """An embedding used before and after the layers, and a gain that all layers share."""
    run = lambda x, w: (jnp.tanh(x @ w) * params["gain"], None)  # noqa: E731
    x, _ = jax.lax.scan(run, x @ params["embedding"], params["layers"])
    return jnp.sum((x @ params["embedding"].T).astype(jnp.float32) ** 2) + params["head"].sum()


def test_gradients_that_exist_together():
    bfloat16 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.bfloat16)  # noqa: E731
    params = {
        "embedding": bfloat16(1024, 512),
        "gain": bfloat16(512),
        "head": jax.ShapeDtypeStruct((512, 512), jnp.float32),
        "layers": bfloat16(8, 512, 512),
    }
    step = lomo_jax.fused_step(tied, lomo_jax.lomo(0.1))
    first, layers, last = step.explain(params, bfloat16(B, 1024)).pieces
    assert (first.layers, layers.layers, last.layers) == (None, 8, None)
    # Summed over two uses: float32.
    assert (first.whole, first.whole_mib, first.held) == (("embedding",), 2.0, ())
    assert (layers.walked, layers.layer_mib) == (("layers",), 0.5)
    # Summed over the layers: float32. One part of the embedding's: bfloat16.
    assert (layers.whole, layers.whole_mib) == (("gain",), 512 * 4 / 2**20)
    assert (layers.held, layers.held_mib) == (("embedding",), 1.0)
    assert (last.whole, last.whole_mib, last.held_mib) == (("head",), 1.0, 1.0)

    sums = lomo_jax.fused_step(tied, lomo_jax.lomo(0.1), microbatches=2)
    _, layers, last = sums.explain(params, bfloat16(B, 1024)).pieces
    assert (layers.layer_mib, last.whole_mib, last.held_mib) == (1.0, 1.0, 2.0)


def test_what_it_prints():
    params = {
        "embedding": normal(0, 1024, 512),
        "gain": jnp.ones(512),
        "head": normal(1, 512, 512),
        "layers": normal(2, 8, 512, 512),
    }
    text = str(lomo_jax.fused_step(tied, lomo_jax.lomo(0.1)).explain(params, jnp.ones((B, 1024))))
    assert text == "\n".join(
        [
            "piece                gradient  parameters",
            "dense                   2 MiB  embedding",
            "scan of 8 layers        1 MiB  one layer of layers",
            "                  0.00195 MiB  gain",
            "                        2 MiB  still, for an earlier piece: embedding",
            "dense                   1 MiB  head",
            "                        2 MiB  still, for an earlier piece: embedding",
            "At most 3 MiB of gradient exist together; the trainable parameters are 11 MiB.",
        ]
    )


def test_long_lists_are_wrapped():
    params = {f"w{i:02}": normal(i, 1, 3, 3) for i in range(40)}

    def loss(params, x):
        def layer(x, ws):
            return sum(x @ w for w in ws.values()), None

        return jax.lax.scan(layer, x, params)[0].sum()

    text = str(lomo_jax.fused_step(loss, lomo_jax.lomo(0.1)).explain(params, jnp.ones((B, 3))))
    assert all(name in text for name in params)
    assert max(map(len, text.splitlines())) <= 100
