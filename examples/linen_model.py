"""One gradient at a time in a Flax linen project, compared with the plain step.

    python examples/linen_model.py

A model of eight scanned blocks with dropout learns a sum of sines, first with `fused_step`, then
with `reference_step`, which holds all gradients. It takes seconds on a CPU.
"""

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

import lomo_jax

LAYERS, WIDTH, BATCH, STEPS = 8, 128, 32, 20


class Block(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        y = nn.Dense(WIDTH)(nn.gelu(nn.Dense(4 * WIDTH)(x)))
        return x + nn.Dropout(0.1, deterministic=False)(y), None


class Model(nn.Module):
    @nn.compact
    def __call__(self, x):
        # Every weight is [LAYERS, ...]. nn.remat is for the plain step; the fused step recomputes
        # layers anyway.
        stack = nn.scan(
            nn.remat(Block, prevent_cse=False),
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=LAYERS,
        )
        x, _ = stack()(x, None)
        return nn.Dense(1)(x)


def loss_fn(params, batch):
    prediction = Model().apply({"params": params}, batch["x"], rngs={"dropout": batch["key"]})
    return jnp.mean((prediction - batch["y"]) ** 2)


def train(make_step):
    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    batch = {"x": x, "y": jnp.sin(x).sum(axis=1, keepdims=True), "key": jax.random.key(2)}
    params = Model().init({"params": jax.random.key(0), "dropout": batch["key"]}, x)["params"]
    step = make_step(loss_fn, optax.adafactor(1e-2))
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
