"""Sums over all parameters."""

import jax
import jax.numpy as jnp
import numpy as np

from .axes import axis_1
from .registry import (
    error,
    idiom,
    layers_and_out,
    pair,
    scan,
)
from .several import two_calls, two_ranges


def with_penalty(made):
    """Adds the sum of the squares of all parameters to the loss of an idiom."""
    plain, params, batch = made

    def loss(p, b):
        return plain(p, b) + 1e-2 * sum(jnp.sum(w**2) for w in jax.tree.leaves(p))

    return loss, params, batch


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
    return with_penalty(two_ranges(s))


@idiom()
def penalty_with_two_calls(s):
    return with_penalty(two_calls(s))


@idiom({"layers": 1})
def penalty_of_axis_1(s):
    return with_penalty(axis_1(s))


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
