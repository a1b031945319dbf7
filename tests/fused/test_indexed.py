"""Loops that index a stack of layers: which become scans, and that NumPy counts as JAX does."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal
from jax.sharding import AbstractMesh, AxisType
from jax.sharding import PartitionSpec as P
from test_idioms import walked

import lomo_jax

L, B, D = 4, 2, 6

# From the step of a loop to a layer. In these loops layer i is read in step i.
IN_TURN = {
    "step": lambda i: i,
    "sum": lambda i: i + 3 - 3,
    "negative": lambda i: -(-i - 1) - 1,
    "product": lambda i: (2 * i) // 2,
    "quotient": lambda i: (i * 3 + 1) // 3,
    "negative quotient": lambda i: -(-i * 3 // 3),
    "truncated quotient": lambda i: -jax.lax.div(-3 * i - 2, 3),
    "truncated remainder": lambda i: -jax.lax.rem(-i - L, L),
    "remainder": lambda i: (i - L) % L,
    "power": lambda i: abs(-i) * jnp.sign(i + 1),
    "bounds": lambda i: jnp.clip(i, 0, L - 1),
    "maximum": lambda i: jnp.minimum(jnp.maximum(i, 0), L),
    "choice": lambda i: jnp.where((i < 0) | ~(i >= 0), i + L, i),
    "choice of three": lambda i: jax.lax.select_n((i != 0).astype(int), jnp.int32(0), i),
    "dtype": lambda i: (i.astype(jnp.uint8) + 256).astype(jnp.int16),
    "shape": lambda i: jnp.broadcast_to(i.reshape(1), (1, 1)).squeeze(),
    "and": lambda i: jnp.where((i == 2) & (i <= 2) & (i > 1), 2, i),
}
OTHERS = {
    "last first": lambda i: L - 1 - i,
    "every layer twice": lambda i: i // 2,
    "round": lambda i: (i + 1) % L,
    "one": lambda i: 0 * i + 2,
}


def layer(x, w):
    return jnp.tanh(x @ w)


def fori_loop(params, x, *, index):
    return jax.lax.fori_loop(0, L, lambda i, x: layer(x, params[index(i)]), x).sum()


def constants(params, x):
    return jax.lax.scan(lambda x, i: (layer(x, params[i]), None), x, np.arange(L))[0].sum()


def carry(params, x):
    def body(state, _):
        x, i = state
        return (layer(x, params[i - 3]), i + 1), None

    return jax.lax.scan(body, (x, 3), length=L)[0][0].sum()


def carry_that_counts_down(params, x):
    def body(state, _):
        x, i = state
        return (layer(x, params[i]), i - 1), None

    return jax.lax.scan(body, (x, L - 1), length=L, reverse=True)[0][0].sum()


def carry_that_waits(params, x):
    """The layer of a step depends on the batch."""

    def body(state, _):
        x, i = state
        return (layer(x, params[i]), i + (x.sum() > 0).astype(int)), None

    return jax.lax.scan(body, (x, jnp.int32(0)), length=L)[0][0].sum()


def captured_array(params, x):
    order = jnp.arange(L)  # a tracer under `jax.jit`
    return jax.lax.scan(lambda x, i: (layer(x, params[i]), None), x, order)[0].sum()


LOOPS = {name: functools.partial(fori_loop, index=index) for name, index in IN_TURN.items()}
LOOPS |= {f.__name__: f for f in (constants, carry, carry_that_counts_down, captured_array)}
OTHER_LOOPS = {name: functools.partial(fori_loop, index=index) for name, index in OTHERS.items()}
OTHER_LOOPS |= {"carry_that_waits": carry_that_waits}


@pytest.mark.parametrize("name", LOOPS)
def test_layers_in_turn_are_scanned(name, assert_steps_agree):
    params, x = {"w": normal(0, L, D, D)}, normal(1, B, D)

    def loss(params, x):
        return LOOPS[name](params["w"], x)

    assert walked(loss, params, x) == {"w"}
    tx = optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.05))
    assert_steps_agree(loss, tx, params, [x, x + 0.1])


@pytest.mark.parametrize("name", OTHER_LOOPS)
def test_other_layers_get_a_whole_gradient(name, assert_steps_agree):
    params, x = {"w": normal(0, L, D, D)}, normal(1, B, D)

    def loss(params, x):
        return OTHER_LOOPS[name](params["w"], x)

    assert not walked(loss, params, x)
    with pytest.warns(UserWarning, match="an order that is not that of the loop's counter"):
        assert_steps_agree(loss, optax.sgd(0.1, 0.9), params, [x, x + 0.1])


def test_the_position_of_a_device_is_no_step(assert_steps_agree):
    """Each device starts with another layer."""
    params, x = {"w": normal(0, L, D, D)}, normal(1, B, D)
    mesh = jax.make_mesh((2,), ("data",), (AxisType.Auto,), devices=jax.devices()[:2])

    @functools.partial(
        jax.shard_map, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"), check_vma=False
    )
    def apply(w, x):
        first = jax.lax.axis_index("data")
        return jax.lax.fori_loop(0, L - 1, lambda i, x: layer(x, w[first + i]), x)

    def loss(params, x):
        return apply(params["w"], x).sum()

    assert not walked(loss, params, x)
    step = lomo_jax.fused_step(loss, optax.sgd(0.1))
    new, _, _ = jax.jit(step)(params, step.init(params, x), x)
    expected = params["w"] - 0.1 * jax.grad(loss)(params, x)["w"]
    np.testing.assert_allclose(new["w"], expected, rtol=1e-5)


def test_devices_that_are_not_present():
    """A plan for other machines traces the loss under a mesh without devices."""
    params = {"w": jax.ShapeDtypeStruct((L, D, D), jnp.float32)}
    x = jax.ShapeDtypeStruct((8, D), jnp.float32)
    step = lomo_jax.fused_step(lambda p, x: captured_array(p["w"], x), lomo_jax.lomo(0.1))
    mesh = AbstractMesh((8,), ("fsdp",), axis_types=(AxisType.Explicit,))
    with jax.sharding.use_abstract_mesh(mesh):
        assert not step.explain(params, x).whole_stacks
