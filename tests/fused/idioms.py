"""Losses as people write them: what they do to a stack of layers on its way to the scan.

Each says which axis of a parameter has its layers, so that a test can apply an optimizer layer by
layer by hand, and which parameters the fused step must walk layer by layer.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen, nnx
from helpers import normal
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec


class Sizes(NamedTuple):
    """L layers, B examples of T tokens, of width D, with F hidden units."""

    L: int = 4
    B: int = 4
    T: int = 3
    D: int = 6
    F: int = 8


class Idiom(NamedTuple):
    """A loss, and how the fused step must treat its parameters."""

    make: Callable[[Sizes], tuple[Any, Any, Any]]  # -> (loss_fn, params, batch)
    axes: dict[str, int | tuple[int, ...]]  # prefix of a name -> axis of layers; {} has none
    walked: Callable[[str], bool]  # whether a parameter is updated layer by layer
    options: dict[str, Any]  # of the step


IDIOMS: dict[str, Idiom] = {}
NO_LAYERS: dict[str, Idiom] = {}  # must not be taken for layers


def layer_axis(axes, name):
    """Returns the axis of the layers of a parameter; None if it is no stack."""
    prefixes = [p for p in axes if name == p or name.startswith(f"{p}/") or not p]
    return axes[max(prefixes, key=len)] if prefixes else None


def idiom(axes=None, *, walked=None, registry=IDIOMS, **options):
    """Registers a loss.

    Args:
      axes: the layer axis of each parameter, by prefix of its name. By default "layers" has axis 0.
      walked: whether a parameter is walked layer by layer; by default those that have layers.
      registry: where to.
      options: of the step.
    """
    axes = {"layers": 0} if axes is None else axes
    walked = walked or (lambda name: layer_axis(axes, name) is not None)

    def register(make):
        registry[make.__name__] = Idiom(make, axes, walked, options)
        return make

    return register


def stack(s, seed=0):
    scale = (1 + normal(seed + 2, s.L, s.D, scale=0.1)).astype(jnp.float32)
    return {
        "up": normal(seed, s.L, s.D, s.F, scale=s.D**-0.5),
        "down": normal(seed + 1, s.L, s.F, s.D, scale=s.F**-0.5),
        "scale": scale,
    }


def layers_and_out(s):
    return {"layers": stack(s), "out": normal(9, s.D, s.D)}


def pair(s):
    return {k: normal(i, s.B, s.T, s.D, scale=1.0) for i, k in enumerate("xy", 7)}


def block(x, w):
    return x + jnp.tanh(x * w["scale"] @ w["up"]) @ w["down"]


def scan(layers, x, body=block, **kwargs):
    return jax.lax.scan(lambda x, w: (body(x, w), None), x, layers, **kwargs)[0]


def error(a, b):
    return jnp.mean(jnp.square(a.astype(jnp.float32) - b))


def mapped(change, *, out=True, **kwargs):
    """Returns the maker of a loss that scans ``change(layers, batch)``."""

    def make(s):
        def loss(p, b):
            y = scan(change(p["layers"], b), b["x"], **kwargs)
            return error(y @ p["out"] if out else y, b["y"])

        return loss, layers_and_out(s), pair(s)

    return make


# What people do to the stack first.


@idiom()
def cast_to_bfloat16(s):
    def loss(p, b):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        return error(scan(p["layers"], b["x"].astype(jnp.bfloat16)) @ p["out"], b["y"])

    return loss, layers_and_out(s), pair(s)


@idiom()
def cast_and_mask_and_transpose(s):
    """Weights [L, F, D] of which half are kept, as torch has them, cast and used transposed."""
    kept = np.random.default_rng(3).random((s.L, s.F, s.D)) > 0.3

    def loss(p, b):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p["layers"])
        up = jnp.where(kept, half["up"].mT, jnp.bfloat16(0)).mT
        y = scan({**half, "up": up}, b["x"].astype(jnp.bfloat16))
        return error(y @ p["out"].astype(jnp.bfloat16), b["y"])

    return loss, layers_and_out(s), pair(s)


@idiom()
def constant_mask(s):
    kept = (np.random.default_rng(3).random((s.L, s.D, s.F)) > 0.5).astype(np.float32)
    return mapped(lambda w, _: {**w, "up": w["up"] * kept})(s)


@idiom()
def mask_of_the_batch(s):
    loss, params, batch = mapped(lambda w, b: {**w, "up": w["up"] * b["kept"]})(s)
    kept = np.random.default_rng(3).random((s.L, s.D, s.F)) > 0.5
    return loss, params, {**batch, "kept": jnp.asarray(kept, jnp.float32)}


@idiom()
def mask_of_the_examples(s):
    """Every example has the mask, so that a microbatch has it too."""
    loss, params, batch = mapped(lambda w, b: {**w, "up": w["up"] * b["kept"][0]})(s)
    kept = np.random.default_rng(3).random((s.L, s.D, s.F)) > 0.5
    kept = jnp.broadcast_to(jnp.asarray(kept, jnp.float32), (s.B, *kept.shape))
    return loss, params, {**batch, "kept": kept}


@idiom()
def magnitude_pruning(s):
    """The threshold is data; the quantile is of each layer."""

    def prune(w, b):
        small = jnp.abs(w["up"]) < b["quantile"] * jnp.abs(w["up"]).max((1, 2), keepdims=True)
        return {**w, "up": jnp.where(small, 0.0, w["up"])}

    loss, params, batch = mapped(prune)(s)
    return loss, params, {**batch, "quantile": jnp.float32(0.3)}


@idiom()
def causal_mask(s):
    """`jnp.tril` of a square matrix of each layer."""
    loss = mapped(lambda w, _: jnp.tril(w), body=lambda x, w: x + jnp.tanh(x @ w))(s)[0]
    return loss, {"layers": normal(0, s.L, s.D, s.D), "out": normal(9, s.D, s.D)}, pair(s)


@idiom()
def mask_of_iota(s):
    def band(w, _):
        row, column = (jax.lax.broadcasted_iota(jnp.int32, w["up"].shape, a) for a in (1, 2))
        depth = 1 + 0.1 * jax.lax.broadcasted_iota(jnp.float32, w["up"].shape, 0)
        up = w["up"] * jax.lax.broadcasted_iota(jnp.float32, w["up"].shape, 2) / depth
        return {**w, "up": jnp.where(abs(row - column) < 4, up, 0.0)}

    return mapped(band)(s)


@idiom()
def different_scale_of_each_layer(s):
    """Layer i is divided by the square root of i + 1, and has a gain of its own in the batch."""
    loss, params, batch = mapped(
        lambda w, b: {
            **w,
            "down": w["down"]
            / jnp.sqrt(jnp.arange(1.0, s.L + 1))[:, None, None]
            * b["gain"].mean(0)[:, None, None],
        }
    )(s)
    return loss, params, {**batch, "gain": normal(5, s.B, s.L, scale=0.1) + 1.0}


@idiom({"layers": 0, "log_gain": 0})
def gain_of_each_layer_is_trained(s):
    def loss(p, b):
        up = p["layers"]["up"] * jnp.exp(p["log_gain"])[:, None, None]
        return error(scan({**p["layers"], "up": up}, b["x"]) @ p["out"], b["y"])

    return loss, {**layers_and_out(s), "log_gain": normal(5, s.L)}, pair(s)


@idiom()
def gain_shared_by_all_layers(s):
    """A dense parameter is broadcast into the stack before the scan."""

    def loss(p, b):
        layers = {**p["layers"], "up": p["layers"]["up"] * p["gain"] + p["shift"][:, None]}
        return error(scan(layers, b["x"]) @ p["out"], b["y"])

    params = {"gain": 1 + normal(4, s.F), "shift": normal(5, s.D, scale=0.1)}
    return loss, {**layers_and_out(s), **params}, pair(s)


@idiom()
def weight_normalisation(s):
    return mapped(
        lambda w, _: {**w, "up": w["up"] / jnp.linalg.norm(w["up"], axis=1, keepdims=True)}
    )(s)


@idiom()
def weight_standardisation(s):
    def standardise(w, _):
        flat = w["up"].reshape(s.L, -1)
        flat = (flat - flat.mean(1, keepdims=True)) / (flat.std(1, keepdims=True) + 1e-3)
        return {**w, "up": flat.reshape(w["up"].shape)}

    return mapped(standardise)(s)


@idiom()
def softmax_on_the_stack(s):
    return mapped(lambda w, _: {**w, "up": jax.nn.softmax(w["up"], axis=1)})(s)


@idiom()
def straight_through(s):
    def quantise(w):
        return w + jax.lax.stop_gradient(jnp.round(w * 16) / 16 - w)

    return mapped(lambda w, _: jax.tree.map(quantise, w))(s)


@idiom()
def quantised_by_blocks(s):
    """Absolute maximum of blocks of 2 x D, as in int8 fine-tuning, through `reshape`."""

    def quantise(w):
        blocks = w.reshape(s.L, -1, 2 * s.D)
        scale = jnp.max(jnp.abs(blocks), -1, keepdims=True) / 127
        rounded = (jnp.round(blocks / scale) * scale).reshape(w.shape)
        return w + jax.lax.stop_gradient(rounded - w)

    return mapped(lambda w, _: {**w, "up": quantise(w["up"])})(s)


@idiom()
def constraints_and_names_and_copies(s):
    mesh = jax.make_mesh((1,), ("data",), (AxisType.Auto,), devices=jax.devices()[:1])

    def constrain(w, _):
        w = jax.tree.map(jnp.copy, w)
        spec = NamedSharding(mesh, PartitionSpec())
        w = jax.lax.with_sharding_constraint(w, jax.tree.map(lambda _: spec, w))
        return {**w, "up": checkpoint_name(w["up"], "weights")}

    return mapped(constrain)(s)


@idiom()
def cast_in_a_jit(s):
    cast = jax.jit(lambda w: jax.tree.map(lambda a: a.astype(jnp.bfloat16), w))

    def loss(p, b):
        y = scan(cast(p["layers"]), b["x"].astype(jnp.bfloat16))
        return error(y.astype(jnp.float32) @ p["out"], b["y"])

    return loss, layers_and_out(s), pair(s)


@idiom()
def cast_in_a_checkpoint(s):
    cast = jax.checkpoint(lambda w: jax.tree.map(lambda a: a.astype(jnp.bfloat16), w))

    def loss(p, b):
        y = scan(cast(p["layers"]), b["x"].astype(jnp.bfloat16))
        return error(y.astype(jnp.float32) @ p["out"], b["y"])

    return loss, layers_and_out(s), pair(s)


@idiom()
def map_over_layers_first(s):
    """`jax.lax.map` prepares each layer before the scan."""

    def prepare(w):
        return {**w, "up": w["up"] / jnp.sqrt(jnp.sum(w["up"] ** 2) + 1.0)}

    return mapped(lambda w, _: jax.lax.map(prepare, w))(s)


@idiom()
def vmap_over_layers_first(s):
    def prepare(w, gain):
        return {**w, "up": gain * w["up"] @ (w["down"] @ w["up"])}

    return mapped(lambda w, _: jax.vmap(prepare)(w, jnp.arange(1.0, s.L + 1)))(s)


@idiom({"": 0})
def query_key_value_concatenated(s):
    def loss(p, b):
        def layer(x, w):
            q, k, v = jnp.split(x @ w["qkv"], 3, -1)
            return x + jax.nn.softmax(q @ k.mT) @ v @ w["o"]

        qkv = jnp.concatenate([p["q"], p["k"], p["v"]], -1)
        return error(scan({"qkv": qkv, "o": p["o"]}, b["x"], layer), b["y"])

    return loss, {k: normal(i, s.L, s.D, s.D) for i, k in enumerate("qkvo")}, pair(s)


@idiom({"": 0})
def query_key_value_split(s):
    """The way back: one parameter is cut into three, and padded to the width."""

    def loss(p, b):
        q, k, v = jnp.split(p["qkv"], 3, -1)
        o = jnp.pad(p["o"], ((0, 0), (0, 0), (0, s.D // 2)))

        def layer(x, w):
            q, k, v, o = w
            return x + jax.nn.softmax((x @ q) @ (x @ k).mT) @ (x @ v) @ o

        return error(scan((q, k, v, o), b["x"], layer), b["y"])

    params = {"qkv": normal(0, s.L, s.D, 3 * s.D), "o": normal(1, s.L, s.D, s.D - s.D // 2)}
    return loss, params, pair(s)


@idiom({"lora": 0}, trainable=lambda name: name.startswith("lora"))
def lora_merged(s):
    """Only the adapters are trained; the base is frozen by `trainable`."""

    def loss(p, b):
        merged = {**p["base"], "up": p["base"]["up"] + 2.0 * p["lora"]["a"] @ p["lora"]["b"]}
        return error(scan(merged, b["x"]), b["y"])

    lora = {"a": normal(4, s.L, s.D, 2), "b": normal(5, s.L, 2, s.F)}
    return loss, {"base": stack(s), "lora": lora}, pair(s)


@idiom({"lora": 0, "base": 0})
def lora_on_a_stopped_base(s):
    """The base is frozen by `stop_gradient`: each layer is updated with a gradient of zero."""

    def loss(p, b):
        base = jax.lax.stop_gradient(p["base"])
        merged = {
            **base,
            "up": base["up"] + jnp.einsum("ldr,lrf->ldf", p["lora"]["a"], p["lora"]["b"]),
        }
        return error(scan(merged, b["x"]), b["y"])

    return loss, *lora_merged(s)[1:]


@idiom()
def one_leaf_stopped(s):
    return mapped(lambda w, _: {**w, "up": jax.lax.stop_gradient(w["up"])})(s)


@idiom({"layers": 0, "heads": 0})
def factored_weights(s):
    """Kronecker-like factors [L, H, D] and [L, H, F] make the matrix of each layer."""

    def loss(p, b):
        up = p["layers"]["up"] + jnp.einsum("lhd,lhf->ldf", p["heads"]["in"], p["heads"]["out"])
        return error(scan({**p["layers"], "up": up}, b["x"]), b["y"])

    heads = {"in": normal(4, s.L, 2, s.D), "out": normal(5, s.L, 2, s.F)}
    return loss, {"layers": stack(s), "heads": heads}, pair(s)


# Where the layers are.


def move(tree, source, destination):
    return jax.tree.map(lambda w: jnp.moveaxis(w, source, destination), tree)


@idiom({"layers": 1})
def axis_1(s):
    loss, params, batch = mapped(lambda w, _: move(w, 1, 0))(s)
    return loss, {**params, "layers": move(params["layers"], 0, 1)}, batch


@idiom({"layers/up": 2, "layers/down": 2, "layers/scale": 1})
def last_axis(s):
    loss, params, batch = mapped(lambda w, _: move(w, -1, 0))(s)
    return loss, {**params, "layers": move(params["layers"], 0, -1)}, batch


@idiom({"layers/up": 1, "layers/down": 0, "layers/scale": 0})
def axes_1_and_0(s):
    loss, params, batch = mapped(lambda w, _: {**w, "up": w["up"].swapaxes(0, 1)})(s)
    layers = {**params["layers"], "up": params["layers"]["up"].swapaxes(0, 1)}
    return loss, {**params, "layers": layers}, batch


@idiom({"layers": 1})
def axis_1_cast(s):
    half = lambda w: jnp.moveaxis(w.astype(jnp.bfloat16), 1, 0) * jnp.bfloat16(0.5)  # noqa: E731

    def loss(p, b):
        y = scan(jax.tree.map(half, p["layers"]), b["x"].astype(jnp.bfloat16))
        return error(y.astype(jnp.float32) @ p["out"], b["y"])

    params = layers_and_out(s)
    return loss, {**params, "layers": move(params["layers"], 0, 1)}, pair(s)


@idiom({"": 1})
def axis_1_indexed(s):
    def loss(p, b):
        def body(i, x):
            take = lambda w: jax.lax.dynamic_index_in_dim(w, i, 1, keepdims=False)  # noqa: E731
            return block(x, jax.tree.map(take, p))

        return error(jax.lax.fori_loop(0, s.L, body, b["x"]), b["y"])

    return loss, move(stack(s), 0, 1), pair(s)


@idiom({"": 1})
def axis_1_cast_and_indexed(s):
    def loss(p, b):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)

        def body(i, x):
            take = lambda w: jax.lax.dynamic_index_in_dim(w, i, 1, keepdims=False)  # noqa: E731
            return block(x, jax.tree.map(take, half))

        y = jax.lax.fori_loop(0, s.L, body, b["x"].astype(jnp.bfloat16))
        return error(y, b["y"])

    return loss, move(stack(s), 0, 1), pair(s)


class _Block(linen.Module):
    """A layer whose parameters have names of logical axes, as in MaxText."""

    s: Sizes

    @linen.compact
    def __call__(self, x, _):
        def dense(width, *axes):
            init = linen.with_logical_partitioning(linen.initializers.lecun_normal(), axes)
            return linen.Dense(width, use_bias=False, kernel_init=init)

        h = linen.RMSNorm()(x)
        h = jnp.tanh(dense(self.s.F, "embed", "mlp")(h))
        return x + dense(self.s.D, "mlp", "embed")(h), None


def linen_model(s, axis, unbox):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                linen.remat(_Block, prevent_cse=False),
                variable_axes={"params": axis},
                split_rngs={"params": True},
                in_axes=linen.broadcast,
                length=s.L,
                metadata_params={linen.PARTITION_NAME: "layers"},
            )
            x, _ = layers(s, name="layers")(x, None)
            return linen.Dense(s.D, name="out")(x)

    model, batch = Model(), pair(s)
    params = model.init(jax.random.key(0), batch["x"])["params"]
    loss = lambda p, b: error(model.apply({"params": p}, b["x"]), b["y"])  # noqa: E731
    return loss, linen.meta.unbox(params) if unbox else params, batch


@idiom({"layers": 1})
def linen_axis_1_boxed(s):
    return linen_model(s, 1, unbox=False)


@idiom({"layers": 0})
def linen_axis_0(s):
    return linen_model(s, 0, unbox=True)


class _NnxBlock(nnx.Module):
    def __init__(self, s, rngs):
        self.up = nnx.Linear(s.D, s.F, rngs=rngs)
        self.down = nnx.Linear(s.F, s.D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@idiom({"layers": 0})
def nnx_cast(s):
    """The state of an nnx model is cast as one tree."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            keys = jax.random.split(rngs.params(), s.L)
            self.layers = nnx.vmap(lambda key: _NnxBlock(s, nnx.Rngs(key)))(keys)
            self.out = nnx.Linear(s.D, s.D, rngs=rngs)

    graphdef, params = nnx.split(Model(nnx.Rngs(0)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    def loss(p, b):
        model = nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.bfloat16), p))
        return error(model.out(run(model.layers, b["x"].astype(jnp.bfloat16))), b["y"])

    return loss, params, pair(s)


# Loops by index.


def indexed(loop):
    """Returns the maker of a loss; ``loop(layers, x, L)`` runs the layers."""

    def make(s):
        loss = lambda p, b: error(loop(p["layers"], b["x"], s.L) @ p["out"], b["y"])  # noqa: E731
        return loss, layers_and_out(s), pair(s)

    return make


@idiom()
def fori_loop(s):
    def loop(layers, x, length):
        def body(i, x):
            take = lambda w: jax.lax.dynamic_index_in_dim(w, i, 0, keepdims=False)  # noqa: E731
            return block(x, jax.tree.map(take, layers))

        return jax.lax.fori_loop(0, length, body, x)

    return indexed(loop)(s)


@idiom()
def fori_loop_with_brackets(s):
    def loop(layers, x, length):
        body = lambda i, x: block(x, jax.tree.map(lambda w: w[i], layers))  # noqa: E731
        return jax.lax.fori_loop(0, length, body, x)

    return indexed(loop)(s)


@idiom()
def fori_loop_with_take(s):
    def loop(layers, x, length):
        def body(i, x):
            return block(x, jax.tree.map(lambda w: jnp.take(w, i, axis=0), layers))

        return jax.lax.fori_loop(0, length, body, x)

    return indexed(loop)(s)


@idiom()
def fori_loop_of_a_cast_stack(s):
    def loop(layers, x, length):
        layers = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layers)
        body = lambda i, x: block(x, jax.tree.map(lambda w: w[i], layers))  # noqa: E731
        y = jax.lax.fori_loop(0, length, jax.checkpoint(body), x.astype(jnp.bfloat16))
        return y.astype(jnp.float32)

    return indexed(loop)(s)


@idiom()
def scan_over_arange(s):
    def loop(layers, x, length):
        body = lambda x, i: (block(x, jax.tree.map(lambda w: w[i], layers)), None)  # noqa: E731
        return jax.lax.scan(body, x, jnp.arange(length))[0]

    return indexed(loop)(s)


@idiom()
def reverse_scan_over_arange(s):
    def loop(layers, x, length):
        body = lambda x, i: (block(x, jax.tree.map(lambda w: w[i], layers)), None)  # noqa: E731
        return jax.lax.scan(body, x, jnp.arange(length), reverse=True)[0]

    return indexed(loop)(s)


@idiom()
def reverse_scan_of_a_cast_stack(s):
    return mapped(lambda w, _: jax.tree.map(lambda a: 2.0 * a, w), reverse=True)(s)


@idiom()
def counter_in_the_carry(s):
    def loop(layers, x, length):
        def body(carry, _):
            i, x = carry
            return (i + 1, block(x, jax.tree.map(lambda w: w[i], layers))), None

        return jax.lax.scan(body, (0, x), None, length)[0][1]

    return indexed(loop)(s)


@idiom()
def loops_from_a_layer_on(s):
    """The first layer by a scan of a slice, the rest by a loop that starts at layer 1."""

    def loop(layers, x, length):
        x = scan(jax.tree.map(lambda w: w[:1], layers), x)
        body = lambda i, x: block(x, jax.tree.map(lambda w: w[i], layers))  # noqa: E731
        return jax.lax.fori_loop(1, length, body, x)

    return indexed(loop)(s)


@idiom({"layers": 0})
def layer_stack(s):
    """As haiku's and AlphaFold's `layer_stack`: parameters by path, a counter, keys of layers."""

    def loss(p, b):
        def layer(carry, scanned):
            (x, i), (w, key) = carry, scanned
            noise = 0.01 * jax.random.normal(key, x.shape)
            return (block(x + noise, w), i + 1), None

        stacked = {k.removeprefix("layer_stack/"): w for k, w in p["layers"].items()}
        keys = jax.random.split(jax.random.key(3), s.L)
        body = jax.checkpoint(layer)
        (x, count), _ = jax.lax.scan(body, (b["x"], jnp.int32(0)), (stacked, keys))
        return error(x @ p["out"] / count.astype(x.dtype), b["y"])

    params = layers_and_out(s)
    layers = {f"layer_stack/{k}": w for k, w in params["layers"].items()}
    return loss, {**params, "layers": layers}, pair(s)


# Several scans of one stack.


def ranges(*ends, bodies=None):
    """Returns the maker of a loss that scans layers in ranges that end at these."""

    def make(s):
        def loss(p, b):
            x, start, total = b["x"], 0, 0.0
            for k, end in enumerate((*ends, s.L)):
                w = jax.tree.map(lambda w, a=start, z=end: w[a:z], p["layers"])
                x, start = scan(w, x, block if bodies is None else bodies[k]), end
                total += 0.1 * error(x, b["y"])
            return total + error(x @ p["out"], b["y"])

        return loss, layers_and_out(s), pair(s)

    return make


def other_block(x, w):
    return x - 0.5 * jnp.sin(x @ w["up"]) @ w["down"] * w["scale"]


@idiom()
def two_ranges(s):
    return ranges(s.L // 2)(s)


@idiom()
def two_ranges_of_different_kinds(s):
    return ranges(1, bodies=(other_block, block))(s)


@idiom()
def three_ranges(s):
    return ranges(1, s.L - 1)(s)


@idiom({"layers": 1})
def two_ranges_of_axis_1_cast(s):
    def loss(p, b):
        layers = jax.tree.map(lambda w: jnp.moveaxis(w.astype(jnp.bfloat16), 1, 0), p["layers"])
        x = scan(jax.tree.map(lambda w: w[:1], layers), b["x"].astype(jnp.bfloat16))
        x = scan(jax.tree.map(lambda w: w[1:], layers), x, other_block)
        return error(x.astype(jnp.float32) @ p["out"], b["y"])

    params = layers_and_out(s)
    return loss, {**params, "layers": move(params["layers"], 0, 1)}, pair(s)


def preferences(call):
    """Returns the maker of a DPO loss: ``call(layers, x)`` scores both answers."""

    def make(s):
        def loss(p, b):
            chosen, rejected = (jnp.sum(call(p["layers"], b[k]) @ p["out"], (1, 2)) for k in "xy")
            return -jnp.mean(jax.nn.log_sigmoid(0.1 * (chosen - rejected)))

        return loss, layers_and_out(s), pair(s)

    return make


@idiom()
def two_calls(s):
    return preferences(scan)(s)


@idiom()
def two_calls_with_remat(s):
    return preferences(jax.checkpoint(scan))(s)


@idiom()
def two_calls_of_a_jit(s):
    return preferences(jax.jit(scan))(s)


@idiom()
def two_calls_of_a_cast_stack(s):
    def call(layers, x):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), layers)
        return scan(half, x.astype(jnp.bfloat16)).astype(jnp.float32)

    return preferences(call)(s)


@idiom()
def three_calls(s):
    def loss(p, b):
        a, b, c = (scan(p["layers"], x) for x in (b["x"], b["y"], b["x"] + b["y"]))
        return error(a @ p["out"], b) + error(c, a)

    return loss, layers_and_out(s), pair(s)


@idiom({"policy": 0}, trainable=lambda name: not name.startswith("reference"))
def preferences_against_a_reference(s):
    """DPO: two calls of the policy, two of a frozen reference in the same tree."""

    def loss(p, b):
        def margin(layers):
            return jnp.sum(scan(layers, b["x"]) - scan(layers, b["y"]), (1, 2))

        change = margin(p["policy"]) - jax.lax.stop_gradient(margin(p["reference"]))
        return -jnp.mean(jax.nn.log_sigmoid(0.1 * change))

    return loss, {"policy": stack(s), "reference": stack(s, 4)}, pair(s)


@idiom()
def target_of_the_same_weights(s):
    def loss(p, b):
        target = jax.lax.stop_gradient(scan(p["layers"], b["y"]))
        return error(scan(p["layers"], b["x"]) @ p["out"], target)

    return loss, layers_and_out(s), pair(s)


@idiom()
def target_that_is_a_moving_average(s):
    """The slow weights are in the batch, and a step of the average is made in the loss."""

    def loss(p, b):
        slow = jax.tree.map(
            lambda e, w: 0.9 * e[0] + 0.1 * jax.lax.stop_gradient(w), b["slow"], p["layers"]
        )
        return error(scan(p["layers"], b["x"]) @ p["out"], scan(slow, b["x"]))

    slow = jax.tree.map(lambda w: jnp.broadcast_to(w, (s.B, *w.shape)), stack(s, 4))
    return loss, layers_and_out(s), {**pair(s), "slow": slow}


# Sums over all parameters.


@idiom()
def penalty(s):
    def loss(p, b):
        squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
        return error(scan(p["layers"], b["x"]) @ p["out"], b["y"]) + 1e-2 * squares

    return loss, layers_and_out(s), pair(s)


@idiom()
def penalty_of_the_cast_weights(s):
    def loss(p, b):
        p = jax.tree.map(lambda w: w.astype(jnp.bfloat16).astype(jnp.float32), p)
        squares = sum(jnp.sum(jnp.square(w)) for w in jax.tree.leaves(p))
        absolute = sum(jnp.abs(w).sum() for w in jax.tree.leaves(p["layers"]))
        return error(scan(p["layers"], b["x"]) @ p["out"], b["y"]) + 1e-3 * (squares + absolute)

    return loss, layers_and_out(s), pair(s)


@idiom()
def penalty_with_two_ranges(s):
    def loss(p, b):
        plain, _, _ = two_ranges(s)
        return plain(p, b) + 1e-2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p))

    return loss, layers_and_out(s), pair(s)


@idiom()
def penalty_with_two_calls(s):
    def loss(p, b):
        plain, _, _ = two_calls(s)
        return plain(p, b) + 1e-2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p))

    return loss, layers_and_out(s), pair(s)


@idiom({"layers": 1})
def penalty_of_axis_1(s):
    def loss(p, b):
        plain, _, _ = axis_1(s)
        return plain(p, b) + 1e-2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p))

    return loss, *axis_1(s)[1:]


@idiom()
def distance_from_the_start(s):
    """L2-SP: the penalty is the distance from the weights before training."""
    start = jax.tree.map(lambda w: np.asarray(w) * 0.9, layers_and_out(s))

    def loss(p, b):
        squares = jax.tree.map(lambda w, z: jnp.sum((w - z) ** 2), p, start)
        plain = error(scan(p["layers"], b["x"]) @ p["out"], b["y"])
        return plain + 1e-2 * sum(jax.tree.leaves(squares))

    return loss, layers_and_out(s), pair(s)


@idiom(has_aux=True)
def penalty_and_norm(s):
    def loss(p, b):
        squares = sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
        plain = error(scan(p["layers"], b["x"]) @ p["out"], b["y"])
        return plain + 1e-2 * squares, {"norm": jnp.sqrt(squares)}

    return loss, layers_and_out(s), pair(s)


@idiom(has_aux=True)
def norms_of_the_layers(s):
    """What is logged needs no gradient, whichever layers it is of."""

    def loss(p, b):
        aux = {k: jnp.sqrt(jnp.sum(w**2, tuple(range(1, w.ndim)))) for k, w in p["layers"].items()}
        aux["largest"] = jnp.max(jnp.abs(p["layers"]["up"]))
        return error(scan(p["layers"], b["x"]) @ p["out"], b["y"]), aux

    return loss, layers_and_out(s), pair(s)


# What looks like layers and is not.


@idiom({}, registry=NO_LAYERS)
def positions_in_a_recurrent_network(s):
    """The embeddings of the positions are one parameter, though time is scanned."""

    def loss(p, b):
        x = (b["x"] + p["positions"]).swapaxes(0, 1)
        cell = lambda h, x: jnp.tanh(x @ p["in"] + h @ p["state"])  # noqa: E731
        return error(scan(x, jnp.zeros((s.B, s.D)), cell), b["y"][:, 0])

    params = {"positions": normal(2, s.T, s.D), "in": normal(0, s.D, s.D)}
    return loss, {**params, "state": normal(1, s.D, s.D)}, pair(s)


@idiom({}, registry=NO_LAYERS)
def positions_with_an_axis_for_the_batch(s):
    """As in BERT: [1, T, D]."""
    loss, params, batch = positions_in_a_recurrent_network(s)
    return loss, {**params, "positions": params["positions"][None]}, batch


@idiom({}, registry=NO_LAYERS)
def chunks_of_the_head(s):
    def loss(p, b):
        logits = lambda total, w: total + jnp.exp(b["x"] @ w).sum(-1)  # noqa: E731
        chunks = p["head"].reshape(s.D, 2, -1).swapaxes(0, 1)
        return jnp.mean(jnp.log(scan(chunks, jnp.zeros((s.B, s.T)), logits)))

    return loss, {"head": normal(0, s.D, 2 * s.F), "unused": normal(1, 2)}, pair(s)


@idiom({}, registry=NO_LAYERS)
def activations_of_a_sequence(s):
    """A scan over time of what the weights made of the inputs."""

    def loss(p, b):
        x = jnp.tanh(b["x"] @ p["in"] * p["scale"]).swapaxes(0, 1)
        decay = jax.nn.sigmoid(p["decay"])
        cell = lambda h, x: decay * h + (1 - decay) * x  # noqa: E731
        return error(scan(x, jnp.zeros((s.B, s.D)), cell) @ p["out"], b["y"][:, 0])

    params = {"in": normal(0, s.D, s.D), "scale": normal(1, s.D), "decay": normal(2, s.D)}
    return loss, {**params, "out": normal(3, s.D, s.D)}, pair(s)


@idiom({}, registry=NO_LAYERS)
def embedding_of_a_sequence(s):
    """A scan over tokens whose embeddings are taken from the table first."""

    def loss(p, b):
        x = p["table"][b["tokens"]].swapaxes(0, 1)
        cell = lambda h, x: jnp.tanh(x + h @ p["state"])  # noqa: E731
        return error(scan(x, jnp.zeros((s.B, s.D)), cell), b["y"][:, 0])

    tokens = jnp.asarray(np.random.default_rng(4).integers(0, 7, (s.B, s.T)), jnp.int32)
    params = {"table": normal(0, 7, s.D), "state": normal(1, s.D, s.D)}
    return loss, params, {**pair(s), "tokens": tokens}
