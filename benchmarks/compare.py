"""Compares ways to train a LLaMA side by side: time, memory, compile time, loss.

    python benchmarks/compare.py                          # 20M parameters, on a CPU, 10 minutes
    python benchmarks/compare.py --size 7b --rows 'fused|torch'                     # on a GPU
    JAX_PLATFORMS=cpu python benchmarks/compare.py --size 7b --plan rtx3090         # nothing is run

All rows have the same model, weights, batches and dtype, and each has a process of its own. On a
CPU all of them are alive and make one step in turn, round after round, so that a noisy machine is
fair; on a GPU, which has room for one, a row makes all its steps before the next starts.
benchmarks/README.md says what the rows are.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from report import plot, print_report
from rows import ROWS, SIZES, Row, Size
from worker import Worker


class Results:
    """What was measured, in a file as soon as it is.

    Args:
      path: of the file; None for no file.
      facts: what holds for all rows.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self.data = facts | {"rows": {}}

    def update(self, row: Row, **values: Any) -> None:
        """Sets facts of a row; `seconds` and `loss` of a round are added to those before."""
        entry = self.data["rows"].setdefault(row.name, {"seconds": [], "losses": []})
        for key, many in (("seconds", "seconds"), ("loss", "losses")):
            if key in values:
                entry[many].append(values.pop(key))
        entry.update(values)
        if self._path is not None:
            partial = self._path.with_suffix(".partial")
            partial.write_text(json.dumps(self.data, indent=1) + "\n")
            partial.replace(self._path)


def main(argv: list[str] | None = None) -> None:
    """Runs the command line."""
    flags = _parse(argv)
    rows = [row for row in ROWS if re.search(flags.rows, row.name)]
    if not rows:
        raise SystemExit(
            f"error: --rows: {flags.rows!r} is in none of: {'; '.join(row.name for row in ROWS)}"
        )
    size = SIZES[flags.size]
    results = Results(flags.json, facts(flags.size))
    if flags.show:
        results.data = json.loads(flags.show.read_text())
    elif flags.plan:
        _plan(rows, size, flags.plan, results)
    elif _has_gpu():
        _one_after_the_other(rows, size, flags.rounds, time.monotonic() + flags.budget, results)
    else:
        _in_turn(rows, size, flags.rounds, time.monotonic() + flags.budget, results)
    print_report(results.data)
    if flags.plot:
        plot(results.data, flags.plot)


def facts(size: str) -> dict[str, Any]:
    """Returns what a reader needs to repeat a measurement."""
    packages = ("jax", "flax", "optax", "torch", "transformers", "lomo-optim")
    return {
        "size": size,
        "tokens": SIZES[size].tokens if size in SIZES else 0,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def _plan(rows: list[Row], size: Size, gpu: str, results: Results) -> None:
    """Plans rows for a GPU; torch has no plan."""
    from planned import find, plan_row

    for row in rows:
        if row.kind != "torch":
            try:
                results.update(row, **plan_row(row, size, find(gpu)))
            except (ModuleNotFoundError, RuntimeError, ValueError) as error:
                results.update(row, skipped=str(error))


def _in_turn(rows: list[Row], size: Size, rounds: int, deadline: float, results: Results) -> None:
    """Measures rows that live side by side, a step of each in turn."""
    started = (_start(row, size, deadline, results) for row in rows)
    workers = [worker for worker in started if worker is not None]
    for turn in range(rounds + 1):
        workers = [worker for worker in workers if _step(worker, turn, deadline, results)]
    for worker in workers:
        worker.stop()


def _one_after_the_other(
    rows: list[Row], size: Size, rounds: int, deadline: float, results: Results
) -> None:
    """Measures rows that each need the device for themselves."""
    for row in rows:
        worker = _start(row, size, deadline, results)
        if worker is not None and all(
            _step(worker, turn, deadline, results) for turn in range(rounds + 1)
        ):
            worker.stop()


def _start(row: Row, size: Size, deadline: float, results: Results) -> Worker | None:
    worker = Worker(row, size)
    try:
        results.update(row, **worker.receive(deadline - time.monotonic()))
    except RuntimeError as error:
        worker.stop()
        results.update(row, skipped=str(error))
        print(f"skipped  {row.name}: {error}", flush=True)
        return None
    return worker


def _step(worker: Worker, turn: int, deadline: float, results: Results) -> bool:
    """Makes a step; returns whether the row goes on. The first step warms up and is not timed."""
    try:
        worker.step()
        answer = worker.receive(deadline - time.monotonic())
    except (RuntimeError, OSError) as error:
        worker.stop()
        results.update(worker.row, stopped=str(error))
        print(f"stopped  {worker.row.name}: {error}", flush=True)
        return False
    if turn == 0:
        del answer["seconds"]
    results.update(worker.row, **answer)
    return True


def _has_gpu() -> bool:
    """Whether there is a GPU, found without becoming one of its users."""
    if os.environ.get("JAX_PLATFORMS", "").startswith("cpu"):
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True).returncode == 0
    except FileNotFoundError:
        return False


def _commit() -> str | None:
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    try:
        found = subprocess.run(
            command, capture_output=True, text=True, cwd=Path(__file__).parent, check=True
        )
    except (FileNotFoundError, subprocess.CalledProcessError):
        return None
    return found.stdout.strip()


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--size", choices=SIZES, default="20m", help="of the model")
    parser.add_argument("--rows", default="", help="only those whose name this expression is in")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each row")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all of it")
    parser.add_argument("--json", type=Path, help="a file to keep the results in, as they come")
    parser.add_argument("--plot", type=Path, help="a picture of time and memory, PNG or SVG")
    parser.add_argument("--show", type=Path, help="report on such a file instead of measuring")
    parser.add_argument("--plan", metavar="GPU", help="only plan, for a GPU such as rtx3090")
    flags = parser.parse_args(argv)
    if flags.rounds < 1:
        parser.error(f"--rounds: {flags.rounds}; set 1 or more")
    return flags


if __name__ == "__main__":
    main()
