"""Where the layers are."""

import jax
import jax.numpy as jnp
from flax import linen, nnx

from .registry import (
    Sizes,
    block,
    error,
    idiom,
    layers_and_out,
    mapped,
    pair,
    scan,
    stack,
)


def move(tree, source, destination):
    return jax.tree.map(lambda w: jnp.moveaxis(w, source, destination), tree)


@idiom({"layers": 1})
def axis_1(s):
    loss, params, batch = mapped(lambda w, _: move(w, 1, 0))(s)
    return loss, {**params, "layers": move(params["layers"], 0, 1)}, batch


@idiom({"layers/up": 2, "layers/down": 2, "layers/scale": 1})
def last_axis(s):
    loss, params, batch = mapped(lambda w, _: move(w, -1, 0))(s)
    return loss, {**params, "layers": move(params["layers"], 0, -1)}, batch


@idiom({"layers/up": 1, "layers/down": 0, "layers/scale": 0})
def axes_1_and_0(s):
    loss, params, batch = mapped(lambda w, _: {**w, "up": w["up"].swapaxes(0, 1)})(s)
    layers = {**params["layers"], "up": params["layers"]["up"].swapaxes(0, 1)}
    return loss, {**params, "layers": layers}, batch


@idiom({"layers": 1})
def axis_1_cast(s):
    half = lambda w: jnp.moveaxis(w.astype(jnp.bfloat16), 1, 0) * jnp.bfloat16(0.5)  # noqa: E731

    def loss(p, b):
        y = scan(jax.tree.map(half, p["layers"]), b["x"].astype(jnp.bfloat16))
        return error(y.astype(jnp.float32) @ p["out"], b["y"])

    params = layers_and_out(s)
    return loss, {**params, "layers": move(params["layers"], 0, 1)}, pair(s)


@idiom({"": 1})
def axis_1_indexed(s):
    def loss(p, b):
        def body(i, x):
            take = lambda w: jax.lax.dynamic_index_in_dim(w, i, 1, keepdims=False)  # noqa: E731
            return block(x, jax.tree.map(take, p))

        return error(jax.lax.fori_loop(0, s.L, body, b["x"]), b["y"])

    return loss, move(stack(s), 0, 1), pair(s)


@idiom({"": 1})
def axis_1_cast_and_indexed(s):
    def loss(p, b):
        half = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)

        def body(i, x):
            take = lambda w: jax.lax.dynamic_index_in_dim(w, i, 1, keepdims=False)  # noqa: E731
            return block(x, jax.tree.map(take, half))

        y = jax.lax.fori_loop(0, s.L, body, b["x"].astype(jnp.bfloat16))
        return error(y, b["y"])

    return loss, move(stack(s), 0, 1), pair(s)


class _Block(linen.Module):
    """A layer whose parameters have names of logical axes, as in MaxText."""

    s: Sizes

    @linen.compact
    def __call__(self, x, _):
        def dense(width, *axes):
            init = linen.with_logical_partitioning(linen.initializers.lecun_normal(), axes)
            return linen.Dense(width, use_bias=False, kernel_init=init)

        h = linen.RMSNorm()(x)
        h = jnp.tanh(dense(self.s.F, "embed", "mlp")(h))
        return x + dense(self.s.D, "mlp", "embed")(h), None


def linen_model(s, axis, unbox):
    class Model(linen.Module):
        @linen.compact
        def __call__(self, x):
            layers = linen.scan(
                linen.remat(_Block, prevent_cse=False),
                variable_axes={"params": axis},
                split_rngs={"params": True},
                in_axes=linen.broadcast,
                length=s.L,
                metadata_params={linen.PARTITION_NAME: "layers"},
            )
            x, _ = layers(s, name="layers")(x, None)
            return linen.Dense(s.D, name="out")(x)

    model, batch = Model(), pair(s)
    params = model.init(jax.random.key(0), batch["x"])["params"]
    loss = lambda p, b: error(model.apply({"params": p}, b["x"]), b["y"])  # noqa: E731
    return loss, linen.meta.unbox(params) if unbox else params, batch


@idiom({"layers": 1})
def linen_axis_1_boxed(s):
    return linen_model(s, 1, unbox=False)


@idiom({"layers": 0})
def linen_axis_0(s):
    return linen_model(s, 0, unbox=True)


class _NnxBlock(nnx.Module):
    def __init__(self, s, rngs):
        self.up = nnx.Linear(s.D, s.F, rngs=rngs)
        self.down = nnx.Linear(s.F, s.D, rngs=rngs)

    def __call__(self, x):
        return x + self.down(jnp.tanh(self.up(x)))


@idiom({"layers": 0})
def nnx_cast(s):
    """The state of an nnx model is cast as one tree."""

    class Model(nnx.Module):
        def __init__(self, rngs):
            keys = jax.random.split(rngs.params(), s.L)
            self.layers = nnx.vmap(lambda key: _NnxBlock(s, nnx.Rngs(key)))(keys)
            self.out = nnx.Linear(s.D, s.D, rngs=rngs)

    graphdef, params = nnx.split(Model(nnx.Rngs(0)))

    @nnx.scan(in_axes=(0, nnx.Carry), out_axes=nnx.Carry)
    def run(layer, x):
        return layer(x)

    def loss(p, b):
        model = nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.bfloat16), p))
        return error(model.out(run(model.layers, b["x"].astype(jnp.bfloat16))), b["y"])

    return loss, params, pair(s)
