"""What looks like layers and is not."""

import jax
import jax.numpy as jnp
import numpy as np
from helpers import normal

from .registry import (
    NO_LAYERS,
    error,
    idiom,
    pair,
    scan,
)


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
