"""Random stacks of layers: whatever their shape, fused is plain."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lomo_jax

VOCABULARY, BATCH, LENGTH = 7, 8, 3

# Each example compiles two steps. The same examples on every machine.
quick = settings(
    max_examples=12,
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


@quick
@given(model=models(), options=options())
def test_fused_is_plain(model, options, assert_close):
    loss, params, tokens = build(model)
    results = []
    for make in (lomo_jax.fused_step, lomo_jax.reference_step):
        step = make(loss, optax.sgd(0.5), **options)
        state = step.init(params, tokens)
        run = jax.jit(step, compiler_options={"xla_backend_optimization_level": 0})
        results.append(run(params, state, tokens))
    # Gradients of the two are sums in another order, each rounded several times.
    dtype = jnp.finfo(model["dtype"])
    tolerance = 1e-5 if model["dtype"] == "float32" else 4 * float(dtype.eps)
    assert_close(*results, tolerance)
