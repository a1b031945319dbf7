"""The rules of the layer axis: an operation on one layer is one layer of the operation."""

import functools
import warnings

import jax
import jax.extend.core as jex
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, quick_jit

import lomo_jax
from lomo_jax.fused import jaxprs, layer_axis

SHAPE = (2, 3, 4)  # of every operand that is not said
INTEGERS = np.random.default_rng(0).integers(0, 9, SHAPE).astype(np.int32)
lax = jax.lax


def case(primitive, axes, function, *args):
    """Returns a test case: the axes of the result that can be the layer axis, and a function."""
    return pytest.param(
        primitive, axes, function, args, id=f"{primitive}-{''.join(map(str, axes))}"
    )


def x(seed=0, shape=SHAPE):
    return normal(seed, *shape)


CASES = [
    case("add", (0, 1, 2), lambda a, b: a + b, x(), x(1)),
    case("mul", (0, 1, 2), lambda a, b: a * b, x(), x(1)),
    case("mul", (0, 1), lambda a: a * jnp.float32(2), x(0, (3, 4))),
    case("select_n", (0, 1, 2), lambda a, b: lax.select_n(a > 0, a, b), x(), x(1)),
    case("select_n", (0, 1), lambda a, p: lax.select_n(p, a, a), x(0, (3, 4)), np.bool_(True)),
    case("clamp", (0, 1, 2), lambda a: lax.clamp(-0.1, a, 0.1), x()),
    case("clamp", (0, 1, 2), lambda a, b: lax.clamp(a - 1, b, a + 1), x(), x(1)),
    case("convert_element_type", (0, 1, 2), lambda a: a.astype(jnp.bfloat16), x()),
    case("bitcast_convert_type", (0, 1, 2), lambda a: lax.bitcast_convert_type(a, "uint32"), x()),
    case("bitcast_convert_type", (), lambda a: lax.bitcast_convert_type(a, "uint8"), x()),
    case("integer_pow", (0, 1, 2), lambda a: a**3, x()),
    case("reduce_precision", (0, 1, 2), lambda a: lax.reduce_precision(a, 8, 7), x()),
    case("stop_gradient", (0, 1, 2), lambda a: lax.stop_gradient(a) * 1.0, x()),
    case("reduce_sum", (0, 1), lambda a: a.sum(1), x()),
    case("reduce_sum", (0,), lambda a: a.sum((0, 2)), x()),
    case("reduce_max", (0, 1), lambda a: a.max(0), x()),
    case("reduce_min", (0, 1), lambda a: a.min(2), x()),
    case("reduce_prod", (0,), lambda a: a.prod((1, 2)), x()),
    case("reduce_and", (0, 1), lambda a: jnp.all(a > 0, 1), x()),
    case("argmax", (0, 1), lambda a: lax.argmax(a, 1, jnp.int32), x()),
    case("argmin", (0, 1), lambda a: lax.argmin(a, 0, jnp.int32), x()),
    case("cumsum", (0, 2), lambda a: lax.cumsum(a, 1), x()),
    case("cumlogsumexp", (1, 2), lambda a: lax.cumlogsumexp(a, 0, reverse=True), x()),
    case(
        "broadcast_in_dim",
        (0, 1, 2, 3),
        lambda a: lax.broadcast_in_dim(a, (2, 5, 3, 4), (0, 2, 3)),
        x(),
    ),
    case(
        "broadcast_in_dim",
        (0, 1, 2),
        lambda a: lax.broadcast_in_dim(a, (3, 5, 4), (0, 1, 2)),
        x(0, (3, 1, 4)),
    ),
    case("broadcast_in_dim", (0, 1), lambda a: lax.broadcast(a, (2, 3)), np.float32(2)),
    case("transpose", (0, 1, 2), lambda a: a.transpose(2, 0, 1), x()),
    case("reshape", (0,), lambda a: a.reshape(2, 12), x()),
    case("reshape", (1,), lambda a: a.reshape(6, 4), x()),
    case("reshape", (0, 3), lambda a: a.reshape(2, 6, 1, 4), x(0, (2, 2, 3, 4))),
    case("reshape", (0, 1, 3), lambda a: a.reshape(2, 3, 1, 4), x()),
    case("reshape", (0, 1), lambda a: a.reshape(4, 6), x(0, (4, 1, 6))),
    case("squeeze", (0, 1), lambda a: lax.squeeze(a, [1]), x(0, (2, 1, 3))),
    case("dot_general", (0, 1, 2), jnp.matmul, x(), x(1, (2, 4, 5))),
    case("dot_general", (0, 1, 2), lambda a, b: a @ b, x(), x(1, (4, 5))),
    case(
        "dot_general",
        (0, 1, 2, 3),
        lambda a, b: lax.dot_general(a, b, (((2,), (1,)), ((), ()))),
        x(),
        x(1, (5, 4, 2)),
    ),
    case(
        "dot_general",
        (0, 1, 2, 3),
        lambda a, b: lax.dot_general(a, b, (((3,), (0,)), ((1,), (2,)))),
        x(0, (2, 3, 5, 4)),
        x(1, (4, 6, 3)),
    ),
    case("concatenate", (0, 2), lambda a, b: jnp.concatenate([a, b], 1), x(), x(1, (2, 5, 4))),
    case("split", (0, 1), lambda a: jnp.split(a, 2, 2)[1], x()),
    case("pad", (0, 2), lambda a: lax.pad(a, 0.5, [(0, 0, 0), (1, 2, 1), (0, 0, 0)]), x()),
    case("pad", (0, 1), lambda a: lax.pad(a, 0.5, [(0, 0, 0), (0, 0, 0), (-1, 0, 0)]), x()),
    case("slice", (0, 1, 2), lambda a: a[:, 1:], x()),
    case("slice", (0, 2), lambda a: a[1:, ::2], x()),
    case("dynamic_slice", (0, 2), lambda a, i: lax.dynamic_slice(a, (i, i, i), (2, 2, 4)), x(), 1),
    case(
        "dynamic_update_slice",
        (0, 2),
        lambda a, b, i: lax.dynamic_update_slice(a, b, (i, i, i)),
        x(),
        x(1, (2, 2, 4)),
        1,
    ),
    case("rev", (0, 2), lambda a: lax.rev(a, [1]), x()),
    case("iota", (0, 2), lambda a: a + lax.broadcasted_iota("float32", SHAPE, 1), x()),
    case("sort", (0, 2), lambda a: lax.sort(a, 1), x()),
    case("sort", (0, 1), lambda a, b: lax.sort((a, b), dimension=2)[1], x(), x(1)),
    case("top_k", (0, 1), lambda a: lax.top_k(a, 2)[0], x()),
    case("top_k", (0, 1), lambda a: lax.top_k(a, 2)[1], x()),
    case("scan", (0,), lambda a, b: lax.map(lambda w: w @ b, a), x(), x(1, (4, 5))),
    case("and", (0, 1, 2), lambda a, b: a & b, INTEGERS, INTEGERS + 1),
    case("shift_left", (0, 1, 2), lambda a: a << jnp.int32(2), INTEGERS),
]


def evaluate(template, eqn, inputs):
    """Returns the results of an equation with these parameters."""
    invars = [jex.Var(jax.typeof(jnp.asarray(value))) for value in inputs]
    outvars = [jex.Var(v.aval) for v in eqn.outvars]
    run = jaxprs.as_function(
        template, [eqn.replace(invars=invars, outvars=outvars)], invars, outvars
    )
    return run(*inputs)


def layer_of(value, place, i):
    start = place.start + i * place.scale
    return lax.slice_in_dim(value, start, start + place.scale, axis=place.axis)


@pytest.mark.parametrize(("primitive", "axes", "function", "args"), CASES)
def test_one_layer_of_the_operation_is_the_operation_on_one_layer(primitive, axes, function, args):
    closed = jax.make_jaxpr(function)(*args)
    inputs = [jex.Var(v.aval) for v in jaxprs.open_jaxpr(closed).invars]
    eqns, results = jaxprs.inline(closed, inputs, jaxprs.is_call)
    eqn = [e for e in eqns if e.primitive.name == primitive][-1]
    # All that it reads may be of any value: the inputs of the function are.
    operands = jaxprs.as_function(closed, eqns, inputs, [*eqn.invars])(*map(jnp.asarray, args))
    wholes = evaluate(closed, eqn, operands)
    for result, whole in zip(eqn.outvars, wholes, strict=True):
        if not {result}.issubset(results) and len(eqn.outvars) > 1:
            continue
        found = [layer_axis.operands(eqn, result, axis) for axis in range(whole.ndim)]
        assert tuple(axis for axis, places in enumerate(found) if places is not None) == axes
        for axis in axes:
            one = eqn.replace(params=layer_axis.for_one_layer(eqn, axis, 1))
            for i in range(whole.shape[axis]):
                layers = [
                    value if place is None else layer_of(value, place, i)
                    for value, place in zip(operands, found[axis], strict=True)
                ]
                layer = evaluate(closed, one, layers)[eqn.outvars.index(result)]
                expected = lax.slice_in_dim(whole, i, i + 1, axis=axis)
                assert layer.dtype == expected.dtype
                np.testing.assert_allclose(
                    np.asarray(layer, np.float64),
                    np.asarray(expected, np.float64),
                    rtol=1e-5,
                    atol=1e-6,
                )


def test_every_rule_has_a_case():
    covered = {parameters.values[0] for parameters in CASES}
    # JAX before 0.12 has no `stack`.
    assert covered >= {*layer_axis._RULES, "argmax", "argmin"} - {"stack"}


def test_stacked_operands_keep_their_layers():
    closed = jax.make_jaxpr(lambda a, b: jnp.stack([a, b], 1))(x(), x(1))
    eqn = jaxprs.open_jaxpr(closed).eqns[-1]
    for axis, of_operand in ((0, 0), (1, None), (2, 1), (3, 2)):
        found = layer_axis.operands(eqn, eqn.outvars[0], axis)
        assert (found and found[0].axis) == of_operand


@pytest.mark.parametrize(
    "function",
    [
        functools.partial(jnp.take, indices=jnp.array([1, 0]), axis=0),
        lambda a: jnp.roll(a, 1, 0),
        lambda a: a[::-1],
        lambda a: jnp.cumsum(a, 0),
        lambda a: a - a.mean(0),
        lambda a: jnp.concatenate([a[:1], a[:-1]]),
        lambda a: a.at[0].set(0.0),
        lambda a: jnp.sort(a, 0),
        lambda a: jax.lax.scan(lambda c, w: (c + w, c), jnp.zeros(SHAPE[1:]), a)[1],
    ],
)
def test_operations_that_mix_layers_keep_them_together(function, assert_close):
    """A scan over the result is right, whether the layers are walked or not."""

    def loss(params, x):
        body = lambda x, w: (x + jnp.tanh(x @ w[:3, :3]), None)  # noqa: E731
        return jnp.mean(jax.lax.scan(body, x @ params["in"], function(params["layers"]))[0] ** 2)

    params, batch = {"layers": normal(0, *SHAPE), "in": normal(1, 3, 3)}, normal(2, 2, 3)
    step = lomo_jax.fused_step(loss, optax.sgd(1.0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        state = step.init(params, batch)
    new = quick_jit(step)(params, state, batch)[0]
    grads = jax.grad(loss)(params, batch)
    assert_close(new, jax.tree.map(jnp.subtract, params, grads))
