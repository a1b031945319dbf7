"""What people do to a stack before they scan it."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import normal
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from .registry import (
    error,
    idiom,
    layers_and_out,
    mapped,
    pair,
    scan,
    stack,
)


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
