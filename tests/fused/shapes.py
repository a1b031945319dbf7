"""Small losses in plain JAX whose layers are scanned, each with another structure."""

import jax
import jax.numpy as jnp
from helpers import normal

L, B, T, D, F, V = 4, 2, 3, 6, 8, 11


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
    """The second scan consumes the outputs of the first, as in a U-Net."""

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
    """Stages of layers: a scan in a scan."""

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
