"""Kills one of two processes of a run at random moments, and resumes it until it has finished.

    python tests/sharding/kill_processes.py --kills 30 [--seed 0]

For each of two meshes. The other process must end within `LIMIT` seconds, and the run must end with
the losses and weights, bit for bit, of a run that nobody killed. The moments are: starting, after
a random step, while a checkpoint is written, and while the export is written.
"""

import argparse
import collections
import json
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

from safetensors.numpy import load_file  # noqa: E402
from test_processes import finish, train  # noqa: E402

MEETING = 45  # seconds for both processes to come
LIMIT = 120  # seconds; a process without a heartbeat counts as dead after 60
STEPS = 120
MESHES = {"data=2, fsdp=2": (2, 2, 1), "fsdp=2, tensor=2": (1, 2, 2)}
MOMENTS = ("start", "step", "save", "export")


def start(folder, mesh):
    """Starts the two processes."""
    fields = {"steps": STEPS, "checkpoint_every": 5, "keep_checkpoints": 2, "eval_every": 20}
    fields |= dict(zip(("mesh.data", "mesh.fsdp", "mesh.tensor"), MESHES[mesh], strict=True))
    flags = [f"--config.{name}={value}" for name, value in fields.items()]
    return train(folder, 2, f"--connect_timeout={MEETING}", *flags)


def last_step(workdir):
    """Returns the last step in the log of a run."""
    log = workdir / "metrics.jsonl"
    lines = log.read_text().splitlines() if log.exists() else []
    steps = [json.loads(line)["step"] for line in lines if line.endswith("}")]
    return max(steps, default=0)


def is_time(moment, workdir, target):
    """Returns whether a run has come to the moment to kill it."""
    if moment == "step":
        return last_step(workdir) >= target
    if moment == "save":
        is_saving = any((workdir / "checkpoints").glob("*tmp*"))
        return last_step(workdir) >= target and is_saving
    return (workdir / ".export.writing").exists()


def kill(folder, mesh, moment, rng):
    """Starts a run, kills one process of it, and returns the seconds until the other has ended.

    Returns None if the run has finished before.
    """
    workdir = folder / "run2"
    target = min(last_step(workdir) + rng.randint(1, 12), STEPS - 1)
    processes = start(folder, mesh)
    wait_until = time.monotonic() + rng.uniform(0, 20)
    deadline = time.monotonic() + 300
    while not (
        time.monotonic() > wait_until if moment == "start" else is_time(moment, workdir, target)
    ):
        if all(process.poll() is not None for process in processes):
            break
        assert time.monotonic() < deadline, f"the run hangs before the moment {moment!r}"
        time.sleep(0.002)
    time.sleep(rng.uniform(0, 0.02))
    victim, other = rng.sample(processes, 2)
    victim.send_signal(signal.SIGKILL)
    killed = time.monotonic()
    outputs = finish([other, victim], seconds=LIMIT)  # raises if it hangs
    seconds = time.monotonic() - killed
    codes = other.returncode, victim.returncode
    if codes == (0, 0):
        return None
    # The other may have finished, if the victim had nothing left to do for it.
    assert victim.returncode in (0, -signal.SIGKILL), outputs
    assert other.returncode >= 0 or "another task died" in outputs[0], outputs
    return seconds


def results(folder):
    """Returns the loss of each step, the last one logged, and the weights of the export."""
    records = map(json.loads, (folder / "run2" / "metrics.jsonl").read_text().splitlines())
    losses = {record["step"]: record["loss"] for record in records if "loss" in record}
    weights = load_file(folder / "run2" / "export" / "model.safetensors")
    return losses, {name: weight.tobytes() for name, weight in weights.items()}


def complete(folder, mesh):
    """Runs to the end."""
    processes = start(folder, mesh)
    outputs = finish(processes)
    assert [process.returncode for process in processes] == [0, 0], outputs


def main():
    """Runs the command."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=30, help="for each mesh")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    rng = random.Random(options.seed)
    for mesh in MESHES:
        with tempfile.TemporaryDirectory() as temporary:
            whole = Path(temporary) / "whole"
            whole.mkdir()
            complete(whole, mesh)
            expected, kills, runs, slowest = results(whole), collections.Counter(), 0, 0.0
            while kills.total() < options.kills:
                folder = Path(temporary) / f"killed{runs}"
                folder.mkdir(exist_ok=True)
                moment = rng.choices(MOMENTS, (2, 4, 4, 1))[0]
                if last_step(folder / "run2") >= STEPS:
                    moment = rng.choice(["export", None, None])
                seconds = kill(folder, mesh, moment, rng) if moment else complete(folder, mesh)
                if seconds is None:  # it has finished
                    assert results(folder) == expected, f"{mesh}: other losses or weights"
                    runs += 1
                    continue
                kills[moment] += 1
                slowest = max(slowest, seconds)
                print(f"{mesh}: {moment}, the other ended after {seconds:.1f} s", flush=True)
            complete(folder, mesh)
            assert results(folder) == expected, f"{mesh}: other losses or weights"
            counts = ", ".join(f"{count} at {moment}" for moment, count in kills.items())
            print(
                f"{mesh}: {kills.total()} kills ({counts}); {runs + 1} runs finished with the "
                f"losses and weights of an undisturbed one; the other process ended after at most "
                f"{slowest:.0f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
