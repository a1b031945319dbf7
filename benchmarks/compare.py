"""Compares ways to train a LLaMA side by side: time, memory, compile time, loss.

    python benchmarks/compare.py                          # 20M parameters, on a CPU, 10 minutes
    python benchmarks/compare.py --size 7b --rows 'fused|torch'                     # on a GPU
    JAX_PLATFORMS=cpu python benchmarks/compare.py --size 7b --plan rtx3090         # plans only

All rows have the same model, weights, batches and dtype. Each runs in a process of its own. On a
CPU they take turns, one step each per round, so that load on the machine slows all of them alike.
On a GPU, whose memory holds only one, each row runs all its steps before the next starts.
benchmarks/README.md describes the rows.
"""

import argparse
import datetime
import itertools
import json
import math
import os
import re
import statistics
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from rows import ROWS, SIZES, Row, Size, rivals
from worker import Worker

from lomo_jax.flops import flops_per_token
from lomo_jax.models import DecoderConfig
from lomo_jax.plan import find, peak_flops

_FLOOR = ROWS[0].name


class Results:
    """The results, written to a file after every change.

    Args:
      path: file to write; None for none.
      facts: values that hold for all rows.
    """

    def __init__(self, path: Path | None, facts: dict[str, Any]) -> None:
        self._path = path
        self.data = facts | {"rows": {}}

    def update(self, row: Row, **values: Any) -> None:
        """Sets values of a row; `seconds` and `loss` are appended to those of earlier rounds."""
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
            f"error: --rows: {flags.rows!r} matches none of: {'; '.join(row.name for row in ROWS)}"
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
    if flags.order_of:
        print(order(results.data, json.loads(flags.order_of.read_text())))
    if flags.plot:
        plot(results.data, flags.plot)


def facts(size: str) -> dict[str, Any]:
    """Returns the versions and settings needed to repeat a measurement."""
    packages = ("jax", "flax", "optax", "torch", "transformers", "lomo-optim")
    return {
        "size": size,
        "tokens": SIZES[size].tokens if size in SIZES else 0,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _commit(),
        "versions": {name: version for name in packages if (version := _version(name))},
    }


def _plan(rows: list[Row], size: Size, gpu: str, results: Results) -> None:
    """Plans the JAX rows for a GPU."""
    from jax_step import plan_row  # needs flax, which `--show` does not

    for row in rows:
        if row.kind != "torch":
            try:
                results.update(row, **plan_row(row, size, find(gpu)))
            except (RuntimeError, ValueError) as error:
                results.update(row, skipped=str(error))


def _in_turn(rows: list[Row], size: Size, rounds: int, deadline: float, results: Results) -> None:
    """Measures rows that take turns, one step each."""
    started = (_start(row, size, deadline, results) for row in rows)
    workers = [worker for worker in started if worker is not None]
    for turn in range(rounds + 1):
        workers = [worker for worker in workers if _step(worker, turn, deadline, results)]
    for worker in workers:
        worker.stop()


def _one_after_the_other(
    rows: list[Row], size: Size, rounds: int, deadline: float, results: Results
) -> None:
    """Measures rows that need the device for themselves."""
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
    """Runs a step, the first one untimed; returns whether the row can continue."""
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


def print_report(data: dict[str, Any]) -> None:
    """Prints the tables, in Markdown."""
    rows, size = data["rows"], SIZES[data["size"]]
    device = next((row["device"] for row in rows.values() if "device" in row), "no device")
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    batch = f"batch {size.batch_size} x {size.length}, {size.dtype}"
    print(f"{data['size']}, {batch}; {device}; {versions}; commit {data['commit']}")
    print()
    print(
        "| row | s a step (spread) | of floor | tokens/s | TFLOP/s | peak, GiB | planned, GiB "
        "| s a step, modelled | compiled in s | loss |"
    )
    print("|---" * 10 + "|")
    for name in rows:
        print("|", " | ".join([name, *_cells(rows, name, data["size"])]), "|")
    if compared := _compared(rows):
        print()
        print("| fused row | rival | time | memory |")
        print("|---|---|---|---|")
        for cells in compared:
            print("|", " | ".join(cells), "|")
    for name, row in rows.items():
        if reason := row.get("skipped") or row.get("stopped"):
            print(f"\n{name}: {reason}")


def ratio(rows: dict[str, Any], name: str, other: str) -> float | None:
    """Returns the median over rounds of a row's time relative to another's; None without both."""
    times, others = (rows.get(n, {}).get("seconds", []) for n in (name, other))
    pairs = list(zip(times, others, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _cells(rows: dict[str, Any], name: str, size_name: str) -> list[str]:
    row, size = rows[name], SIZES[size_name]
    config = DecoderConfig(**size.architecture())
    cells = ["", "", "", ""]
    if row["seconds"]:
        seconds = statistics.median(row["seconds"])
        spread = f"{min(row['seconds']):.3g} to {max(row['seconds']):.3g}"
        speed = size.tokens / seconds
        flops = speed * flops_per_token(config, size.length)
        peak = peak_flops(row["device"])
        of_floor = ratio(rows, name, _FLOOR)
        cells = [
            f"{seconds:.3f} ({spread})",
            "" if of_floor is None else f"{of_floor:.2f}",
            f"{speed:.0f}",
            f"{flops / 1e12:.3g}" + ("" if peak is None else f", {flops / peak:.0%}"),
        ]
    forms = {"peak_gib": ".2f", "planned_gib": ".2f", "modelled_seconds": ".3g"}
    for key, form in (forms | {"compile_seconds": ".1f"}).items():
        cells.append(format(row[key], form) if key in row else "")
    cells.append(f"{row['losses'][-1]:.4f}" if row["losses"] else "")
    return cells


def _compared(rows: dict[str, Any]) -> list[list[str]]:
    """Returns each fused row without options against its rivals."""
    found = []
    for row in ROWS:
        if row.kind != "fused" or row.options:
            continue
        for rival in rivals(row):
            time = ratio(rows, row.name, rival.name)
            if time is None:
                continue
            memory = rows[row.name]["peak_gib"] / rows[rival.name]["peak_gib"]
            found.append([row.name, rival.name, f"{time:.2f}", f"{memory:.2f}"])
    return found


def order(data: dict[str, Any], other: dict[str, Any]) -> str:
    """Says how many pairs of rows that differ clearly in `other` have the same order in `data`."""
    times = [
        {
            name: row["seconds"] or [row.get("modelled_seconds")]
            for name, row in each["rows"].items()
        }
        for each in (data, other)
    ]
    names = [
        name for name in times[1] if None not in (*times[1][name], *times[0].get(name, [None]))
    ]
    clear = same = 0
    for pair in itertools.combinations(names, 2):
        here, there = (
            statistics.median(a / b for a, b in zip(*(time[name] for name in pair), strict=True))
            for time in times
        )
        if abs(math.log(there)) > math.log(1.1):
            clear += 1
            same += (here > 1) == (there > 1)
    return f"{clear} pairs of rows differ by more than 10 % there; {same} have this order here"


def plot(data: dict[str, Any], path: Path) -> None:
    """Draws time and memory, one bar per row."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    kinds = {row.name: row.kind for row in ROWS}
    colours = {kind: f"C{k}" for k, kind in enumerate(dict.fromkeys(kinds.values()))}
    rows = {name: row for name, row in reversed(data["rows"].items()) if row["seconds"]}
    figure, panels = plt.subplots(
        1, 2, figsize=(9, 1 + 0.24 * len(rows)), layout="constrained", sharey=True
    )
    colour = [colours[kinds[name]] for name in rows]
    times = [row["seconds"] for row in rows.values()]
    middle = [statistics.median(seconds) for seconds in times]
    below = [m - min(seconds) for m, seconds in zip(middle, times, strict=True)]
    above = [max(seconds) - m for m, seconds in zip(middle, times, strict=True)]
    panels[0].barh(list(rows), middle, xerr=(below, above), color=colour, ecolor="0.4")
    panels[0].set_xlabel("seconds a step, median and spread")
    panels[1].barh(list(rows), [row["peak_gib"] for row in rows.values()], color=colour)
    panels[1].set_xlabel("peak memory, GiB")
    panels[0].tick_params(axis="y", labelsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _has_gpu() -> bool:
    """Returns whether there is a GPU, without initialising it in this process."""
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
    parser.add_argument("--rows", default="", help="regular expression for names of rows")
    parser.add_argument("--rounds", type=int, default=7, help="timed steps of each row")
    parser.add_argument("--budget", type=float, default=3600, help="seconds for all rows")
    parser.add_argument("--json", type=Path, help="file to write the results to, as they come")
    parser.add_argument("--plot", type=Path, help="image file for time and memory, PNG or SVG")
    parser.add_argument("--show", type=Path, help="print such a file instead of measuring")
    parser.add_argument("--plan", metavar="GPU", help="only plan, for a GPU such as rtx3090")
    parser.add_argument("--order_of", type=Path, help="such a file: do the rows have its order?")
    flags = parser.parse_args(argv)
    if flags.rounds < 1:
        parser.error(f"--rounds: {flags.rounds}; set 1 or more")
    return flags


if __name__ == "__main__":
    main()
