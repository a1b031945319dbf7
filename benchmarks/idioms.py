"""Plans losses as people write them: which stacks are walked layer by layer, and the memory.

    JAX_PLATFORMS=cpu python benchmarks/idioms.py

Prints the table of docs/guides/losses.md. Nothing is run: XLA plans the temporaries of the fused
step and of a plain step for a CPU. Temporaries are everything but parameters, optimizer state and
batch. Each model is a stack of 16 MLPs in float32, trained with AdaLomo.
"""

import warnings

import jax
import jax.numpy as jnp

import lomo_jax

L, B, T, D, F = 16, 4, 16, 128, 512
IDIOMS = {}


def idiom(title, *, axis: int | None = 0, trainable=None, batch=None):
    """Registers a loss ``(params, batch) -> loss``.

    Args:
      title: its first cell in the table.
      axis: where the layers of the parameters are; None for a list of layers.
      trainable: option of the step.
      batch: shapes of the batch besides inputs and targets.
    """

    def register(loss):
        IDIOMS[title] = loss, axis, trainable, batch or {}
        return loss

    return register


def block(x_BxTxD, w):
    """Applies one layer."""
    return x_BxTxD + jnp.tanh(x_BxTxD @ w["up"]) @ w["down"]


def scan(layers, x_BxTxD):
    """Applies layers that are stacked along axis 0."""
    body = jax.checkpoint(block)
    return jax.lax.scan(lambda x, w: (body(x, w), None), x_BxTxD, layers)[0]


def error(y_BxTxD, batch):
    """Returns the mean squared error in float32."""
    return jnp.mean((y_BxTxD.astype(jnp.float32) - batch["y"]) ** 2)


@idiom("a scan of the parameters")
def _(p, b):
    return error(scan(p["layers"], b["x"]), b)


@idiom("cast to bfloat16, then scan")
def _(p, b):
    p = jax.tree.map(lambda w: w.astype(jnp.bfloat16), p)
    return error(scan(p["layers"], b["x"].astype(jnp.bfloat16)), b)


@idiom("layers on axis 1, as in MaxText", axis=1)
def _(p, b):
    return error(scan(jax.tree.map(lambda w: jnp.moveaxis(w, 1, 0), p["layers"]), b["x"]), b)


@idiom("a mask of the batch on the weights", batch={"mask": (L, D, F)})
def _(p, b):
    layers = p["layers"] | {"up": p["layers"]["up"] * b["mask"]}
    return error(scan(layers, b["x"]), b)


@idiom("weight normalisation")
def _(p, b):
    up = p["layers"]["up"]
    layers = p["layers"] | {"up": up / jnp.linalg.norm(up, axis=1, keepdims=True)}
    return error(scan(layers, b["x"]), b)


@idiom("quantisation, straight through")
def _(p, b):
    def quantised(w):
        return w + jax.lax.stop_gradient(jnp.round(w * 16) / 16 - w)

    return error(scan(jax.tree.map(quantised, p["layers"]), b["x"]), b)


@idiom("LoRA merged into a frozen base", trainable=lambda name: "lora" in name)
def _(p, b):
    lora = p["lora"]
    layers = p["layers"] | {"up": p["layers"]["up"] + lora["a"] @ lora["b"]}
    return error(scan(layers, b["x"]), b)


@idiom("`fori_loop` that reads `w[i]`")
def _(p, b):
    def body(i, x):
        return block(x, jax.tree.map(lambda w: w[i], p["layers"]))

    return error(jax.lax.fori_loop(0, L, body, b["x"]), b)


@idiom("`w[:8]` in one scan, `w[8:]` in the next")
def _(p, b):
    first, second = (jax.tree.map(lambda w, k=k: w[k], p["layers"]) for k in _HALVES)
    return error(scan(second, scan(first, b["x"])), b)


_HALVES = (slice(0, L // 2), slice(L // 2, L))


@idiom("two calls, as for chosen and rejected answers")
def _(p, b):
    chosen, rejected = (scan(p["layers"], b[k]).sum((1, 2)) for k in "xy")
    return -jnp.mean(jax.nn.log_sigmoid(chosen - rejected))


@idiom("groups of layers in a scan of scans")
def _(p, b):
    groups = jax.tree.map(lambda w: w.reshape(4, -1, *w.shape[1:]), p["layers"])
    run = jax.checkpoint(lambda x, group: (scan(group, x), None))
    return error(jax.lax.scan(run, b["x"], groups)[0], b)


@idiom("a penalty on all parameters")
def _(p, b):
    penalty = sum(jnp.sum(w**2) for w in jax.tree.leaves(p))
    return error(scan(p["layers"], b["x"]), b) + 1e-4 * penalty


@idiom("one call after the other, as in a recurrence")
def _(p, b):
    return error(scan(p["layers"], scan(p["layers"], b["x"])), b)


@idiom("a scan of layers in a loop over examples")
def _(p, b):
    return jax.lax.map(lambda b: error(scan(p["layers"], b["x"]), b), b).mean()


@idiom("a Python loop that reads `w[0]`, `w[1]`, ...")
def _(p, b):
    x = b["x"]
    for i in range(L):
        x = block(x, jax.tree.map(lambda w, i=i: w[i], p["layers"]))
    return error(x, b)


@idiom("a list of layers, stacked in the loss", axis=None)
def _(p, b):
    return error(scan(jax.tree.map(lambda *w: jnp.stack(w), *p["layers"]), b["x"]), b)


def shapes(axis, *, lora, extra):
    """Returns shapes of parameters and batch.

    Args:
      axis: of the layers; None for a list of layers.
      lora: whether there are adapters.
      extra: shapes in the batch besides inputs and targets.
    """

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, jnp.float32)

    def weights(*shape):
        return array(*shape[: axis or 0], *([] if axis is None else [L]), *shape[axis or 0 :])

    layers = {"up": weights(D, F), "down": weights(F, D)}
    params = {"layers": [layers] * L if axis is None else layers}
    if lora:
        params["lora"] = {"a": weights(D, 8), "b": weights(8, F)}
    batch = {name: array(B, T, D) for name in "xy"}
    return params, batch | {name: array(*shape) for name, shape in extra.items()}


def plan(make_step, loss, params, batch, trainable):
    """Returns the step, not compiled, and its temporaries, MiB."""
    step = make_step(loss, lomo_jax.adalomo(1e-3), trainable=trainable)
    with warnings.catch_warnings(action="ignore"):  # the table says what gets a whole gradient
        state = jax.eval_shape(step.init, params, batch)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    memory = compiled.memory_analysis()
    assert memory is not None, "CPUs plan their memory"
    return step, memory.temp_size_in_bytes / 2**20


def row(title):
    """Returns the cells of the row of an idiom."""
    loss, axis, trainable, extra = IDIOMS[title]
    params, batch = shapes(axis, lora=trainable is not None, extra=extra)
    step, fused = plan(lomo_jax.fused_step, loss, params, batch, trainable)
    _, plain = plan(lomo_jax.reference_step, loss, params, batch, trainable)
    reasons = dict.fromkeys(x.reason for x in step.explain(params, batch).whole_stacks)
    what = f"whole gradient: {'; '.join(reasons)}" if reasons else "walked layer by layer"
    return [title, what, f"{fused:.1f}", f"{plain:.1f}"]


def main():
    """Prints the table, in Markdown."""
    size = 2 * L * D * F * 4 / 2**20
    print(f"jax {jax.__version__}, CPU plan, MiB; {L} layers, {size:.0f} MiB of parameters")
    print("| the loss | what happens to the stack | fused | plain |")
    print("|---|---|---|---|")
    for title in IDIOMS:
        print("|", " | ".join(row(title)), "|", flush=True)


if __name__ == "__main__":
    main()
