"""Checks on the device of this machine what the tests check on CPUs: correct results.

    python benchmarks/correct.py [--quick] [--json FILE]

Compares fused steps with `reference_step`, offloaded steps with plain ones, and flash attention
with plain attention. Each check prints its difference and its bound; the exit status is 1 if one
failed. A check that the device cannot run is skipped with the reason. A CPU passes too, which shows
that the checks work.
"""

import argparse
import functools
import itertools
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
CONFIG = models.DecoderConfig(
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
    # With the default 1e-8, AdamW turns the rounding of a gradient near 0 into a full step.
    "adamw": optax.adamw(1e-3, eps=1e-6),
}
_OFFLOADS = {
    "layer inputs": lomo_jax.Offload(activations=True),
    "parameters": lomo_jax.Offload(params=True),
    "optimizer state": lomo_jax.Offload(state=True),
    "all of them": lomo_jax.Offload(params=True, activations=True, state=True),
}


def loss(graphdef: Any, params: nnx.State, batch: dict[str, jax.Array]) -> jax.Array:
    """Returns the mean next-token loss of packed documents."""
    model = nnx.merge(graphdef, params)
    x_BxTxD = model.hidden(batch["tokens"], segments_BxT=batch.get("segments"))
    weights_BxT = jnp.ones(batch["tokens"].shape).at[:, -1].set(0.0)
    targets_BxT = jnp.roll(batch["tokens"], -1, 1)
    return next_token_loss(x_BxTxD, model.head(), targets_BxT, weights_BxT)[0]


def batches(seed: int, *, packed: bool = False) -> list[dict[str, jax.Array]]:
    """Returns `STEPS` batches of random tokens; if packed, with two documents per sequence."""
    tokens = np.random.default_rng(seed).integers(CONFIG.vocab_size, size=(STEPS, B, T))
    found = [{"tokens": jnp.asarray(x, jnp.int32)} for x in tokens]
    if packed:
        segments = jnp.broadcast_to(jnp.arange(T) >= 50, (B, T)).astype(jnp.int32)
        found = [batch | {"segments": segments} for batch in found]
    return found


def train(make: Callable[..., lomo_jax.Step], rule: str, dtype: str, **options: Any) -> Any:
    """Returns the losses of `STEPS` steps and the final parameters, as NumPy arrays."""
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
    """Returns the largest difference in any leaf, relative to its largest element."""
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
        # The tests allow 1e-5 for one step.
        yield {"check": name, "measured": difference(*found), "bound": 3e-5}


def check_offload() -> Iterator[dict[str, Any]]:
    # 2**-7: one rounding of a bfloat16 weight.
    for dtype, names, bound in (
        ("float32", list(_OFFLOADS), 1e-5),
        ("bfloat16", ["all of them"], 2**-7),
    ):
        with jax.default_matmul_precision("highest"):
            plain = train(lomo_jax.fused_step, "adalomo", dtype)
            for name in names:
                found = train(lomo_jax.fused_step, "adalomo", dtype, offload=_OFFLOADS[name])
                yield {
                    "check": f"offloaded = plain, {dtype}, {name}",
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
        # Both round. Flash attention may be hardly farther from the float32 gradient.
        documents = "packed documents" if packed else "one document"
        name = f"flash attention = plain, gradient, {documents}"
        yield {"check": name, "measured": cudnn, "bound": 1.2 * xla}


def main() -> int:
    """Runs the command line; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="file to write the results to, as they come")
    parser.add_argument("--quick", action="store_true", help="one check of each kind")
    flags = parser.parse_args()
    data = facts("correct") | {"device": jax.devices()[0].device_kind, "checks": []}
    failed = False
    for checks in (check_fused, check_offload, check_attention):
        for result in itertools.islice(checks(), 1 if flags.quick else None):
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
