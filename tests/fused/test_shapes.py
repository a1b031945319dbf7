"""The gradient of losses of every structure, against `jax.value_and_grad`.

With a learning rate of 1 the first step of SGD subtracts the gradient. `shapes.py` has losses in
plain JAX; Flax modules and odd cases are here.
"""

import contextlib
import functools

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import linen, nnx
from helpers import before_release, quick_jit
from shapes import SHAPES, D, F, L, block, inputs, normal, shape, squared, stack

import lomo_jax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device


@shape
def unscanned():
    def loss(params, x):
        for w in params["layers"]:
            x = block(x, w)
        return squared(x)

    layers = [jax.tree.map(lambda w, i=i: w[i], stack()) for i in range(L)]
    return loss, {"layers": layers}, inputs()


@shape
def parameters_that_are_not_used_or_not_floating():
    """An unused one has a zero gradient; an integer one is left as it is."""

    def loss(params, x):
        layers = (params["layers"], params["levels"])
        body = lambda x, w: (block(x, w[0]) * w[1].astype(x.dtype), None)  # noqa: E731
        return squared(jax.lax.scan(body, x, layers)[0])

    params = {"layers": stack(), "unused": normal(3, D), "levels": jnp.array([1, 2, 1, 1])}
    return loss, params, inputs()


@shape
def dead_stack():
    """A stack that the loss does not depend on is updated with a zero gradient."""

    def loss(params, x):
        dead, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["dead"])
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])
        return squared(x) + 0.0 * jax.lax.stop_gradient(dead).mean()

    return loss, {"layers": stack(), "dead": stack(5)}, inputs()


@shape
def linen_scan_and_remat():
    class Block(linen.Module):
        @linen.compact
        def __call__(self, x, _):
            h = linen.Dense(F)(linen.LayerNorm()(x))
            h = linen.Dropout(0.3, deterministic=False)(h)
            return x + linen.Dense(D)(jnp.tanh(h)), None

    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            x = linen.Dense(D)(x)
            layers = linen.scan(
                linen.remat(Block, prevent_cse=False),
                variable_axes={"params": 0},
                split_rngs={"params": True, "dropout": True},
                length=L,
            )
            x, _ = layers()(x, None)
            return linen.Dense(D)(x)

    model = Model()

    def loss(params, batch):
        return squared(model.apply(params, batch["x"], rngs={"dropout": batch["key"]}))

    keys = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    params = model.init(keys, inputs())
    return loss, params, {"x": inputs(), "key": jax.random.key(2)}


class NnxBlock(nnx.Module):
    def __init__(self, rngs):
        self.norm = nnx.RMSNorm(D, rngs=rngs)
        self.up = nnx.Linear(D, F, rngs=rngs)
        self.down = nnx.Linear(F, D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(self.norm(x))))


class NnxModel(nnx.Module):
    def __init__(self, rngs):
        @nnx.vmap(in_axes=0, out_axes=0)
        def make(key):
            return NnxBlock(nnx.Rngs(key))

        self.layers = make(jax.random.split(rngs.params(), L))
        self.out = nnx.Linear(D, D, rngs=rngs)


def nnx_model(run):
    graphdef, params = nnx.split(NnxModel(nnx.Rngs(0)))

    def loss(params, x):
        model = nnx.merge(graphdef, params)
        return squared(model.out(run(model.layers, x)))

    return loss, params, inputs()


@shape
def nnx_scan():
    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    return nnx_model(run)


@shape
def nnx_in_a_jax_scan():
    @functools.partial(jax.jit)
    def run(layers, x):
        return jax.lax.scan(lambda x, layer: (layer(x), None), x, layers)[0]

    return nnx_model(run)


UNSCANNED = ("unscanned", "scan_over_time")  # shapes without a layer scan


@functools.cache
def expected(name):
    """Returns the loss, and the parameters less the gradient, as JAX computes them."""
    loss, params, batch = SHAPES[name]()
    value, grads = quick_jit(jax.value_and_grad(loss, allow_int=True))(params, batch)
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    return value, jax.tree.map(lambda p, g: p - g if is_float(p) else p, params, grads)


UPDATED = [
    "plain_scan",
    "reverse",
    "shared_weights_used_outside_too",
    "encoder_and_decoder",
    "tied_embedding",
    "parameters_that_are_not_used_or_not_floating",
    "dead_stack",
    "nnx_in_a_jax_scan",
]


def check_gradient(name, make_step, assert_close, **options):
    loss, params, batch = SHAPES[name]()
    step = make_step(loss, optax.sgd(1.0, momentum=0.9), **options)
    on_host = options.get("offload") is not None
    params = jax.device_put(params, HOST if on_host else DEVICE)
    warns = make_step is lomo_jax.fused_step and name in UNSCANNED
    with pytest.warns(UserWarning, match="layer scan") if warns else contextlib.nullcontext():
        state = step.init(params, batch)
    new, new_state, out = quick_jit(step)(params, state, batch)
    kinds = {x.sharding.memory_kind for x in jax.tree.leaves((new, new_state.optimizer))}
    assert kinds == {"pinned_host" if on_host else "device"}
    assert_close((out.loss, jax.device_put(new, DEVICE)), expected(name))


@pytest.mark.parametrize("name", SHAPES)
def test_gradient(name, assert_close):
    check_gradient(name, lomo_jax.fused_step, assert_close)


@pytest.mark.parametrize("name", [n if n in UPDATED else before_release(n) for n in SHAPES])
def test_gradient_from_host_memory_and_saved_residuals(name, assert_close):
    offload = lomo_jax.Offload(params=True, activations=True, state=True)
    check_gradient(name, lomo_jax.fused_step, assert_close, offload=offload, remat="none")


@pytest.mark.slow
@pytest.mark.parametrize("name", [n if n in UPDATED else before_release(n) for n in SHAPES])
def test_gradient_of_the_reference(name, assert_close):
    check_gradient(name, lomo_jax.reference_step, assert_close)


@pytest.mark.parametrize("name", UPDATED)
def test_update(name, assert_steps_agree, standard_promotion):
    loss, params, batch = SHAPES[name]()
    tx = optax.adamw(0.01, weight_decay=0.1)
    assert_steps_agree(loss, tx, params, [batch, batch], tolerance=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("name", ["plain_scan", "tied_embedding", "weights_shared_by_all_layers"])
def test_dtypes(name, dtype, assert_steps_agree):
    loss, params, batch = SHAPES[name]()
    cast = lambda x: x.astype(dtype) if x.dtype == jnp.float32 else x  # noqa: E731
    params, batch = jax.tree.map(cast, (params, batch))
    # Two roundings of the coarsest format apart, of the largest element.
    tolerance = 1e-5 if dtype == "float32" else 2 * float(jnp.finfo(dtype).eps)
    (new, _), _ = assert_steps_agree(loss, optax.sgd(1.0), params, [batch], tolerance=tolerance)
    assert {x.dtype for x in jax.tree.leaves(new)} == {jnp.dtype(dtype)}


def test_aux(assert_steps_agree):
    def loss(params, x):
        layers = lambda x, w: (block(x, w), x.mean())  # noqa: E731
        x, means = jax.lax.scan(layers, x @ params["in"], params["layers"])
        norms = [jnp.linalg.norm(w) for w in params["layers"].values()]
        aux = {"means": means, "count": 3, "inner": (x, params["in"]), "norms": norms, "no": None}
        return squared(x), aux

    params = {"in": normal(2, D, D), "layers": stack()}
    _, out = assert_steps_agree(loss, optax.sgd(1.0), params, [inputs()], has_aux=True)
    assert out.aux["count"] == 3
    assert out.aux["no"] is None
    assert out.aux["inner"][1].shape == (D, D)


def test_prints_of_a_stack(assert_steps_agree, capfd):
    """A use of the stack for printing needs no gradient."""

    def loss(params, x):
        jax.debug.print("norm {}", jnp.sum(params["up"] ** 2))
        return squared(jax.lax.scan(lambda x, w: (block(x, w), None), x, params)[0])

    assert_steps_agree(loss, optax.sgd(1.0), stack(), [inputs()])
    jax.effects_barrier()
    assert "norm" in capfd.readouterr().out


def test_loss_captures_a_traced_value():
    """The loss may close over values computed in an outer jit."""

    def run(step_maker, params, x, gain):
        def loss(params, x):
            body = lambda x, w: (gain * block(x, w), None)  # noqa: E731
            return squared(jax.lax.scan(body, x, params)[0])

        step = step_maker(loss, optax.sgd(1.0))
        return step(params, step.init(params, x), x)[0]

    results = [
        jax.jit(functools.partial(run, maker))(stack(), inputs(), jnp.float32(1.3))
        for maker in (lomo_jax.fused_step, lomo_jax.reference_step)
    ]
    for fused, reference in zip(*map(jax.tree.leaves, results), strict=True):
        assert jnp.allclose(fused, reference, atol=1e-6)
        assert not jnp.allclose(fused, 0)
