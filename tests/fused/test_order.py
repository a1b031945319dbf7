"""Gradients are used one after the other, and little memory is held between them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import lomo_jax
from lomo_jax.fused.order import divide, trace_layer
from lomo_jax.fused.pipeline import Layer, evaluate

B, D, F = 4, 8, 64
SHAPES = {"norm": (D,), "up": (D, F), "down": (F, D)}


def gated(w, x):
    """A layer whose elementwise part leaves several values for the backward pass."""
    hidden = (x * w["norm"]) @ w["up"]
    return jnp.tanh(jax.nn.silu(hidden) * jnp.exp(-hidden)) @ w["down"]


def gradients(inputs, x, ct):
    names = sorted(SHAPES)
    y, vjp = jax.vjp(lambda *w: gated(dict(zip(names, w, strict=True)), x), *inputs)
    return vjp(ct), y


@pytest.fixture
def values():
    keys = iter(jax.random.split(jax.random.key(0), 5))
    inputs = [jax.random.normal(next(keys), SHAPES[name]) for name in sorted(SHAPES)]
    return inputs, jax.random.normal(next(keys), (B, D)), jax.random.normal(next(keys), (B, D))


class Halving(Layer):
    """Halves each input when its gradient comes; logs reads and updates."""

    def __init__(self):
        self.log = []

    def read(self, carry, k):
        assert k not in (used for kind, ks in self.log if kind == "use" for used in ks)
        self.log.append(("read", [k]))
        return carry[0][k]

    def use(self, carry, ks, grads, params, states):
        self.log.append(("use", list(ks)))
        held, total = carry
        total = {**total, **dict(zip(map(str, ks), grads, strict=True))}
        return (held, total), [0.5 * held[k] for k in ks]

    def write(self, carry, ks, news):
        held, total = carry
        return [dict(zip(ks, news, strict=True)).get(k, x) for k, x in enumerate(held)], total


def run(inputs, x, ct, **options):
    layer = Halving()
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs]
    steps = divide(trace_layer(gradients, shapes, (x, ct)), **options)
    y, (held, grads), _ = evaluate(steps, (x, ct), layer, (inputs, {}), [])
    return y, held, [grads[str(k)] for k in range(len(inputs))], layer.log


@pytest.mark.parametrize("all_at_once", [False, True])
def test_the_results_are_the_same(values, all_at_once, assert_close):
    inputs, x, ct = values
    expected, expected_y = gradients(inputs, x, ct)
    y, held, grads, _ = run(inputs, x, ct, all_at_once=all_at_once)
    assert_close((y, grads), (expected_y, list(expected)))
    assert_close(held, [0.5 * v for v in inputs])


def test_gradients_are_used_one_by_one_from_the_last_parameter_to_the_first(values):
    *_, log = run(*values)
    down, norm, up = range(3)  # in the order of their names
    assert [ks for kind, ks in log if kind == "use"] == [[down], [up], [norm]]
    # Only the cotangent of x needs `down`; its own gradient does not.
    assert [ks for kind, ks in log if kind == "read"].count([down]) == 1


def test_all_at_once_uses_all_gradients_in_one_call(values):
    *_, log = run(*values, all_at_once=True)
    assert [sorted(ks) for kind, ks in log if kind == "use"] == [[0, 1, 2]]


class Summing(Layer):
    """Adds up all gradients."""

    def __init__(self, inputs):
        self.inputs = inputs

    def read(self, carry, k):
        return self.inputs[k]

    def use(self, carry, ks, grads, params, states):
        nothing, total = carry
        return (nothing, total + sum(g.sum() for g in grads)), None

    def write(self, carry, ks, news):
        return carry


def total(function, inputs, x, ct):
    shapes = [jax.ShapeDtypeStruct(v.shape, v.dtype) for v in inputs]
    steps = divide(trace_layer(function, shapes, (x, ct)))
    nothing = [None] * len(inputs)
    return evaluate(steps, (x, ct), Summing(inputs), (nothing, jnp.float32(0)), [])


def barriers(values):
    """Returns the barriers of a program whose carry is one number."""
    eqns = jax.make_jaxpr(lambda *args: total(gradients, *args))(*values).eqns
    return [e for e in eqns if e.primitive.name == "optimization_barrier"]


def test_little_crosses_a_barrier(values):
    sizes = [sum(np.prod(v.aval.shape) for v in e.invars) for e in barriers(values)]
    # One or two of the dozen elementwise values [B, F] cross; the others are [B, D] or smaller.
    assert len(sizes) >= 3
    assert max(sizes) <= 2 * B * F + 3 * B * D + 1
    assert sizes[-1] <= 3 * B * D + 1


def test_matrix_products_are_computed_once(values):
    def products(jaxpr):
        own = sum(e.primitive.name == "dot_general" for e in jaxpr.eqns)
        return own + sum(
            products(v.jaxpr if hasattr(v, "jaxpr") else v)
            for e in jaxpr.eqns
            for v in e.params.values()
            if hasattr(v, "eqns") or hasattr(v, "jaxpr")
        )

    inputs, x, ct = values
    plain = jax.make_jaxpr(gradients)(inputs, x, ct)
    ordered = jax.make_jaxpr(lambda *args: run(*args)[:3])(inputs, x, ct)
    assert products(ordered.jaxpr) == products(plain.jaxpr)


def test_effects_happen_once(values):
    seen = []

    def noisy(inputs, x, ct):
        jax.debug.callback(lambda v: seen.append(float(v)), x[0, 0])
        return gradients(inputs, x, ct)

    inputs, x, ct = values
    _, (_, found), _ = jax.jit(lambda inputs: total(noisy, inputs, x, ct))(inputs)
    found.block_until_ready()
    jax.effects_barrier()
    assert seen == [float(x[0, 0])]


@pytest.mark.parametrize(("clip_norm", "passes"), [(None, 1), (1.0, 2)])
def test_each_pass_traces_the_backward_pass_of_a_layer_once(clip_norm, passes):
    """Tracing a layer of a large model takes seconds, on each platform that JAX lowers it for."""
    traced = []

    @jax.custom_vjp
    def layer(x, w):
        return jnp.tanh(x @ w)

    def forward(x, w):
        return layer(x, w), (x, w)

    def backward(saved, cotangent):
        traced.append(cotangent)
        x, w = saved
        cotangent *= 1 - jnp.tanh(x @ w) ** 2
        return cotangent @ w.T, x.T @ cotangent

    layer.defvjp(forward, backward)

    def loss(params, x):
        return jax.lax.scan(lambda x, w: (layer(x, w), None), x, params["layers"])[0].sum()

    params, x = {"layers": jnp.ones((3, 4, 4))}, jnp.ones((2, 4))
    step = lomo_jax.fused_step(loss, lomo_jax.adalomo(1e-3), clip_norm=clip_norm)
    state = step.init(params, x)
    assert not traced
    jax.jit(step).lower(params, state, x)
    assert len(traced) == passes
