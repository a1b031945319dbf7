"""Which arrays are in host memory, and which residuals `remat` saves.

`test_options.py` and `test_shapes.py` compare the results.
"""

import jax
import jax.numpy as jnp
import optax
import pytest
from jax.ad_checkpoint import checkpoint_name

import lomo_jax

HOST, DEVICE = jax.memory.Space.Host, jax.memory.Space.Device
L, B, D, F = 6, 16, 8, 64


def make_params():
    keys = jax.random.split(jax.random.key(0), 3)
    return {
        "up": 0.3 * jax.random.normal(keys[0], (L, D, F)),
        "down": 0.3 * jax.random.normal(keys[1], (L, F, D)),
        "out": jax.random.normal(keys[2], (D, D)),
    }


def loss_fn(params, x):
    def layer(x, w):
        hidden = checkpoint_name(jnp.tanh(x @ w["up"]), "attention")
        return x + hidden @ w["down"], None

    layers = {name: params[name] for name in ("up", "down")}
    x, _ = jax.lax.scan(jax.checkpoint(layer), x, layers)
    return jnp.mean((x @ params["out"]) ** 2)


X = jax.random.normal(jax.random.key(1), (B, D))


@pytest.mark.parametrize(
    ("offload", "params_in", "state_in", "message"),
    [
        (None, HOST, DEVICE, r"parameter down is in host memory, but .*Offload\(params=True\)"),
        (
            lomo_jax.Offload(params=True),
            DEVICE,
            DEVICE,
            r"parameter down is in device memory, but .*device_put\(params, jax.memory.Space.Host",
        ),
        (
            lomo_jax.Offload(state=True),
            DEVICE,
            DEVICE,
            r"the optimizer's state of down is in device memory, but .*device_put\(state, ",
        ),
        (
            lomo_jax.Offload(),
            DEVICE,
            HOST,
            r"of down is in host memory, but .*\(state=True\)",
        ),
    ],
)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_arrays_in_the_wrong_memory(make_step, offload, params_in, state_in, message):
    step = make_step(loss_fn, optax.sgd(0.1, momentum=0.9), offload=offload)
    params = make_params()
    state = jax.device_put(make_step(loss_fn, step.tx).init(params, X), state_in)
    with pytest.raises(ValueError, match=message) as error:
        jax.jit(step)(jax.device_put(params, params_in), state, X)
    assert "\n" not in str(error.value)


def test_offload_must_be_an_offload():
    with pytest.raises(TypeError, match=r"offload must be a lomo_jax.Offload, got True"):
        lomo_jax.fused_step(loss_fn, optax.sgd(0.1), offload=True)


def saved(remat):
    """Returns the sizes of a layer's saved residuals: the stacked outputs of its forward scan."""
    step = lomo_jax.fused_step(loss_fn, optax.sgd(0.1), remat=remat)
    params = make_params()
    jaxpr = jax.make_jaxpr(step)(params, step.init(params, X), X)
    scans = [e for e in jaxpr.eqns if e.primitive.name == "scan"]
    (forward,) = (e for e in scans if e.params["length"] == L)
    return sorted(v.aval.size // L for v in forward.outvars if v.aval.shape[:1] == (L,))


def test_residuals_saved_by_remat():
    assert saved("full") == [B * D]
    assert saved("attention") == [B * D, B * F]
    assert saved("products") == [B * D, B * F, B * F]
    # Also the residuals of tanh, but no parameters.
    assert set(saved("none")) == {B * D, B * F}
    assert len(saved("none")) > 2
    assert saved(jax.checkpoint_policies.nothing_saveable) == [B * D]
    assert saved(jax.checkpoint_policies.dots_saveable) == [B * D, B * F]
