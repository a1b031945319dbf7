"""Plans the temporaries of a step as the model gets deeper.

    JAX_PLATFORMS=cpu python benchmarks/temporaries.py          # planned for the CPU
    JAX_PLATFORMS=cpu python benchmarks/temporaries.py rtx3090  # needs lomo_jax[cuda] but no GPU

Temporaries are everything but parameters, optimizer state and batch. Nothing is run, and the
figures depend only on the version of JAX. The model is a stack of gated MLPs in float32, each layer
under `jax.checkpoint`, trained with AdaLomo.
"""

import sys

import jax
import jax.numpy as jnp

import lomo_jax
from lomo_jax.plan import find, make_mesh

B, T, D, F, V = 4, 128, 512, 1376, 4096
DEPTHS = (8, 16, 32)


def layer(x_BxTxD, w):
    """Applies one layer, with pre-normalisation."""
    normal_BxTxD = x_BxTxD * jax.lax.rsqrt(jnp.mean(x_BxTxD**2, -1, keepdims=True) + 1e-6)
    return x_BxTxD + jax.nn.silu(normal_BxTxD @ w["gate"]) * (normal_BxTxD @ w["up"]) @ w["down"]


def loss(params, tokens_BxT, run):
    """Returns the mean cross-entropy of the next token; `run` applies the layers."""
    x_BxTxD = run(params["embedding"][tokens_BxT], params["layers"])
    log_p_BxTxV = jax.nn.log_softmax(x_BxTxD @ params["head"])
    return -jnp.take_along_axis(log_p_BxTxV[:, :-1], tokens_BxT[:, 1:, None], -1).mean()


def scanned(x_BxTxD, layers):
    """Applies layers that are stacked along axis 0."""
    return jax.lax.scan(lambda x, w: (jax.checkpoint(layer)(x, w), None), x_BxTxD, layers)[0]


def unrolled(x_BxTxD, layers):
    """Applies layers that are in a list."""
    for w in layers:
        x_BxTxD = jax.checkpoint(layer)(x_BxTxD, w)
    return x_BxTxD


def device_sharding(name):
    """Returns the sharding to plan with: on the GPU `name`, or None for the CPU."""
    if name is None:
        return None
    return jax.sharding.SingleDeviceSharding(make_mesh(find(name)).devices.item())


def parameters(run, depth, dtype=jnp.float32, sharding=None):
    """Returns shapes of the parameters, with stacked layers or a list of layers as for `run`."""

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    if run is scanned:
        layers = {name: array(depth, *shape) for name, shape in shapes.items()}
    else:
        layers = [{name: array(*shape) for name, shape in shapes.items()} for _ in range(depth)]
    return {"embedding": array(V, D), "layers": layers, "head": array(D, V)}


def plan(make_step, run, depth, sharding):
    """Returns (parameters, temporaries), MiB."""
    params = parameters(run, depth, sharding=sharding)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32, sharding=sharding)
    step = make_step(lambda params, batch: loss(params, batch, run), lomo_jax.adalomo(1e-3))
    state = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        jax.eval_shape(step.init, params, tokens),
    )
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, tokens).compile()
    size = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(params))
    memory = compiled.memory_analysis()
    assert memory is not None, "CPU and GPU plan their memory"
    return size / 2**20, memory.temp_size_in_bytes / 2**20


def main(name=None):
    """Prints the table, in Markdown."""
    sharding = device_sharding(name)
    layer_input = B * T * D * 4 / 2**20
    print(f"jax {jax.__version__}, {name or 'CPU'} plan, MiB; layer input: {layer_input:.0f}")
    variants = "fused, scanned | plain, scanned | fused, unrolled | plain, unrolled"
    print(f"| layers | parameters | {variants} |")
    print("|---|---|---|---|---|---|")
    for depth in DEPTHS:
        cells = [
            plan(make_step, run, depth, sharding)
            for run in (scanned, unrolled)
            for make_step in (lomo_jax.fused_step, lomo_jax.reference_step)
        ]
        row = [
            f"{depth}",
            f"{cells[0][0]:.0f}",
            *(f"{temporaries:.0f}" for _, temporaries in cells),
        ]
        print("|", " | ".join(row), "|", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
