"""Stacks of stacks, and groups of the layers of a stack."""

import jax
import jax.numpy as jnp
from helpers import normal

from .registry import error, idiom, layers_and_out, pair, scan
from .sums import with_penalty


def in_stages(layers, *sizes):
    """Splits the layer axis into axes of `sizes`, and the rest."""
    return jax.tree.map(lambda w: w.reshape(*sizes, -1, *w.shape[1:]), layers)


def scan_of_scans(stages, x, body=scan):
    return jax.lax.scan(lambda x, layers: (body(layers, x), None), x, stages)[0]


@idiom({"layers": (0, 1)})
def stages(s):
    def loss(p, b):
        return error(scan_of_scans(p["layers"], b["x"]) @ p["out"], b["y"])

    params = layers_and_out(s)
    return loss, params | {"layers": in_stages(params["layers"], 2)}, pair(s)


@idiom({"layers": (0, 1, 2)})
def stages_of_stages(s):
    def loss(p, b):
        return error(scan_of_scans(p["layers"], b["x"], scan_of_scans) @ p["out"], b["y"])

    params = layers_and_out(s)
    return loss, params | {"layers": in_stages(params["layers"], 2, 1)}, pair(s)


@idiom({"layers": (0, 2)})
def stages_with_layers_on_another_axis(s):
    def loss(p, b):
        layers = jax.tree.map(lambda w: jnp.moveaxis(w, 2, 1), p["layers"])
        run = lambda x, layers: (scan(layers, x), None)  # noqa: E731
        x, _ = jax.lax.scan(run, b["x"], layers, reverse=True)
        return error(x @ p["out"], b["y"])

    params = layers_and_out(s)
    layers = jax.tree.map(lambda w: jnp.moveaxis(w, 1, 2), in_stages(params["layers"], 2))
    return loss, params | {"layers": layers}, pair(s)


@idiom({"layers": (0, 1), "stages": 0})
def stages_with_parameters_of_their_own(s):
    """A stage has a matrix, and all have one gain."""

    def loss(p, b):
        def stage(x, own):
            layers, matrix = own
            x = scan(layers, jnp.tanh(x @ matrix) * p["gain"]) * p["gain"]
            return x, x.mean()

        x, means = jax.lax.scan(stage, b["x"], (p["layers"], p["stages"]))
        return error(x @ p["out"], b["y"]) + 0.1 * jnp.sum(means * jnp.arange(2.0))

    params = layers_and_out(s)
    own = {"stages": normal(3, 2, s.D, s.D), "gain": 1 + normal(4, s.D, scale=0.1)}
    return loss, params | {"layers": in_stages(params["layers"], 2)} | own, pair(s)


@idiom({"layers": (0, 1)})
def penalty_of_stages(s):
    return with_penalty(stages(s))


@idiom()
def groups(s):
    """Inputs of groups of layers are saved; those of the layers in a group are computed again."""

    def loss(p, b):
        run = jax.checkpoint(scan)
        return error(scan_of_scans(in_stages(p["layers"], 2), b["x"], run) @ p["out"], b["y"])

    return loss, layers_and_out(s), pair(s)


@idiom()
def groups_of_a_cast_stack(s):
    def loss(p, b):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
        x = scan_of_scans(in_stages(half["layers"], 2), b["x"].astype(jnp.bfloat16))
        return error(x @ half["out"], b["y"])

    return loss, layers_and_out(s), pair(s)
