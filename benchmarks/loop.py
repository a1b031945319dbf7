"""Measures what the trainer's loop adds to the bare compiled step.

    python benchmarks/loop.py [--rounds N]

A step of the model takes about 100 ms on two CPU cores. Each round trains it with
`lomo_jax.training.loop.train`, then calls the compiled step on one batch in a bare loop. Prints the
medians over rounds, their ratio, and the median of the ratios within a round. The time in the loop
comes from the tokens per second in `metrics.jsonl`, without evaluations and checkpoints.
"""

import argparse
import contextlib
import io
import json
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import jax

from lomo_jax.models import DecoderConfig
from lomo_jax.training import (
    Config,
    DataConfig,
    MeshConfig,
    ModelConfig,
    devices,
    loop,
    model,
)
from lomo_jax.training.step import make_step

_STEPS = 40


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        text = Path(folder, "text.txt")
        text.write_text("".join(f"Line {n} of a text without content.\n" for n in range(20_000)))
        cache = ("jax_compilation_cache_dir", str(Path(folder, "cache")))
        jax.config.update(*cache)
        times = {"bare step": [], "loop": []}
        for number in range(rounds):
            config = _config(text, Path(folder, str(number)))
            times["bare step"].append(_bare(config))
            times["loop"].append(_loop(config))
    bare, inside = (statistics.median(times[name]) for name in times)
    ratios = sorted(a / b for a, b in zip(times["loop"], times["bare step"], strict=True))
    print(f"bare step {bare * 1e3:.1f} ms, in the loop {inside * 1e3:.1f} ms")
    by_round = f"{statistics.median(ratios):.3f} (of {ratios[0]:.3f} to {ratios[-1]:.3f})"
    print(f"ratio of the medians {inside / bare:.3f}, median of the ratios {by_round}")


def _config(text: Path, workdir: Path) -> Config:
    shape: dict[str, Any] = {
        "vocab_size": 257,
        "width": 256,
        "mlp_width": 768,
        "num_layers": 6,
        "num_heads": 4,
    }
    shape |= {"num_kv_heads": 4, "head_dim": 64, "max_length": 256}
    return Config(
        model=ModelConfig(init="random", architecture=DecoderConfig(**shape)),
        data=DataConfig(str(text), eval_fraction=0.01),
        mesh=MeshConfig(fsdp=1),
        batch_size=2,
        sequence_length=168,
        steps=_STEPS,
        param_dtype="float32",
        eval_every=0,
        eval_batches=1,
        log_every=_STEPS // 2,
        checkpoint_every=0,
        workdir=str(workdir),
    )


def _loop(config: Config) -> float:
    """Returns seconds per step in the second half of a run."""
    with contextlib.redirect_stdout(io.StringIO()):
        loop.train(config)
    lines = Path(config.workdir, "metrics.jsonl").read_text().splitlines()
    records = [r for r in map(json.loads, lines) if "tokens_per_second" in r]
    return config.batch_size * config.sequence_length / records[-1]["tokens_per_second"]


def _bare(config: Config) -> float:
    """Returns seconds per step of the same step in a bare loop."""
    mesh = devices.make_mesh(config.mesh, config.batch_size, config.microbatches)
    with jax.set_mesh(mesh):
        found = model.abstract(config.model, config.param_dtype, config.sequence_length, mesh=mesh)
        params = model.load_params(config.model, found, mesh=mesh)
        step = make_step(found.loss, config.make_optimizer(), **config.step_options())
        shapes = devices.batch_shapes(config.batch_size, config.sequence_length, mesh)
        batch = jax.tree.map(
            lambda x: jax.device_put(jax.numpy.ones(x.shape, x.dtype), x.sharding), shapes
        )
        state = jax.jit(lambda params: step.init(params, shapes))(params)
        update = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, shapes).compile()
        for _half in range(2):
            started = time.perf_counter()
            for _ in range(_STEPS // 2):
                params, state, out = update(params, state, batch)
            jax.block_until_ready((params, out))
            seconds = (time.perf_counter() - started) / (_STEPS // 2)
    return seconds


if __name__ == "__main__":
    main()
