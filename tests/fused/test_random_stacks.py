"""Random stacks of layers and random options: the fused step equals the reference."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import quick_jit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lomo_jax

VOCABULARY, BATCH, LENGTH = 7, 8, 3

# The same examples on every machine; each compiles two steps.
same = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@st.composite
def models(draw):
    return {
        "depths": draw(st.lists(st.integers(1, 4), min_size=1, max_size=2)),
        "width": draw(st.integers(1, 6)),
        "hidden": draw(st.integers(1, 6)),
        "dtype": draw(st.sampled_from(["float32", "float32", "bfloat16", "float16"])),
        "tied": draw(st.booleans()),
        "shared": draw(st.booleans()),
        "reverse": draw(st.booleans()),
        "unroll": draw(st.integers(1, 2)),
        "seed": draw(st.integers(0, 1000)),
    }


@st.composite
def options(draw):
    return {
        "microbatches": draw(st.sampled_from([1, 2, 4, 8])),
        "clip_norm": draw(st.sampled_from([None, 0.1])),
        "loss_scale": draw(st.sampled_from([None, 64.0])),
        "trainable": draw(st.sampled_from([None, lambda name: "up" not in name])),
    }


def build(model):
    rng, width = np.random.default_rng(model["seed"]), model["width"]

    def normal(*shape):
        return jnp.asarray(0.5 * rng.standard_normal(shape), model["dtype"])

    params = {"embedding": normal(VOCABULARY, width), "scale": normal(width)}
    for k, depth in enumerate(model["depths"]):
        params[f"stack{k}"] = {
            "up": normal(depth, width, model["hidden"]),
            "down": normal(depth, model["hidden"], width),
        }
    if model["shared"]:
        params["shared"] = normal(width, width)
    if not model["tied"]:
        params["head"] = normal(width, VOCABULARY)

    def loss(params, tokens):
        def layer(x, w):
            x = x + jnp.tanh(x @ w["up"]) @ w["down"]
            return (x @ params["shared"] if model["shared"] else x), None

        x = params["embedding"][tokens]
        for k in range(len(model["depths"])):
            x, _ = jax.lax.scan(
                layer,
                x * params["scale"],
                params[f"stack{k}"],
                reverse=model["reverse"],
                unroll=model["unroll"],
            )
        head = params["embedding"].T if model["tied"] else params["head"]
        logits = jax.nn.log_softmax((x @ head).astype(jnp.float32))
        return -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1).mean()

    tokens = jnp.asarray(rng.integers(0, VOCABULARY, (BATCH, LENGTH)), jnp.int32)
    return loss, params, tokens


def check(model, options, assert_close):
    loss, params, tokens = build(model)
    results = []
    for make in (lomo_jax.fused_step, lomo_jax.reference_step):
        step = make(loss, optax.sgd(0.5), **options)
        results.append(quick_jit(step)(params, step.init(params, tokens), tokens))
    # The two sum the gradients in another order, with several roundings each.
    dtype = jnp.finfo(model["dtype"])
    tolerance = 1e-5 if model["dtype"] == "float32" else 4 * float(dtype.eps)
    assert_close(*results, tolerance)


@settings(same, max_examples=5)
@given(model=models(), options=options())
def test_fused_equals_reference(model, options, assert_close):
    check(model, options, assert_close)


@pytest.mark.slow
@pytest.mark.exhaustive
@settings(same, max_examples=30)
@given(model=models(), options=options())
def test_fused_equals_reference_on_many(model, options, assert_close):
    check(model, options, assert_close)
