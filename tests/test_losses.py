"""The loss against the plain formula with all the logits, and its memory."""

import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import quick_jit
from jax.extend.core import JaxprEqn, jaxprs_in_params

from lomo_jax.losses import Metrics, next_token_loss

B, T, D, V = 2, 24, 16, 101  # 101 is prime: no chunk divides it


class Inputs(NamedTuple):
    x: jax.Array
    head: jax.Array
    targets: jax.Array
    weights: jax.Array

    def astype(self, dtype: jax.typing.DTypeLike) -> "Inputs":
        return self._replace(x=self.x.astype(dtype), head=self.head.astype(dtype))


def make_inputs(batch: int = B, length: int = T) -> Inputs:
    keys = jax.random.split(jax.random.key(0), 4)
    return Inputs(
        jax.random.normal(keys[0], (batch, length, D)),
        jax.random.normal(keys[1], (D, V)) / math.sqrt(D),
        jax.random.randint(keys[2], (batch, length), 0, V),
        jax.random.uniform(keys[3], (batch, length)).at[:, -5:].set(0),
    )


def plain_loss(
    x_BxTxD: jax.Array, head_DxV: jax.Array, targets_BxT: jax.Array, weights_BxT: jax.Array
) -> tuple[jax.Array, Metrics]:
    logits_BxTxV = jnp.einsum("btd,dv->btv", x_BxTxD, head_DxV, preferred_element_type=jnp.float32)
    log_p_BxTxV = jax.nn.log_softmax(logits_BxTxV)
    log_p_BxT = jnp.take_along_axis(log_p_BxTxV, targets_BxT[..., None], -1)[..., 0]
    correct_BxT = (logits_BxTxV.argmax(-1) == targets_BxT).astype(jnp.float32)
    weight = weights_BxT.sum()
    return -(log_p_BxT * weights_BxT).sum() / weight, Metrics(
        (correct_BxT * weights_BxT).sum() / weight, weight
    )


def gradients(loss_fn, inputs: Inputs, scale: float = 1.0, **kwargs: Any):
    """Returns the gradients of x and head as float32, their scale removed."""

    def scaled(x_BxTxD, head_DxV):
        inputs_ = inputs._replace(x=x_BxTxD, head=head_DxV)
        return scale * loss_fn(*inputs_, **kwargs)[0]

    grads = quick_jit(jax.grad(scaled, (0, 1)))(*inputs[:2])
    assert [g.dtype for g in grads] == [x.dtype for x in inputs[:2]]
    return [g.astype(jnp.float32) / scale for g in grads]


def error(actual: jax.Array, expected: jax.Array) -> float:
    return float(jnp.linalg.norm(actual - expected) / jnp.linalg.norm(expected))


@pytest.mark.parametrize("chunk", [1, 7, 50, 100, 2048])
def test_equals_all_logits(chunk: int):
    inputs = make_inputs()
    # Half of the targets are the likeliest token, so that an accuracy of 0 or 1 would show.
    likeliest_BxT = (inputs.x @ inputs.head).argmax(-1).astype(jnp.int32)
    inputs = inputs._replace(
        targets=jnp.where(jnp.arange(T) % 2 == 0, likeliest_BxT, inputs.targets)
    )
    actual = quick_jit(next_token_loss, static_argnames="chunk")(*inputs, chunk=chunk)
    chex.assert_trees_all_close(actual, plain_loss(*inputs), rtol=1e-6)
    ours, plain = gradients(next_token_loss, inputs, chunk=chunk), gradients(plain_loss, inputs)
    assert max(map(error, ours, plain)) < 1e-6


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_as_good_as_all_logits(dtype: str):
    inputs = make_inputs().astype(dtype)
    exact = gradients(plain_loss, inputs.astype(jnp.float32))
    ours = gradients(next_token_loss, inputs, chunk=10)
    plain = gradients(plain_loss, inputs)
    for our, their, true in zip(ours, plain, exact, strict=True):
        # JAX keeps the gradient of the logits in float32. Ours is rounded, to make the products
        # fast: two roundings instead of one, so sqrt(2) times the error.
        assert error(our, true) < 1.5 * error(their, true)
    loss, _ = next_token_loss(*inputs)
    assert loss.dtype == jnp.float32
    np.testing.assert_allclose(loss, plain_loss(*inputs.astype(jnp.float32))[0], rtol=1e-5)


def test_mean_over_many_tokens_does_not_underflow_in_float16():
    """One token's share of the gradient is below float16's smallest number, their sum is not."""
    inputs = make_inputs(1, 8192).astype(jnp.float16)
    _, dhead_DxV = gradients(next_token_loss, inputs)
    _, true_DxV = gradients(plain_loss, inputs.astype(jnp.float32))
    assert error(dhead_DxV, true_DxV) < 5e-4


def test_gradient_keeps_a_loss_scale():
    inputs = make_inputs().astype(jnp.float16)
    scaled, unscaled = (gradients(next_token_loss, inputs, scale=s) for s in (2.0**12, 1.0))
    assert max(map(error, scaled, unscaled)) < 1e-3


def test_weights_are_a_mask_and_a_mean():
    inputs = make_inputs()
    loss, metrics = next_token_loss(*inputs)
    # Neither the scale of the weights nor the targets of weight 0 matter.
    unknown_BxT = jnp.where(inputs.weights == 0, -100, inputs.targets)
    same, double = next_token_loss(
        *inputs._replace(targets=unknown_BxT, weights=2 * inputs.weights)
    )
    chex.assert_trees_all_close((loss, metrics.accuracy), (same, double.accuracy), rtol=1e-6)
    chex.assert_trees_all_close(2 * metrics.weight, double.weight)


def test_no_weight_gives_zero():
    inputs = make_inputs()._replace(weights=jnp.zeros((B, T)))
    loss, metrics = next_token_loss(*inputs)
    assert (loss, metrics.accuracy, metrics.weight) == (0, 0, 0)
    assert not any(map(jnp.any, gradients(next_token_loss, inputs)))


def test_equal_logits_are_not_all_correct():
    inputs = make_inputs()._replace(x=jnp.zeros((B, T, D)))
    loss, metrics = next_token_loss(*inputs, chunk=10)
    np.testing.assert_allclose(loss, math.log(V), rtol=1e-6)
    assert metrics.accuracy < 0.1


def test_mixed_dtypes():
    inputs = make_inputs()
    inputs = inputs._replace(x=inputs.x.astype(jnp.bfloat16))
    dx_BxTxD, dhead_DxV = gradients(next_token_loss, inputs, chunk=10)
    true_BxTxD, true_DxV = gradients(plain_loss, inputs.astype(jnp.float32))
    assert error(dhead_DxV, true_DxV) < 1e-6
    assert error(dx_BxTxD, true_BxTxD) < 3e-3  # it is stored in bfloat16


def equations(jaxpr) -> Iterator[JaxprEqn]:
    for equation in jaxpr.eqns:
        yield equation
        for inner in jaxprs_in_params(equation.params):
            yield from equations(inner)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_all_logits_never_exist(dtype: str):
    batch, length, width, vocab, chunk = 4, 256, 32, 8192, 512
    inputs = (
        jax.ShapeDtypeStruct((batch, length, width), dtype),
        jax.ShapeDtypeStruct((width, vocab), dtype),
        jax.ShapeDtypeStruct((batch, length), jnp.int32),
        jax.ShapeDtypeStruct((batch, length), jnp.float32),
    )
    step = jax.value_and_grad(lambda *args: next_token_loss(*args, chunk=chunk)[0], (0, 1))
    shapes = [
        variable.aval.shape  # pyright: ignore[reportAttributeAccessIssue]
        for equation in equations(jax.make_jaxpr(step)(*inputs).jaxpr)
        for variable in equation.outvars
    ]
    # Equality shows that `equations` found the logits of a chunk.
    assert max(map(math.prod, shapes)) == batch * length * chunk

    stats = quick_jit(step).lower(*inputs).compile().memory_analysis()
    assert stats is not None
    logits_of_a_chunk = 4 * batch * length * chunk
    assert stats.temp_size_in_bytes < 3 * logits_of_a_chunk  # all the logits would be 16
