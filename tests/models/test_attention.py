"""Attention in blocks, and in a kernel, against whole matrices of scores."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import quick_jit
from small_models import CONFIG

from lomo_jax import models
from lomo_jax.models import attention
from lomo_jax.models.attention import Scores, Visible

RNG = np.random.default_rng(0)
LENGTH = 150  # tokens; three blocks, the last one not full


def inputs(length=LENGTH, head_dim=16):
    """Returns queries, keys and values of 4 and 2 heads, and the segments of three documents."""
    q, k, v = (
        jnp.asarray(RNG.normal(size=(2, length, heads, head_dim)), jnp.float32)
        for heads in (4, 2, 2)
    )
    lengths = [length // 3, length // 2, length - length // 3 - length // 2]
    segments_BxT = jnp.tile(jnp.repeat(jnp.array([1, 2, 0]), jnp.array(lengths)), (2, 1))
    return q, k, v, segments_BxT


def whole(q, k, v, segments_BxT, window, scores):
    """Attention by its definition, in float64."""
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    k, v = (np.repeat(x, 2, axis=2) for x in (k, v))
    s = np.einsum("bthd,bshd->bhts", q, k) * (scores.scale or q.shape[-1] ** -0.5)
    s = scores.cap * np.tanh(s / scores.cap) if scores.cap else s
    distance = np.arange(q.shape[1])[:, None] - np.arange(q.shape[1])
    mask = (distance >= 0) & (distance < (window or 10**9))
    if segments_BxT is not None:
        segments = np.asarray(segments_BxT)
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    p = np.exp(np.where(mask, s, -np.inf) - s.max(-1, keepdims=True))
    return np.einsum("bhts,bshd->bthd", p / p.sum(-1, keepdims=True), v)


CASES = {
    "plain": (False, None, Scores()),
    "packed": (True, None, Scores()),
    "window": (True, 7, Scores()),
    "scanned_window": (False, jnp.int32(7), Scores()),
    "capped": (True, None, Scores(cap=1.5)),
    "all": (True, 7, Scores(scale=0.4, cap=1.5)),
}


@pytest.mark.parametrize("case", CASES)
def test_blocks_equal_the_definition(case, monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 64)
    packed, window, scores = CASES[case]
    q, k, v, segments_BxT = inputs()
    visible = Visible(segments_BxT if packed else None, window, None)
    found = quick_jit(lambda *x: attention._in_blocks(*x, visible, scores))(q, k, v)
    expected = whole(q, k, v, visible.segments, window, scores)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradients_of_blocks_equal_those_of_whole_matrices(monkeypatch):
    monkeypatch.setattr(attention, "_BLOCK", 64)
    q, k, v, segments_BxT = inputs()
    scores = Scores(cap=1.5)
    mask = attention.and_window(attention.segment_mask(segments_BxT), LENGTH, 7)
    mask &= jnp.tril(jnp.ones((LENGTH, LENGTH), bool))

    def gradients(attend):
        loss = lambda *x: jnp.sum(jnp.sin(attend(*x)))  # noqa: E731
        return quick_jit(jax.grad(loss, argnums=(0, 1, 2)))(q, k, v)

    visible = Visible(segments_BxT, 7, None)
    found = gradients(lambda *x: attention._in_blocks(*x, visible, scores))
    expected = gradients(lambda *x: attention._capped(*x, mask, scores))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-5)


def test_the_kernel_equals_the_definition():
    q, k, v, segments_BxT = inputs(length=128)
    found = attention._flash(q, k, v, segments_BxT, Scores(), interpret=True)
    expected = whole(q, k, v, segments_BxT, None, Scores())
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("changes", [{}, {"window": 100, "sliding_layers": (True, False, True)}])
def test_long_rows_have_no_square_mask(changes):
    length = 8192
    config = dataclasses.replace(CONFIG, max_length=length, **changes)
    graphdef, params = models.abstract(config)

    def loss(params, tokens_BxT):
        return nnx.merge(graphdef, params).hidden(tokens_BxT, None, tokens_BxT).sum()

    tokens = jax.ShapeDtypeStruct((1, length), jnp.int32)
    text = str(jax.make_jaxpr(jax.grad(loss))(params, tokens))
    assert "8192" in text
    assert "8192,8192" not in text
