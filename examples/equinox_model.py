"""One gradient at a time in an Equinox project, compared with the plain step.

    pip install equinox
    python examples/equinox_model.py

A model of eight scanned blocks with dropout learns a sum of sines, first with `fused_step`, then
with `reference_step`, which holds all gradients. It takes seconds on a CPU.
"""

import equinox as eqx
import jax
import jax.numpy as jnp

import lomo_jax

LAYERS, WIDTH, BATCH, STEPS = 8, 128, 32, 20


class Block(eqx.Module):
    mlp: eqx.nn.MLP
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.mlp = eqx.nn.MLP(WIDTH, WIDTH, 4 * WIDTH, depth=1, activation=jax.nn.gelu, key=key)
        self.dropout = eqx.nn.Dropout(0.1)

    def __call__(self, x, key):
        return x + self.dropout(jax.vmap(self.mlp)(x), key=key)


class Model(eqx.Module):
    blocks: Block
    head: eqx.nn.Linear

    def __init__(self, key):
        self.blocks = eqx.filter_vmap(Block)(jax.random.split(key, LAYERS))  # [LAYERS, ...]
        self.head = eqx.nn.Linear(WIDTH, 1, key=key)

    def __call__(self, x, key):
        weights, static = eqx.partition(self.blocks, eqx.is_array)

        @jax.checkpoint  # for the plain step; the fused step recomputes layers anyway
        def run(x, layer):
            weights, key = layer
            return eqx.combine(weights, static)(x, key), None

        x, _ = jax.lax.scan(run, x, (weights, jax.random.split(key, LAYERS)))
        return jax.vmap(self.head)(x)


def train(make_step):
    params, static = eqx.partition(Model(jax.random.key(0)), eqx.is_inexact_array)

    def loss_fn(params, batch):
        prediction = eqx.combine(params, static)(batch["x"], batch["key"])
        return jnp.mean((prediction - batch["y"]) ** 2)

    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    batch = {"x": x, "y": jnp.sin(x).sum(axis=1, keepdims=True), "key": jax.random.key(2)}
    step = make_step(loss_fn, lomo_jax.adalomo(1e-2))
    state = step.init(params, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    for i in range(STEPS):
        batch["key"] = jax.random.key(i)  # each step drops other units
        params, state, out = compiled(params, state, batch)
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{make_step.__name__:14}  loss {out.loss:.4f}  temporaries {temporaries:.1f} MiB")


if __name__ == "__main__":
    train(lomo_jax.fused_step)
    train(lomo_jax.reference_step)
