"""Every shape of model that the fused step takes, against the plain computation.

With `optax.sgd(1.0)` the new parameters are the old ones less the gradient, so a wrong gradient of
any of them shows.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

L, B, T, D, F, V = 4, 2, 3, 6, 8, 11


def normal(seed, *shape, scale=0.4):
    return jnp.asarray(scale * np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def stack(seed=0, length=L):
    return {"up": normal(seed, length, D, F), "down": normal(seed + 1, length, F, D)}


def block(x, w):
    return x + jnp.tanh(x @ w["up"]) @ w["down"]


def squared(x):
    return jnp.mean(jnp.square(x))


def inputs(seed=7):
    return normal(seed, B, T, D, scale=1.0)


SHAPES = {}


def shape(make):
    """Registers a shape: a function that returns (loss_fn, params, batch)."""
    SHAPES[make.__name__] = make
    return make


@shape
def plain_scan():
    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x @ params["in"], params["layers"])
        return squared(x @ params["out"])

    params = {"in": normal(2, D, D), "layers": stack(), "out": normal(3, D, D)}
    return loss, params, inputs()


@shape
def loss_is_the_carry():
    def loss(params, x):
        def layer(total, w):
            return total + squared(jnp.tanh(x @ w)), None

        return jax.lax.scan(layer, 0.0, params)[0]

    return loss, normal(0, L, D, D), inputs()


@shape
def jit_around_everything():
    loss, params, batch = plain_scan()
    return jax.jit(jax.jit(loss)), params, batch


@shape
def jit_called_twice():
    """The same inner jaxpr stands twice in the loss, so its variables must not be mixed up."""

    @jax.jit
    def run(x, layers):
        return jax.lax.scan(lambda x, w: (block(x, w), None), x, layers)[0]

    def loss(params, x):
        return squared(run(run(x, params["first"]) * params["scale"], params["second"]))

    params = {"first": stack(0), "second": stack(5), "scale": jnp.float32(1.5)}
    return loss, params, inputs()


@shape
def checkpoint_around_the_body():
    def loss(params, x):
        body = jax.checkpoint(lambda x, w: (block(x, w), None))
        return squared(jax.lax.scan(body, x, params)[0])

    return loss, stack(), inputs()


@shape
def checkpoint_policy_inside_the_body():
    def loss(params, x):
        half = jax.checkpoint(
            lambda x, w: jnp.tanh(x @ w), policy=jax.checkpoint_policies.dots_saveable
        )
        body = lambda x, w: (x + half(x, w["up"]) @ w["down"], None)  # noqa: E731
        return squared(jax.lax.scan(body, x, params)[0])

    return loss, stack(), inputs()


@shape
def checkpoint_around_the_scan():
    @jax.checkpoint
    def run(params, x):
        return jax.lax.scan(lambda x, w: (block(x, w), None), x @ params["in"], params["layers"])[0]

    def loss(params, x):
        return squared(run(params, x))

    return loss, {"in": normal(2, D, D), "layers": stack()}, inputs()


@shape
def outputs_of_each_layer():
    def loss(params, x):
        def layer(x, w):
            x = block(x, w)
            return x, (x.mean(), jnp.argmax(x, -1), jnp.sum(w["up"] ** 2))

        x, (means, winners, norms) = jax.lax.scan(layer, x, params)
        used = winners[0].astype(jnp.float32).mean()
        return squared(x) + jnp.sum(jnp.arange(1.0, L + 1) * means**2) + used * 0.1 * norms[1]

    return loss, stack(), inputs()


@shape
def outputs_only():
    def loss(params, x):
        _, ys = jax.lax.scan(lambda x, w: (x, squared(x @ w)), x, params)
        return ys.sum()

    return loss, normal(0, L, D, D), inputs()


@shape
def scanned_inputs_that_are_no_parameters():
    def loss(params, batch):
        def layer(x, scanned):
            w, flag, key, gain = scanned
            dropped = x * jax.random.bernoulli(key, 0.7, x.shape).astype(x.dtype)
            return jnp.where(flag, gain * block(dropped, w), x + 1.0), None

        flags = jnp.array([True, False, True, True])
        keys = jax.random.split(batch["key"], L)
        xs = (params, flags, keys, batch["gain"])
        return squared(jax.lax.scan(layer, batch["x"], xs)[0])

    batch = {"x": inputs(), "key": jax.random.key(3), "gain": jnp.linspace(0.5, 2.0, L)}
    return loss, stack(), batch


@shape
def several_carries():
    def loss(params, x):
        def layer(carry, w):
            x, i, (memory, scale), key = carry
            key, sub = jax.random.split(key)
            noise = jax.random.normal(sub, x.shape)
            x = block(x + 0.1 * noise, w) * scale + 0.1 * i.astype(x.dtype)
            return (x, i + 1, (memory + x.mean(0), scale), key), None

        carry = (x, jnp.int32(0), (jnp.zeros((T, D)), params["scale"]), jax.random.key(0))
        (x, i, (memory, _), _), _ = jax.lax.scan(layer, carry, params["layers"])
        return squared(x) + squared(memory) * i.astype(jnp.float32)

    return loss, {"layers": stack(), "scale": jnp.float32(0.7)}, inputs()


@shape
def reverse():
    def loss(params, x):
        body = lambda x, w: (block(x, w), x.mean())  # noqa: E731
        x, means = jax.lax.scan(body, x, params, reverse=True)
        return squared(x) + jnp.sum(means * jnp.arange(1.0, L + 1))

    return loss, stack(), inputs()


@shape
def unroll():
    def loss(params, x):
        return squared(jax.lax.scan(lambda x, w: (block(x, w), None), x, params, unroll=3)[0])

    return loss, stack(), inputs()


@shape
def weights_shared_by_all_layers():
    def loss(params, x):
        def layer(x, w):
            return block(x, w) @ params["shared"], None

        return squared(jax.lax.scan(layer, x, params["layers"])[0])

    return loss, {"layers": stack(), "shared": normal(3, D, D)}, inputs()


@shape
def shared_weights_used_outside_too():
    def loss(params, x):
        def layer(x, w):
            return block(x, w) @ params["shared"], None

        x, _ = jax.lax.scan(layer, x @ params["shared"], params["layers"])
        return squared(x @ params["shared"])

    return loss, {"layers": stack(), "shared": normal(3, D, D)}, inputs()


@shape
def custom_vjp_in_the_body():
    @jax.custom_vjp
    def clipped(x):
        return x

    # Twice the true gradient: a step that differentiated `clipped` itself would be off.
    clipped.defvjp(lambda x: (x, None), lambda _, g: (2.0 * g,))

    def loss(params, x):
        return squared(jax.lax.scan(lambda x, w: (clipped(block(x, w)), None), x, params)[0])

    return loss, stack(), inputs()


@shape
def custom_jvp_in_the_body():
    def loss(params, x):
        body = lambda x, w: (x + jax.nn.relu(x @ w["up"]) @ w["down"], None)  # noqa: E731
        return squared(jax.lax.scan(body, x, params)[0])

    return loss, stack(), inputs()


@shape
def stacks_scanned_in_another_order_than_the_tree_has():
    def loss(params, x):
        body = lambda x, w: (x + jnp.tanh(x @ w[0]) @ w[1], None)  # noqa: E731
        return squared(jax.lax.scan(body, x, (params["b"], params["a"]))[0])

    return loss, {"a": normal(0, L, D, D), "b": normal(1, L, D, D)}, inputs()


@shape
def derivative_of_what_the_value_ignores():
    """A load-balancing loss whose gradient is attached to activations that it does not change."""

    @jax.custom_vjp
    def attach(x, extra):
        return x

    attach.defvjp(lambda x, extra: (x, None), lambda _, g: (g, jnp.ones(())))

    @jax.custom_jvp
    def zero(w):
        return jnp.zeros(())

    zero.defjvp(lambda primals, tangents: (jnp.zeros(()), tangents[0].sum()))

    def loss(params, x):
        x = attach(x, jnp.sum(params["router"] ** 2))
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])
        return squared(x) + zero(params["free"])

    params = {"router": normal(2, D), "layers": stack(), "free": normal(3, D)}
    return loss, params, inputs()


@shape
def stack_used_by_what_nobody_needs():
    def loss(params, x):
        _ = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        _ = jax.lax.scan(lambda x, w: (x @ w["up"] @ w["down"], None), x, params)
        return squared(jax.lax.scan(lambda x, w: (block(x, w), None), x, params)[0])

    return loss, stack(), inputs()


@shape
def encoder_and_decoder():
    def loss(params, batch):
        def encode(x, w):
            return block(x, w), None

        memory, _ = jax.lax.scan(encode, batch["source"] @ params["in"], params["encoder"])
        memory = memory * params["gain"]

        def decode(x, w):
            return block(x + jax.nn.softmax(x @ memory.mT) @ memory, w), None

        y, _ = jax.lax.scan(decode, batch["target"] @ params["in"], params["decoder"])
        return squared(y @ params["out"])

    params = {
        "in": normal(2, D, D),
        "encoder": stack(0),
        "gain": normal(4, D),
        "decoder": stack(5, length=3),
        "out": normal(3, D, D),
    }
    return loss, params, {"source": inputs(7), "target": inputs(8)}


@shape
def skips_between_two_stacks():
    """The second scan consumes what the first put out, as a U-Net does."""

    def loss(params, x):
        down = lambda x, w: (block(x, w), x)  # noqa: E731
        x, skips = jax.lax.scan(down, x, params["down"])
        up = lambda x, ws: (block(x + ws[1], ws[0]), None)  # noqa: E731
        return squared(jax.lax.scan(up, x, (params["up"], skips), reverse=True)[0])

    return loss, {"down": stack(0), "up": stack(5)}, inputs()


@shape
def tied_embedding():
    def loss(params, tokens):
        x = params["embedding"][tokens]
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])
        logits = jax.nn.log_softmax(x @ params["embedding"].T)
        return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1).mean()

    tokens = jax.random.randint(jax.random.key(1), (B, T), 0, V)
    return loss, {"embedding": normal(2, V, D), "layers": stack()}, tokens


@shape
def nested_stacks():
    """Groups of layers: a group is one layer to the fused step."""

    def loss(params, x):
        def group(x, ws):
            return jax.lax.scan(lambda x, w: (block(x, w), None), x, ws)[0], None

        return squared(jax.lax.scan(group, x, params)[0])

    flat = stack(length=6)
    return loss, jax.tree.map(lambda w: w.reshape(3, 2, *w.shape[1:]), flat), inputs()


@shape
def chunks_of_a_matrix():
    """A scan over chunks of a dense parameter is not a layer scan: the parameter is one matrix."""

    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (block(x, w), None), x, params["layers"])

        def chunk(total, w):
            return total + jnp.exp(x @ w.T).sum(), None

        return jnp.log(jax.lax.scan(chunk, 0.0, params["head"].reshape(D, -1, D))[0])

    return loss, {"layers": stack(), "head": normal(3, 2 * D, D)}, inputs()


@shape
def scan_over_time():
    """A scan whose parameters are constants: an ordinary piece, as in a recurrent network."""

    def loss(params, x):
        def cell(h, x_t):
            return jnp.tanh(x_t @ params["in"] + h @ params["state"]), None

        return squared(jax.lax.scan(cell, jnp.zeros((B, D)), x.swapaxes(0, 1))[0])

    return loss, {"in": normal(0, D, D), "state": normal(1, D, D)}, inputs()


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


@pytest.mark.parametrize("name", SHAPES)
def test_gradient(name, assert_steps_agree, assert_close):
    loss, params, batch = SHAPES[name]()
    (new, _), _ = assert_steps_agree(loss, optax.sgd(1.0), params, [batch])
    # The reference shares code with the fused step; the gradient itself does not.
    is_float = lambda x: jnp.issubdtype(x.dtype, jnp.inexact)  # noqa: E731
    descent = jax.tree.map(
        lambda p, g: p - g if is_float(p) else p,
        params,
        jax.grad(loss, allow_int=True)(params, batch),
    )
    assert_close(new, descent)


@pytest.mark.parametrize(
    "name",
    [
        "plain_scan",
        "reverse",
        "shared_weights_used_outside_too",
        "encoder_and_decoder",
        "tied_embedding",
        "parameters_that_are_not_used_or_not_floating",
        "dead_stack",
        "nnx_in_a_jax_scan",
    ],
)
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
    """What is printed takes no gradient."""

    def loss(params, x):
        jax.debug.print("norm {}", jnp.sum(params["up"] ** 2))
        return squared(jax.lax.scan(lambda x, w: (block(x, w), None), x, params)[0])

    assert_steps_agree(loss, optax.sgd(1.0), stack(), [inputs()])
    jax.effects_barrier()
    assert "norm" in capfd.readouterr().out


def test_loss_captures_a_traced_value():
    """The loss may close over what an outer jit computed."""
    import lomo_jax

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
