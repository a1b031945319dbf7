"""One gradient at a time in a Flax nnx project, compared with the plain step.

    python examples/nnx_model.py

A model of eight scanned blocks with dropout learns a sum of sines, first with `fused_step`, then
with `reference_step`, which holds all gradients. It takes seconds on a CPU.
"""

import jax
import jax.numpy as jnp
from flax import nnx

import lomo_jax

LAYERS, WIDTH, BATCH, STEPS = 8, 128, 32, 20


class Block(nnx.Module):
    def __init__(self, rngs):
        self.up = nnx.Linear(WIDTH, 4 * WIDTH, rngs=rngs)
        self.down = nnx.Linear(4 * WIDTH, WIDTH, rngs=rngs)
        self.dropout = nnx.Dropout(0.1, rngs=rngs)

    def __call__(self, x):
        return x + self.dropout(self.down(nnx.gelu(self.up(x))))


class Model(nnx.Module):
    def __init__(self, rngs):
        # All blocks at once: every weight, and the dropout's random state, is [LAYERS, ...].
        self.blocks = nnx.split_rngs(splits=LAYERS)(nnx.vmap(Block))(rngs)
        self.head = nnx.Linear(WIDTH, 1, rngs=rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        @nnx.remat  # for the plain step; the fused step recomputes layers anyway
        def run(x, block):
            return block(x)

        return self.head(run(x, self.blocks))


def train(make_step):
    graphdef, params, rest = nnx.split(Model(nnx.Rngs(0)), nnx.Param, ...)

    def loss_fn(params, batch):
        model = nnx.merge(graphdef, params, batch["rest"], copy=True)
        loss = jnp.mean((model(batch["x"]) - batch["y"]) ** 2)
        return loss, nnx.state(model, nnx.Not(nnx.Param))

    x = jax.random.normal(jax.random.key(1), (BATCH, WIDTH))
    batch = {"x": x, "y": jnp.sin(x).sum(axis=1, keepdims=True), "rest": rest}
    step = make_step(loss_fn, lomo_jax.adalomo(1e-2), has_aux=True)
    state = step.init(params, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    for _ in range(STEPS):
        params, state, out = compiled(params, state, batch)
        batch["rest"] = out.aux  # the next step drops other units
    temporaries = compiled.memory_analysis().temp_size_in_bytes / 2**20
    print(f"{make_step.__name__:14}  loss {out.loss:.4f}  temporaries {temporaries:.1f} MiB")


if __name__ == "__main__":
    train(lomo_jax.fused_step)
    train(lomo_jax.reference_step)
