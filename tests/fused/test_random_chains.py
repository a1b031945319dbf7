"""Random operations between the parameters and the scan: fused equals plain, layers are walked."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import normal, quick_jit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lomo_jax
from lomo_jax.fused import arrays
from lomo_jax.fused.trace import trace

B = 3

same = settings(
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


class Chain:
    """Operations on a stack of matrices, drawn one after the other.

    Each adds what it needs to `params` or `batch`, and follows the layer axis by itself.
    """

    def __init__(self, draw):
        self.draw = draw
        self.length = draw(st.integers(2, 4))
        sizes = [draw(st.integers(2, 4)), draw(st.integers(2, 4))]
        self.axis = draw(st.integers(0, 2))
        sizes.insert(self.axis, self.length)
        self.params = {"layers": normal(0, *sizes)}
        self.batch = {"x": normal(1, B)}
        self.stacks = {"layers"}
        self.shape = tuple(sizes)
        self.operations = []
        self.names = []
        for _ in range(draw(st.integers(1, 5))):
            kind = draw(st.sampled_from(KINDS))
            operation = getattr(self, kind)()
            function = lambda w, p, b, operation=operation: operation(w, p, b)  # noqa: E731
            whole = jax.eval_shape(
                function, jax.ShapeDtypeStruct(self.shape, jnp.float32), self.params, self.batch
            )
            self.shape = whole.shape
            self.operations.append(function)
            self.names.append(kind)

    def other_axis(self):
        return self.draw(st.sampled_from([d for d in range(3) if d != self.axis]))

    def seed(self):
        return 10 + len(self.operations)

    def cast(self):
        return lambda w, p, b: w.astype(jnp.bfloat16).astype(jnp.float32)

    def constant(self):
        values = np.asarray(normal(self.seed(), *self.shape)) + 1
        return lambda w, p, b: w * values

    def of_batch(self):
        name = f"mask{self.seed()}"
        self.batch[name] = normal(self.seed(), *self.shape)
        return lambda w, p, b: w + b[name]

    def shared(self):
        name, axis = f"shared{self.seed()}", self.other_axis()
        self.params[name] = 1 + normal(self.seed(), self.shape[axis])
        others = [d for d in range(3) if d != axis]
        return lambda w, p, b: w * jnp.expand_dims(p[name], others)

    def gain(self):
        name, axis = f"gain{self.seed()}", self.axis
        self.params[name] = normal(self.seed(), self.length)
        self.stacks.add(name)
        others = [d for d in range(3) if d != axis]
        return lambda w, p, b: w * jnp.exp(jnp.expand_dims(p[name], others))

    def transpose(self):
        order = self.draw(st.permutations(range(3)))
        self.axis = order.index(self.axis)
        return lambda w, p, b: w.transpose(order)

    def transpose_twice(self):
        axis = self.axis
        return lambda w, p, b: jnp.moveaxis(jnp.tanh(jnp.moveaxis(w, axis, 2)), 2, axis)

    def concatenate(self):
        axis = self.other_axis()
        return lambda w, p, b: jnp.concatenate([w, 2 * w], axis)

    def product(self):
        name, axis = f"matrix{self.seed()}", self.axis
        inner = self.shape[2] if axis != 2 else self.shape[1]
        self.params[name] = normal(self.seed(), self.length, inner, 3)
        self.stacks.add(name)
        return lambda w, p, b: jax.vmap(jnp.matmul, (axis, 0), axis)(w, p[name])

    def adapter(self):
        """Adds the product of two parameters."""
        name, axis = f"adapter{self.seed()}", self.axis
        rows, columns = (n for d, n in enumerate(self.shape) if d != axis)
        self.params[name] = {
            "a": normal(self.seed(), self.length, rows, 2),
            "b": normal(self.seed() + 50, self.length, 2, columns),
        }
        self.stacks |= {f"{name}/a", f"{name}/b"}
        return lambda w, p, b: w + jnp.moveaxis(p[name]["a"] @ p[name]["b"], 0, axis)

    def normalise(self):
        axis = self.other_axis()
        return lambda w, p, b: w / jnp.sqrt(1 + jnp.sum(w * w, axis, keepdims=True))

    def slice(self):
        axis = self.other_axis()
        start = int(self.shape[axis] > 1)
        return lambda w, p, b: jax.lax.slice_in_dim(w, start, None, axis=axis)

    def pad(self):
        axis = self.other_axis()
        widths = [(1, 2) if d == axis else (0, 0) for d in range(3)]
        return lambda w, p, b: jnp.pad(w, widths, constant_values=0.5)

    def reshape(self):
        axis, length = self.axis, self.length
        rest = [n for d, n in enumerate(self.shape) if d != axis]

        def operation(w, p, b):
            flat = jnp.cumsum(jnp.moveaxis(w, axis, 0).reshape(length, -1), 1)
            return jnp.moveaxis(flat.reshape(length, *rest[::-1]), 0, axis)

        return operation

    def reverse(self):
        axis = self.other_axis()
        return lambda w, p, b: jnp.flip(w, axis)

    def straight_through(self):
        return lambda w, p, b: w + jax.lax.stop_gradient(jnp.round(w * 4) / 4 - w)

    def loss(self):
        """Returns a loss whose layers mix each weight with another phase, in a drawn loop."""
        axis, length = self.axis, self.length
        loop = self.draw(st.sampled_from(["scan", "reverse", "index", "ranges", "twice"]))
        self.names.append(loop)
        rest = [n for d, n in enumerate(self.shape) if d != axis]
        phase = normal(5, *rest)

        def layer(x, w):
            return x + jnp.sin(jnp.sum(w * phase) + x), None

        def run(w, x):
            if loop == "index":
                take = lambda i: jax.lax.dynamic_index_in_dim(w, i, axis, False)  # noqa: E731
                return jax.lax.fori_loop(0, length, lambda i, x: layer(x, take(i))[0], x)
            w = jnp.moveaxis(w, axis, 0)
            if loop == "ranges":
                x, _ = jax.lax.scan(layer, x, w[:1])
                return jax.lax.scan(layer, 0.9 * x, w[1:])[0]
            return jax.lax.scan(layer, x, w, reverse=loop == "reverse")[0]

        def loss(p, b):
            w = p["layers"]
            for operation in self.operations:
                w = operation(w, p, b)
            y = run(w, b["x"])
            if loop == "twice":
                y = jnp.cos(run(w, 2 * b["x"])) - y
            return jnp.mean(y**2)

        return loss


KINDS = [k for k in vars(Chain) if k not in ("other_axis", "seed", "loss") and k[0] != "_"]


@st.composite
def chains(draw):
    chain = Chain(draw)
    chain.drawn_loss = chain.loss()
    return chain


def check(chain, assert_close):
    loss, params, batch = chain.drawn_loss, chain.params, chain.batch
    traced = trace(loss, params, batch, trainable=arrays.trainable_flags(params, None))
    names = arrays.names(params)
    assert {names[i] for i in traced.stacked} == chain.stacks, chain.names
    step = lomo_jax.fused_step(loss, optax.sgd(1.0))
    new, _, out = quick_jit(step)(params, step.init(params, batch), batch)
    value, grads = quick_jit(jax.value_and_grad(loss))(params, batch)
    tolerance = 2e-2 if "cast" in chain.names else 2e-5
    expected = jax.tree.map(jnp.subtract, params, grads)
    assert_close((out.loss, new), (value, expected), tolerance)


@settings(same, max_examples=12)
@given(chain=chains())
def test_fused_equals_plain(chain, assert_close):
    check(chain, assert_close)


@pytest.mark.slow
@pytest.mark.exhaustive
@settings(same, max_examples=100)
@given(chain=chains())
def test_fused_equals_plain_on_many(chain, assert_close):
    check(chain, assert_close)
