"""Several scans of one stack."""

import jax
import jax.numpy as jnp

from .axes import move
from .registry import (
    block,
    error,
    idiom,
    layers_and_out,
    pair,
    scan,
    stack,
)


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
