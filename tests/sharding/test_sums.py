"""Gradients that are summed over devices in a later step equal those of one device."""

import contextlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import before_release, quick_jit
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import lomo_jax
from lomo_jax import sharding
from lomo_jax.fused.order import divide, trace_layer

L, B, D = 3, 8, 8


@jax.custom_vjp
def is_its_own_cotangent(x, w):
    return x @ w


is_its_own_cotangent.defvjp(lambda x, w: (x @ w, w), lambda w, ct: (w + 0 * ct, w))


# What a layer computes from its weights, each [D, D] or smaller.
LAYERS = {
    "product": lambda w, x: x @ w["a"],
    "transposed": lambda w, x: x @ w["a"].T,
    "reshaped": lambda w, x: jnp.einsum("bd,dhk->bhk", x, w["a"].reshape(D, 2, 4)).reshape(B, D),
    "halves": lambda w, x: jnp.concatenate([x @ w["a"][:, :4], x @ w["a"][:, 4:]], -1),
    "a batch of products": lambda w, x: jnp.einsum(
        "bhd,hdk->bhk", x.reshape(B, 2, 4), w["a"][:, :4].reshape(2, 4, 4)
    ).reshape(B, D),
    "scale": lambda w, x: (x * w["scale"]) @ w["a"],
    "the sum of two has one gradient": lambda w, x: x @ (w["a"] + w["b"]),
    "used twice": lambda w, x: jnp.tanh(x @ w["a"]) @ w["a"],
    "used twice, at a distance": lambda w, x: jnp.tanh(jnp.tanh(x @ w["a"]) @ w["b"]) @ w["a"],
    "penalty": lambda w, x: x @ w["a"] + (w["a"] ** 2).mean(),
    "gradient through a cast": lambda w, x: x @ w["a"].astype(jnp.bfloat16).astype(jnp.float32),
    "a sum in the last step": lambda w, x: (
        jnp.tanh((x * w["scale"]).sum(-1, keepdims=True)) + jnp.zeros_like(x)
    ),
    "the value of a weight": lambda w, x: x @ w["a"] + jax.lax.stop_gradient(w["a"]).sum(),
    "its cotangent is the weight": lambda w, x: is_its_own_cotangent(x, w["a"]),
}


def loss_of(layer, *, gathers):
    def loss(params, x):
        def body(x, w):
            if gathers:
                w = jax.tree.map(sharding.gather, w)
            return jnp.tanh(layer(w, x)), None

        return (jax.lax.scan(body, x, params)[0] ** 2).mean()

    return loss


CASES = [
    *((name, (2, 4), 1e-3) for name in LAYERS),
    *(("product", (1, 8), None), ("scale", (8, 1), None)),
    *(before_release(name, (1, 8), None) for name in LAYERS if name != "product"),
    *(before_release(name, (8, 1), None) for name in LAYERS if name != "scale"),
]


@pytest.mark.parametrize(("name", "sizes", "clip_norm"), CASES, ids=str)
def test_equals_one_device(name, sizes, clip_norm, assert_close):
    rng = np.random.default_rng(0)
    shapes = {"a": (L, D, D), "b": (L, D, D), "scale": (L, D)}
    params = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    x = rng.normal(size=(B, D)).astype(np.float32)
    results = []
    for mesh in (sharding.make_mesh(1, 1, devices=jax.devices()[:1]), sharding.make_mesh(*sizes)):
        with jax.set_mesh(mesh):
            specs = {"a": P(None, "fsdp"), "b": P(None, "fsdp"), "scale": P()}
            placed = {name: jax.device_put(v, specs[name]) for name, v in params.items()}
            batch = jax.device_put(x, P(sharding.BATCH))
            step = lomo_jax.fused_step(
                loss_of(LAYERS[name], gathers=True), lomo_jax.lomo(0.5), clip_norm=clip_norm
            )
            state = step.init(placed, batch)
            results.append(jax.device_get(quick_jit(step)(placed, state, batch)))
    assert_close(results[1], results[0])


def test_a_gathered_weight_is_a_result_of_the_layer(assert_close):
    def loss(params, x):
        def body(x, w):
            w = sharding.gather(w)
            return jnp.tanh(x @ w), w

        x, ws = jax.lax.scan(body, x, params)
        return (x**2).mean() + (ws**2).mean()

    with jax.set_mesh(sharding.make_mesh(1, 8)):
        params = jax.device_put(np.full((L, D, D), 0.1, np.float32), P(None, "fsdp"))
        x = jax.device_put(np.ones((B, D), np.float32), P(sharding.BATCH))
        results = []
        for make in (lomo_jax.fused_step, lomo_jax.reference_step):
            step = make(loss, lomo_jax.lomo(0.5))
            results.append(jax.device_get(quick_jit(step)(params, step.init(params, x), x)))
    assert_close(*results)


@jax.custom_vjp
def overflows(x):
    return x


overflows.defvjp(lambda x: (x, None), lambda _, ct: (jnp.full_like(ct, jnp.inf),))


def test_an_overflow_in_a_late_sum_skips_the_whole_layer():
    def loss(params, x):
        def body(x, w):
            a, b = overflows(sharding.gather(w["a"])), sharding.gather(w["b"])
            return jnp.tanh(x @ a) @ b * w["scale"], None

        return (jax.lax.scan(body, x, params)[0] ** 2).mean()

    with jax.set_mesh(sharding.make_mesh(1, 8)):
        shapes = {"a": (L, D, D), "b": (L, D, D), "scale": (L, D)}
        params = {
            name: jax.device_put(
                np.ones(shape, np.float32), P(None, "fsdp") if name != "scale" else P()
            )
            for name, shape in shapes.items()
        }
        x = jax.device_put(np.ones((B, D), np.float32), P(sharding.BATCH))
        scale = lomo_jax.DynamicLossScale(skip="layers")
        step = lomo_jax.fused_step(loss, lomo_jax.lomo(0.5), loss_scale=scale)
        new, _, out = quick_jit(step)(params, step.init(params, x), x)
    assert not out.finite
    for name, param in params.items():
        np.testing.assert_array_equal(new[name], param)


@pytest.mark.parametrize("second", [AxisType.Explicit, AxisType.Auto])
def test_other_meshes(second, assert_close):
    """Nothing is moved to later steps without `jax.set_mesh`, or under a mesh with Auto axes."""
    mesh = jax.make_mesh((4, 2), ("x", "y"), axis_types=(AxisType.Explicit, second))
    params = jax.device_put(np.full((L, D, D), 0.1, np.float32), NamedSharding(mesh, P()))
    x = jax.device_put(np.ones((B, D), np.float32), NamedSharding(mesh, P("x")))
    step = lomo_jax.fused_step(
        lambda w, x: jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, w)[0].sum(),
        lomo_jax.lomo(0.5),
    )
    on_one = jax.device_get((params, x))
    expected = quick_jit(step)(on_one[0], step.init(*on_one), on_one[1])
    is_auto = second == AxisType.Auto
    with jax.set_mesh(mesh) if is_auto else contextlib.nullcontext():
        assert_close(quick_jit(step)(params, step.init(params, x), x), expected)


def test_each_sum_has_steps_of_its_own():
    """Of two mesh axes each is summed in its own step."""
    with jax.set_mesh(sharding.make_mesh(2, 4)):
        w = jax.device_put(np.ones((D, D), np.float32), P("fsdp"))
        x = jax.device_put(np.ones((B, D), np.float32), P(sharding.BATCH))

        def gradients(ws, x):
            y, vjp = jax.vjp(lambda w: x @ sharding.gather(w), *ws)
            return vjp(y), y

        @jax.jit
        def stages(w, x):
            steps = divide(trace_layer(gradients, [jax.typeof(w)], (x,)))
            found.append([len(late.stages) for step in steps.steps for late in step.sums.values()])
            return w

        found = []
        stages(w, x)
    assert found == [[2]]
