"""Tables and pictures of what `compare.py` measured."""

import statistics
from pathlib import Path
from typing import Any

from rows import ROWS, SIZES, rivals

from lomo_jax.flops import flops_per_token, peak_flops
from lomo_jax.models import LlamaConfig

_FLOOR = ROWS[0].name


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
        "| compiled in s | loss |"
    )
    print("|---" * 9 + "|")
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
    """Returns how long a row takes of another's time, the median over rounds; None without both."""
    times, others = (rows.get(n, {}).get("seconds", []) for n in (name, other))
    pairs = list(zip(times, others, strict=False))
    return statistics.median(a / b for a, b in pairs) if pairs else None


def _cells(rows: dict[str, Any], name: str, size_name: str) -> list[str]:
    row, size = rows[name], SIZES[size_name]
    config = LlamaConfig(**size.architecture())
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
    for key, form in (("peak_gib", ".2f"), ("planned_gib", ".2f"), ("compile_seconds", ".1f")):
        cells.append(format(row[key], form) if key in row else "")
    cells.append(f"{row['losses'][-1]:.4f}" if row["losses"] else "")
    return cells


def _compared(rows: dict[str, Any]) -> list[list[str]]:
    """Each fused row without options beside those that make the same kind of update otherwise."""
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


def plot(data: dict[str, Any], path: Path) -> None:
    """Draws time and memory, a bar for each row."""
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
