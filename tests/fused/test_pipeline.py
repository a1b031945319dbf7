"""What comes from the host is read one step ahead, and what goes there is written one step later.

The steps of a layer are taken from the jaxpr: the equations between two barriers. Reads and writes
are marked, products have names.
"""

import jax
import jax.numpy as jnp
import pytest
from jax.ad_checkpoint import checkpoint_name

from lomo_jax.fused import jaxprs
from lomo_jax.fused.order import divide, trace_layer
from lomo_jax.fused.pipeline import Layer, evaluate, read_first

B, D, F = 4, 512, 1024  # a weight is 2 MiB, and the scale is small
UP, DOWN, SCALE = range(3)
SHAPES = [(D, F), (F, D), (D,)]


def layer_of(w, x):
    return jnp.tanh((x * w[SCALE]) @ w[UP]) @ w[DOWN]


def gradients(inputs, x, ct):
    _, vjp = jax.vjp(layer_of, inputs, x)
    grads, ct_x = vjp(ct)
    return grads, ct_x


class Stacks(Layer):
    """Two layers of each input. Each read and write leaves a mark in the jaxpr."""

    def read(self, carry, k):
        stacks, i = carry
        return checkpoint_name(stacks[k][0][i], f"read {k}")

    def read_state(self, carry, k):
        stacks, i = carry
        return checkpoint_name(stacks[k][1][i], f"state {k}")

    def following(self, carry):
        stacks, i = carry
        return stacks, i - 1

    def use(self, carry, ks, grads, params, states):
        news = []
        for k, grad in zip(ks, grads, strict=True):
            param = params[k] if k in params else self.read(carry, k)
            state = states[k] if k in states else self.read_state(carry, k)
            state = state + checkpoint_name(grad, f"use {k}")
            news.append((param - 0.1 * state, state))
        return carry, news

    def write(self, carry, ks, news):
        stacks, i = carry
        stacks = list(stacks)
        for k, new in zip(ks, news, strict=True):
            stacks[k] = [
                x.at[i].set(checkpoint_name(layer, f"write {k}"))
                for x, layer in zip(stacks[k], new, strict=True)
            ]
        return stacks, i


@pytest.fixture
def values():
    keys = iter(jax.random.split(jax.random.key(0), 8))
    stacks = [[jax.random.normal(next(keys), (2, *shape)) / 32] * 2 for shape in SHAPES]
    x, ct = (jax.random.normal(next(keys), (B, D)) for _ in range(2))
    return stacks, x, ct


def run(stacks, x, ct, **options):
    """Runs layer 1; returns the cotangent of x, the stacks, and what was read of layer 0."""
    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in SHAPES]
    steps = divide(trace_layer(gradients, shapes, (x, ct)), **options)
    layer, carry = Stacks(), (stacks, jnp.int32(1))
    first = read_first(steps, layer, carry)
    ct_x, (stacks, _), following = evaluate(steps, (x, ct), layer, carry, first)
    return ct_x, stacks, following


EVERYTHING = {"on_host": range(3), "states_on_host": range(3)}


def steps_of(values, **options):
    """Returns the marks and products of each step, and whether each crosses the barrier after."""
    eqns = jaxprs.open_jaxpr(jax.make_jaxpr(lambda *args: run(*args, **options))(*values)).eqns
    steps = [[]]
    for eqn in eqns:
        if eqn.primitive.name == "name":
            steps[-1].append(eqn.params["name"])
        elif eqn.primitive.name == "dot_general":
            steps[-1].append("product")
        elif eqn.primitive.name == "optimization_barrier":
            steps.append([])
    return steps


@pytest.mark.parametrize(
    "options",
    [
        {"read_ahead": True},
        EVERYTHING,
        {"on_host": [DOWN]},
        {"states_on_host": [UP]},
        EVERYTHING | {"all_at_once": True},
    ],
    ids=["read ahead", "everything", "one", "a state", "all at once"],
)
def test_the_results_are_the_same(values, options, assert_close):
    ct_x, stacks, _ = run(*values)
    found_ct_x, found, following = run(*values, **options)
    assert_close((found_ct_x, found), (ct_x, stacks))
    for x in following:  # of layer 0, which has not changed
        assert any(x.shape == y[0].shape and (x == y[0]).all() for pair in stacks for y in pair)


def test_each_step_has_one_product(values):
    products = [step.count("product") for step in steps_of(values, **EVERYTHING)]
    assert max(products) == 1
    assert sum(products) == 5  # up again; the gradients of down, up, and of their inputs


def test_a_weight_is_read_once_in_the_step_before_its_product(values):
    steps = steps_of(values, **EVERYTHING)
    reads = [n for n, step in enumerate(steps) if f"read {DOWN}" in step]
    # Down is first read for the gradient of the hidden values, in the step after `up`.
    assert reads == [0]
    # Up is there from the start; its second read is that of the next layer.
    reads = [n for n, step in enumerate(steps) if f"read {UP}" in step]
    assert reads[0] == 0
    assert len(reads) == 2
    assert "product" in steps[reads[1]], "nothing runs beside it"


def test_a_layer_is_written_in_the_step_after_its_update(values):
    steps = steps_of(values, **EVERYTHING)
    for k in (UP, DOWN):
        (used,) = [n for n, step in enumerate(steps) if f"use {k}" in step]
        (written,) = {n for n, step in enumerate(steps) if f"write {k}" in step}
        assert written == used + 1
    # Down leaves beside a product.
    assert "product" in steps[next(n for n, s in enumerate(steps) if f"write {DOWN}" in s)]


def test_a_state_is_read_beside_the_product_before_that_of_its_gradient(values):
    steps = steps_of(values, **EVERYTHING)
    for k in (UP, DOWN):
        (used,) = [n for n, step in enumerate(steps) if f"use {k}" in step]
        (read,) = [n for n, step in enumerate(steps) if f"state {k}" in step]
        assert "product" in steps[read]
        assert sum(step.count("product") for step in steps[read + 1 : used + 1]) == 1


def test_nothing_is_fetched_beside_an_update(values):
    """XLA may start a transfer as late as it can: then it would wait for it after the update."""
    for step in steps_of(values, **EVERYTHING):
        if any(mark.startswith("use") for mark in step):
            assert not [mark for mark in step if mark.startswith(("read", "state"))]


def test_nothing_is_read_ahead_on_one_device(values):
    steps = steps_of(values)
    read_and_used = [step for step in steps if f"use {DOWN}" in step]
    assert f"state {DOWN}" in read_and_used[0]
    assert f"write {DOWN}" in read_and_used[0]


def test_one_large_array_is_fetched_beside_each_product():
    """The last of these products needs three arrays from the host, such as saved residuals."""
    large, small = (jax.ShapeDtypeStruct((n, D), jnp.float32) for n in (D, B))

    def layer(inputs, x):
        a, b, c, d, e = inputs
        return [], (x @ a @ b) @ (c * d * e)

    steps = divide(trace_layer(layer, [large] * 5, (small,)), on_host=range(5))
    fetched = [
        len([v for v in step.needs if before is None or v not in before.needs])
        for before, step in zip([None, *steps.steps], steps.steps, strict=False)
    ]
    assert sum(fetched) == 5
    assert max(fetched[1:]) == 1


def test_a_function_of_shards_without_a_product_has_no_step_of_its_own():
    """Such as the mask of attention: what it reads is then read when it is needed."""
    mesh = jax.make_mesh((1,), ("x",))

    def layer(inputs, x):
        w, mask = inputs
        spec = jax.sharding.PartitionSpec()
        bias = jax.shard_map(
            lambda m: jnp.where(m > 0, 0.0, -1.0), mesh=mesh, in_specs=spec, out_specs=spec
        )(mask)
        return [], ((x @ w) @ w + bias @ jnp.ones((D, D))) @ w

    shapes = [jax.ShapeDtypeStruct((n, D), jnp.float32) for n in (D, B)]
    steps = divide(trace_layer(layer, shapes, (shapes[1],)), on_host=range(2)).steps
    names = [[eqn.primitive.name for eqn in step.eqns] for step in steps]
    with_shards = [found for found in names if "shard_map" in found]
    assert with_shards
    assert all("dot_general" in found for found in with_shards)
