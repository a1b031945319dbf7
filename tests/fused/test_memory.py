"""Memory of the fused step as XLA plans it on CPU: one layer's gradient, no copy of a stack."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import quick_jit

import lomo_jax

B, T, D, F, V = 2, 32, 128, 512, 96
LAYER_INPUT = B * T * D * 4
LAYER = (2 * D * F + D) * 4

RULES = {
    "lomo": lambda: lomo_jax.lomo(1e-2, weight_decay=0.1),
    "adalomo": lambda: lomo_jax.adalomo(1e-2, weight_decay=0.1),
    "sgd": lambda: optax.sgd(1e-2, momentum=0.9),
    "adamw": lambda: optax.adamw(1e-3),
    "lion": lambda: optax.lion(1e-3),
    "adafactor": lambda: optax.adafactor(1e-2, min_dim_size_to_factor=1),
}

# The others are slow: "all" contains the other options.
QUICK = ("lomo", "adalomo", "adamw", "dynamic_layers", "all")


def loss(params, tokens):
    def layer(x, w):
        normed = w["norm"] * x * jax.lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-6)
        return x + jnp.tanh(normed @ w["up"]) @ w["down"], None

    x, _ = jax.lax.scan(jax.checkpoint(layer), params["embedding"][tokens], params["layers"])
    logits = jax.nn.log_softmax(x[:, :-1] @ params["head"])
    return -jnp.take_along_axis(logits, tokens[:, 1:, None], -1).mean()


def compiled(make_step, tx, num_layers, dtype=jnp.float32):
    shapes = {
        "embedding": (V, D),
        "layers": {
            "norm": (num_layers, D),
            "up": (num_layers, D, F),
            "down": (num_layers, F, D),
        },
        "head": (D, V),
    }
    is_shape = lambda x: isinstance(x, tuple)  # noqa: E731
    params = jax.tree.map(lambda s: jax.ShapeDtypeStruct(s, dtype), shapes, is_leaf=is_shape)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    step = make_step(loss, tx)
    state = jax.eval_shape(step.init, params, tokens)
    return quick_jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()


OPTIONS = {
    "microbatches": {"microbatches": 2},
    "clip_norm": {"clip_norm": 1.0},
    "dynamic": {"loss_scale": lomo_jax.DynamicLossScale()},
    "dynamic_layers": {"loss_scale": lomo_jax.DynamicLossScale(skip="layers")},
    "all": {
        "microbatches": 2,
        "clip_norm": 1.0,
        "loss_scale": lomo_jax.DynamicLossScale(),
        "rounding": "stochastic",
    },
}


def temporaries(executable):
    return executable.memory_analysis().temp_size_in_bytes


def copies_of_stacks(executable, num_layers):
    """Copies in the optimised HLO of anything with a leading layer axis as large as a weight."""
    pattern = rf"= \w+\[{num_layers},\d{{3,}},\d{{3,}}\]\S* copy(?:-start)?\("
    return [line for line in executable.as_text().splitlines() if re.search(pattern, line)]


def assert_one_layer_of_gradient(make_step, tx, layers_at_once):
    """Temporaries are the layer inputs and a few layers' worth, and nothing is copied."""
    few, many = (compiled(make_step, tx, n) for n in (8, 32))
    assert copies_of_stacks(few, 8) == []
    assert copies_of_stacks(many, 32) == []
    growth = temporaries(many) - temporaries(few)
    assert growth == pytest.approx(24 * LAYER_INPUT, rel=0.02)
    assert temporaries(few) < 8 * LAYER_INPUT + layers_at_once * LAYER
    # Parameters and state are updated in place.
    memory = many.memory_analysis()
    assert memory.alias_size_in_bytes > 0.99 * (memory.argument_size_in_bytes - B * T * 4)


@pytest.mark.parametrize(
    "rule", [pytest.param(r, marks=() if r in QUICK else pytest.mark.slow) for r in RULES]
)
def test_temporaries_grow_with_depth_by_the_layer_inputs_only(rule, standard_promotion):
    # Parameters, gradient, and temporaries of the rule.
    assert_one_layer_of_gradient(lomo_jax.fused_step, RULES[rule](), layers_at_once=6)


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in OPTIONS]
)
def test_options_hold_one_layer_of_gradient_too(name):
    step = functools.partial(lomo_jax.fused_step, **OPTIONS[name])
    assert_one_layer_of_gradient(step, lomo_jax.adalomo(1e-2), layers_at_once=8)


def test_the_reference_grows_with_the_parameters():
    few, many = (compiled(lomo_jax.reference_step, lomo_jax.adalomo(1e-2), n) for n in (8, 32))
    assert temporaries(many) - temporaries(few) > 24 * LAYER


def test_the_search_for_copies_finds_one():
    """A naive loop, which reads its layer at the top of the body, copies the stack."""

    def naive(stack, inputs, ct):
        def body(k, carry):
            stack, ct = carry
            i = 7 - k
            layer = jax.tree.map(lambda w: w[i], stack)
            block = lambda x, w: x + jnp.tanh(x @ w["up"]) @ w["down"]  # noqa: E731
            ct, grads = jax.vjp(block, inputs[i], layer)[1](ct)
            stack = jax.tree.map(lambda w, g: w.at[i].add(-0.1 * g), stack, grads)
            return stack, ct

        return jax.lax.fori_loop(0, 8, body, (stack, ct))

    shape = lambda *s: jax.ShapeDtypeStruct(s, jnp.float32)  # noqa: E731
    stack = {"up": shape(8, D, F), "down": shape(8, F, D)}
    lowered = quick_jit(naive, donate_argnums=(0, 2)).lower(
        stack, shape(8, B, T, D), shape(B, T, D)
    )
    assert copies_of_stacks(lowered.compile(), 8)
