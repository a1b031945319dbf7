"""A run that is killed many times ends with the same losses and weights, bit for bit."""

import random
import signal
import time
from pathlib import Path

import pytest
import runs

from lomo_jax.training import Config, LoraConfig

pytestmark = pytest.mark.slow

STEPS, KILLS = 30, 4
VARIANTS = {
    "plain": {},
    "microbatches, stochastic rounding, float16 with a dynamic loss scale": {
        **{"microbatches": 2, "rounding": "stochastic", "param_dtype": "float16"},
        **{"dynamic_loss_scale": True},
    },
    "adapters with dropout": {
        **{"lora": LoraConfig(rank=2, dropout=0.1), "optimizer": "adamw", "learning_rate": 1e-3}
    },
}


def _start_and_kill(config: Config, rng: random.Random, ceiling: int) -> None:
    """Starts a run and kills it at a random time before it logs step `ceiling`."""
    workdir = Path(config.workdir)
    first = runs.last_step(workdir)
    if rng.random() < 0.25:  # during imports, compilation or the restore
        process = runs.start(config)
        status = process.poll
        moment = time.monotonic() + rng.uniform(0, 8)
        is_time = lambda: time.monotonic() > moment  # noqa: E731
    else:
        process = runs.start_without_imports(config)
        status = lambda: process.exitcode  # noqa: E731
        target = rng.randint(first + 1, max(first + 1, ceiling))
        is_time = lambda: runs.last_step(workdir) >= target  # noqa: E731
    while not is_time() and runs.last_step(workdir) < ceiling:
        assert status() is None, runs.output_of(config).read_text()
        time.sleep(0.01)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    while status() is None:
        time.sleep(0.01)
    assert status() == -signal.SIGKILL, runs.output_of(config).read_text()


@pytest.mark.parametrize(
    "variant",
    [
        pytest.param("plain", marks=pytest.mark.exhaustive),
        "microbatches, stochastic rounding, float16 with a dynamic loss scale",
        pytest.param("adapters with dropout", marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_killed_many_times_equals_an_uninterrupted_one(tmp_path, variant):
    text = runs.write_text(tmp_path / "text.jsonl")
    fields = {
        **{"steps": STEPS, "eval_every": 7, "checkpoint_every": 3, "keep_checkpoints": 2},
        **VARIANTS[variant],
    }
    whole, killed = (
        runs.make_config(text, tmp_path / name, **fields) for name in ("whole", "killed")
    )
    assert runs.start(whole).wait(120) == 0, runs.output_of(whole).read_text()

    rng, workdir = random.Random(0), tmp_path / "killed"
    for kill in range(KILLS):
        _start_and_kill(killed, rng, ceiling=STEPS * (kill + 1) // (KILLS + 1))
    assert runs.start(killed).wait(120) == 0, runs.output_of(killed).read_text()
    assert sum("resumed" in record for record in runs.records(workdir)) >= KILLS // 2
    runs.assert_same_run(workdir, tmp_path / "whole")
