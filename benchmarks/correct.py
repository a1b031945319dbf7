"""Checks on the device that is there what tests check on CPUs: that results are right.

    python benchmarks/correct.py [--json FILE]

Fused steps against `reference_step`, offloaded against not, flash attention against plain. A check
prints what it measured beside its bound; the exit status is 1 if one failed. What the device cannot
do is skipped, with the reason. A CPU passes too, and shows that the checks themselves work.
"""

import argparse
import functools
import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from compare import facts
from flax import nnx

import lomo_jax
from lomo_jax import models
from lomo_jax.losses import next_token_loss

STEPS, B, T = 3, 2, 128
CONFIG = models.LlamaConfig(
    vocab_size=2048,
    width=128,
    mlp_width=320,
    num_layers=3,
    num_heads=2,
    num_kv_heads=1,
    head_dim=64,
)
_RULES = {
    "lomo": lomo_jax.lomo(0.1),
    "adalomo": lomo_jax.adalomo(1e-2),
    # A gradient near 0 is rounding, which AdamW with the usual 1e-8 makes as large as a step.
    "adamw": optax.adamw(1e-3, eps=1e-6),
}
_OFFLOADS = {
    "layer inputs": lomo_jax.Offload(activations=True),
    "parameters": lomo_jax.Offload(params=True),
    "optimizer state": lomo_jax.Offload(state=True),
    "all of them": lomo_jax.Offload(params=True, activations=True, state=True),
}


def loss(graphdef: Any, params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
    """Mean next-token loss of packed documents."""
    model = nnx.merge(graphdef, params)
    x_BxTxD = model.hidden(batch["tokens"], segments_BxT=batch.get("segments"))
    weights_BxT = jnp.ones(batch["tokens"].shape).at[:, -1].set(0.0)
    targets_BxT = jnp.roll(batch["tokens"], -1, 1)
    return next_token_loss(x_BxTxD, model.head(), targets_BxT, weights_BxT)[0]


def batches(seed: int, *, packed: bool = False) -> list[dict[str, jax.Array]]:
    """Returns `STEPS` batches of random tokens; packed, each row holds two documents."""
    tokens = np.random.default_rng(seed).integers(CONFIG.vocab_size, size=(STEPS, B, T))
    found = [{"tokens": jnp.asarray(x, jnp.int32)} for x in tokens]
    if packed:
        segments = jnp.broadcast_to(jnp.arange(T) >= 50, (B, T)).astype(jnp.int32)
        found = [batch | {"segments": segments} for batch in found]
    return found


def train(make: Callable[..., lomo_jax.Step], rule: str, dtype: str, **options: Any) -> Any:
    """Returns losses and parameters after `STEPS` steps, NumPy arrays."""
    graphdef, params = models.init(CONFIG, 0, jnp.dtype(dtype))
    step = make(functools.partial(loss, graphdef), _RULES[rule], **options)
    if step.offload.params:
        params = jax.device_put(params, jax.memory.Space.Host)
    data = batches(1)
    state = step.init(params, data[0])
    run, losses = jax.jit(step, donate_argnums=(0, 1)), []
    for batch in data:
        params, state, out = run(params, state, batch)
        losses.append(out.loss)
    return jax.device_get((losses, params))


def difference(a: Any, b: Any) -> float:
    """Returns the largest difference of any leaf, relative to the leaf's largest element."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    wide = ((np.asarray(x, np.float32), np.asarray(y, np.float32)) for x, y in pairs)
    return max(float(np.abs(x - y).max() / np.abs(y).max()) for x, y in wide)


def check_fused() -> Iterator[dict[str, Any]]:
    options = {"clip_norm": 0.5, "microbatches": 2}
    for rule, extra in (("lomo", {}), ("adalomo", {}), ("adamw", {}), ("adalomo", options)):
        with jax.default_matmul_precision("highest"):
            found = [
                train(make, rule, "float32", **extra)
                for make in (lomo_jax.fused_step, lomo_jax.reference_step)
            ]
        name = ", ".join(["fused = reference", rule, *extra])
        # Tests hold one step to 1e-5; three add up.
        yield {"check": name, "measured": difference(*found), "bound": 3e-5}


def check_offload() -> Iterator[dict[str, Any]]:
    # One rounding of a weight in bfloat16.
    for dtype, names, bound in (
        ("float32", list(_OFFLOADS), 1e-5),
        ("bfloat16", ["all of them"], 2**-7),
    ):
        with jax.default_matmul_precision("highest"):
            plain = train(lomo_jax.fused_step, "adalomo", dtype)
            for name in names:
                found = train(lomo_jax.fused_step, "adalomo", dtype, offload=_OFFLOADS[name])
                yield {
                    "check": f"offloaded = not, {dtype}, {name}",
                    "measured": difference(found, plain),
                    "bound": bound,
                }


def check_attention() -> Iterator[dict[str, Any]]:
    device = jax.devices()[0]
    capability = getattr(device, "compute_capability", "0.0")
    if device.platform != "gpu" or float(capability) < 8.0:
        yield {"check": "flash attention = plain", "skipped": f"no cuDNN on {device.device_kind}"}
        return
    for packed in (False, True):
        batch = batches(2, packed=packed)[0]
        grads = {}
        for attention, dtype in (("xla", "float32"), ("xla", "bfloat16"), ("cudnn", "bfloat16")):
            graphdef, _ = models.abstract(CONFIG, dtype, attention)
            params = models.init(CONFIG, 0, jnp.bfloat16)[1]
            params = jax.tree.map(lambda x, d=dtype: x.astype(d), params)
            with jax.default_matmul_precision("highest"):
                gradient = jax.jit(jax.grad(functools.partial(loss, graphdef)))(params, batch)
            leaves = jax.tree.leaves(jax.device_get(gradient))
            grads[attention, dtype] = np.concatenate([x.astype(np.float32).ravel() for x in leaves])
        exact = grads["xla", "float32"]
        xla, cudnn = (
            float(np.linalg.norm(grads[kind, "bfloat16"] - exact) / np.linalg.norm(exact))
            for kind in ("xla", "cudnn")
        )
        # Both round; flash attention may be no farther from the float32 gradient.
        documents = "packed documents" if packed else "one document"
        name = f"flash attention = plain, gradient, {documents}"
        yield {"check": name, "measured": cudnn, "bound": 1.2 * xla}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="a file to keep the results in, as they come")
    flags = parser.parse_args()
    data = facts("correct") | {"device": jax.devices()[0].device_kind, "checks": []}
    failed = False
    for checks in (check_fused, check_offload, check_attention):
        for result in checks():
            if "skipped" in result:
                print(f"skipped  {result['check']}: {result['skipped']}", flush=True)
            else:
                passed = result["measured"] <= result["bound"]
                failed |= not passed
                measured, bound = result["measured"], result["bound"]
                word = "passed" if passed else "FAILED"
                print(f"{word}   {result['check']}: {measured:.2g}, bound {bound:.2g}", flush=True)
            data["checks"].append(result)
            if flags.json:
                flags.json.write_text(json.dumps(data, indent=1) + "\n")
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
