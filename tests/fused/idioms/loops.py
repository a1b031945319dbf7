"""Loops by index."""

import jax
import jax.numpy as jnp

from .registry import (
    block,
    error,
    idiom,
    layers_and_out,
    mapped,
    pair,
    scan,
)


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
