"""A run that is killed many times ends with the same losses and weights, bit for bit."""

import random
import subprocess
import time

import pytest
import runs

pytestmark = pytest.mark.slow

STEPS, KILLS = 60, 20
VARIANTS = {
    "plain": {},
    "microbatches, stochastic rounding, float16 with a dynamic loss scale": {
        **{"microbatches": 2, "rounding": "stochastic", "param_dtype": "float16"},
        **{"dynamic_loss_scale": True},
    },
}


def _kill_at_random(process: subprocess.Popen, workdir, rng: random.Random, ceiling: int) -> bool:
    """Kills a run at a random time before it logs step `ceiling`; False if it ended by itself."""
    first = runs.last_step(workdir)
    if rng.random() < 0.25:  # during imports, compilation or the restore
        moment = time.monotonic() + rng.uniform(0, 8)
        is_time = lambda: time.monotonic() > moment  # noqa: E731
    else:
        target = rng.randint(first + 1, max(first + 1, ceiling))
        is_time = lambda: runs.last_step(workdir) >= target  # noqa: E731
    while not is_time() and runs.last_step(workdir) < ceiling:
        if process.poll() is not None:
            return False
        time.sleep(0.001)
    time.sleep(rng.uniform(0, 0.03))
    process.kill()
    process.wait()
    return True


@pytest.mark.parametrize("variant", VARIANTS)
def test_a_run_killed_many_times_equals_an_uninterrupted_one(tmp_path, variant):
    text = runs.write_text(tmp_path / "text.jsonl")
    fields = {
        **{"steps": STEPS, "eval_every": 7, "checkpoint_every": 3, "keep_checkpoints": 2},
        **VARIANTS[variant],
    }
    # Each restart compiles the same program: the cache only saves time.
    cache = {
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
    }

    whole, killed = (
        runs.make_config(text, tmp_path / name, **fields) for name in ("whole", "killed")
    )
    assert runs.start(whole, **cache).wait(120) == 0, runs.output_of(whole).read_text()

    rng, workdir = random.Random(0), tmp_path / "killed"
    for kill in range(KILLS):
        process = runs.start(killed, **cache)
        ceiling = STEPS * (kill + 1) // (KILLS + 1)
        was_killed = _kill_at_random(process, workdir, rng, ceiling)
        assert was_killed, runs.output_of(killed).read_text()
    assert runs.start(killed, **cache).wait(120) == 0, runs.output_of(killed).read_text()
    assert sum("resumed" in record for record in runs.records(workdir)) >= KILLS // 2
    runs.assert_same_run(workdir, tmp_path / "whole")
