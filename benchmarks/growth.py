"""Shows how time and memory of a step grow with model and batch, fused and not.

    JAX_PLATFORMS=cpu python benchmarks/growth.py --json FILE           # measured, on this CPU
    JAX_PLATFORMS=cpu python benchmarks/growth.py --json FILE --plan rtx3090     # planned
    python benchmarks/growth.py --plot docs/growth.png FILE FILE

Both steps use AdaLomo and recompute each layer. One quantity grows at a time. On a CPU the base is
the model of 20M parameters, and each point runs in a process of its own; for a GPU it is LLaMA-7B.
The plain step has no microbatches, so only the fused step has a curve over them.
"""

import argparse
import dataclasses
import json
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from compare import facts
from rows import ROWS, SIZES, Row, Size
from worker import Worker

from lomo_jax.plan import find

ROUNDS = 5
_FUSED, _PLAIN = (
    next(row for row in ROWS if row.name == name) for name in ("fused, adalomo", "scanned, adalomo")
)
_SPLIT = Row("fused, adalomo", "fused", "adalomo", {"microbatches": None})
# Growing quantity: its values on the CPU, and its values in plans.
GROWS = {
    "layers": ((2, 4, 8, 16), (8, 16, 32, 48)),
    "width": ((192, 384, 768), (2048, 4096, 6144)),
    "vocabulary": ((4000, 8000, 16000, 32000), (32000, 64000, 128000)),
    "tokens": ((512, 1024, 2048, 4096), (1024, 2048, 4096, 8192)),
    "microbatches": ((1, 2, 4), (1, 2, 4, 8)),
}


def grown(base: Size, what: str, value: int) -> Size:
    """Returns `base` with one quantity set."""
    if what == "width":
        # More heads of the same width.
        heads = base.num_heads * value // base.width
        mlp_width = base.mlp_width * value // base.width
        return dataclasses.replace(
            base, width=value, mlp_width=mlp_width, num_heads=heads, num_kv_heads=heads
        )
    if what == "tokens":
        return dataclasses.replace(base, batch_size=value // base.length)
    names = {"layers": "num_layers", "vocabulary": "vocab_size", "microbatches": "microbatches"}
    return dataclasses.replace(base, **{names[what]: value})


def points(base: Size, *, planned: bool) -> Iterator[tuple[str, int, Row, Size]]:
    """Yields each point: the growing quantity, its value, the row and the size."""
    for what, values in GROWS.items():
        for value in values[planned]:
            for row in (_SPLIT,) if what == "microbatches" else (_FUSED, _PLAIN):
                yield what, value, row, grown(base, what, value)


def measure(size: Size, rows: list[Row]) -> list[dict[str, Any]]:
    """Measures rows that take turns: facts, median of seconds, and peak in GiB."""
    workers = [Worker(row, size) for row in rows]
    answers = []
    try:
        found = [worker.receive(600) for worker in workers]
        for _ in range(ROUNDS + 1):
            for worker in workers:
                worker.step()
                answers.append(worker.receive(600))
    finally:
        for worker in workers:
            worker.stop()
    for k, fact in enumerate(found):
        mine = answers[k :: len(rows)]
        fact["seconds"] = statistics.median(answer["seconds"] for answer in mine[1:])
        fact["peak_gib"] = mine[-1]["peak_gib"]
    return found


def plot(paths: list[Path], target: Path) -> None:
    """Plots a row of panels for each file and quantity."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    lines = []
    for data in (json.loads(path.read_text()) for path in paths):
        if data["planned"]:
            lines.append((data, "planned_gib", "GiB, planned"))
        else:
            lines += [
                (data, "seconds", "s a step"),
                (data, "peak_gib", "GiB, measured"),
                (data, "planned_gib", "GiB, planned"),
            ]
    figure, panels = plt.subplots(
        len(lines), len(GROWS), figsize=(13, 2.6 * len(lines)), layout="constrained", squeeze=False
    )
    for axes_row, (data, quantity, label) in zip(panels, lines, strict=True):
        for axes, what in zip(axes_row, GROWS, strict=True):
            here = [point for point in data["points"] if point["grows"] == what]
            for name in dict.fromkeys(point["row"] for point in here):
                mine = [point for point in here if point["row"] == name]
                x = [point["value"] for point in mine]
                axes.plot(x, [point[quantity] for point in mine], marker="o", label=name)
            top = max(point[quantity] for point in here)
            axes.set(xlabel=what, ylim=(0, 1.1 * top), xlim=(0, None))
        axes_row[0].set_ylabel(f"{data['device']}\n{label}", fontsize=8)
    panels[0][0].legend(fontsize=7)
    figure.savefig(target, dpi=110)


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("files", nargs="*", type=Path, help="results to plot")
    parser.add_argument("--plot", type=Path, help="plot FILES into this image")
    parser.add_argument("--json", type=Path, help="file to write the results to")
    parser.add_argument("--plan", metavar="GPU", help="plan for a GPU such as rtx3090")
    parser.add_argument("--size", choices=SIZES, help="base; by default 20m, or 7b for plans")
    flags = parser.parse_args()
    if flags.plot:
        plot(flags.files, flags.plot)
        return
    if flags.json is None:
        parser.error("--json: missing; name a file for the results")
    size = flags.size or ("7b" if flags.plan else "20m")
    data = facts(size) | {"planned": bool(flags.plan), "points": []}
    todo: dict[tuple[str, int], list[tuple[Row, Size]]] = {}
    for what, value, row, grown_size in points(SIZES[size], planned=bool(flags.plan)):
        todo.setdefault((what, value), []).append((row, grown_size))
    for (what, value), group in todo.items():
        rows = [row for row, _ in group]
        if flags.plan:
            from jax_step import plan_row  # needs flax, which `--plot` does not

            found = [plan_row(row, group[0][1], find(flags.plan)) for row in rows]
        else:
            found = measure(group[0][1], rows)
        for row, values in zip(rows, found, strict=True):
            data["device"] = values.pop("device")
            del values["compile_seconds"]  # `compare.py` shows it
            data["points"].append({"grows": what, "value": value, "row": row.name} | values)
            print(what, value, row.name, values, flush=True)
        flags.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
