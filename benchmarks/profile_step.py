"""Measures where the time of one step goes: products, attention, update, copies, idle.

    python benchmarks/profile_step.py [--size 7b] [--row 'fused, adalomo'] [--json FILE]

JAX's profiler reports the kernels; the compiled program says which operations each one computes.
"""

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from compare import facts
from jax.profiler import ProfileData
from jax_step import Run
from rows import ROWS, SIZES

from lomo_jax.plan.program import Instruction, Program

# "others" are norms, rotary embeddings and the like.
KINDS = "products", "attention", "update", "copies", "others", "idle"
_COPIES = "copy", "copy-start", "copy-done", "dynamic-update-slice", "dynamic-slice"


def kind(instruction: Instruction) -> str:
    """Returns the kind of an instruction, one of `KINDS`."""
    # XLA names a fusion and its computation by the operations in it.
    text = f"{instruction.name} {instruction.opcode} {instruction.attributes}"
    if "/update/" in instruction.op_name:
        return "update"
    if "attention" in instruction.op_name or "fmha" in text:
        return "attention"
    if "dot_general" in instruction.op_name or "gemm" in text or instruction.opcode == "dot":
        return "products"
    if instruction.opcode in _COPIES or "dynamic-slice" in text or "dynamic-update-slice" in text:
        return "copies"
    return "others"


def events(path: Path) -> Iterator[tuple[float, float, str]]:
    """Yields (start, end, name of the instruction) of the device's kernels; times in ns."""
    for plane in ProfileData.from_file(str(path)).planes:
        if "GPU" not in plane.name and "CPU" not in plane.name:
            continue
        for line in plane.lines:
            for event in line.events:
                stats = dict(event.stats)
                operation = stats.get("hlo_op")
                if operation is None and "Memcpy" not in event.name:
                    continue
                yield event.start_ns, event.end_ns, str(operation or "Memcpy")


def shares(path: Path, program: Program) -> dict[str, float]:
    """Returns the share of the step's time that each of `KINDS` takes.

    Time in which two kernels run counts for the one that started first.
    """
    known = {name: kind(instruction) for name, instruction in program.instructions().items()}
    known["Memcpy"] = "copies"
    spans = sorted(events(path))
    if not spans:
        raise SystemExit("error: the profiler reported no kernels of the device")
    time: dict[str, float] = dict.fromkeys(KINDS, 0.0)
    now = first = spans[0][0]
    for start, end, name in spans:
        if start > now:
            time["idle"] += start - now
        time[known.get(name, "others")] += max(0.0, end - max(start, now))
        now = max(now, end)
    return {name: value / (now - first) for name, value in time.items()}


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="20m")
    parser.add_argument("--row", choices=[row.name for row in ROWS], default="fused, adalomo")
    parser.add_argument("--json", type=Path, help="file to write the result to")
    flags = parser.parse_args()
    run = Run(next(row for row in ROWS if row.name == flags.row), SIZES[flags.size])
    run()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        path = next(Path(directory).rglob("*.xplane.pb"))
        found = shares(path, Program.parse(run.step.as_text() or ""))
    for name, share in found.items():
        print(f"{name:10} {share:.1%}")
    data = facts(flags.size) | run.facts | {"row": flags.row, "shares": found}
    if flags.json:
        flags.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
