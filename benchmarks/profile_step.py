"""Says where the time of one fused step goes: products, attention, update, copies, idle.

    python benchmarks/profile_step.py [--size 7b] [--row 'fused, adalomo'] [--json FILE]

Kernels are those of JAX's own profiler, told apart by the operations of the compiled program that
they stand for.
"""

import argparse
import json
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
from compare import facts
from jax.profiler import ProfileData
from jax_step import Run
from rows import ROWS, SIZES

# The others are norms, rotations and the like.
KINDS = "products", "attention", "update", "copies", "others", "idle"
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?([\w.-]+) = ")
_NAME = re.compile(r'op_name="([^"]*)"')


def kinds(hlo: str) -> dict[str, str]:
    """Returns the kind of each instruction of a compiled program, by its name."""
    found = {}
    for line in hlo.splitlines():
        match = _INSTRUCTION.match(line)
        if not match:
            continue
        named = _NAME.search(line)
        found[match[1]] = kind(line, named[1] if named else "")
    return found


def kind(line: str, name: str) -> str:
    """Returns the kind of an instruction.

    Args:
      line: of the compiled program.
      name: of the JAX operation that it comes from, with its scopes.
    """
    if "/update/" in name:
        return "update"
    if "attention" in name or "fmha" in line:
        return "attention"
    if "dot_general" in name or "gemm" in line or " dot(" in line:
        return "products"
    copies = " copy(", "copy-start", "copy-done", "dynamic-update-slice", "dynamic-slice"
    if any(word in line for word in copies):
        return "copies"
    return "others"


def events(path: Path) -> Iterator[tuple[float, float, str]]:
    """Yields the device's (start, end, name of the instruction), in ns."""
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


def shares(path: Path, hlo: str) -> dict[str, float]:
    """Returns the part of the step's time that each of `KINDS` takes.

    Where two kernels run at once, the time is that of the one that began first.
    """
    known = kinds(hlo) | {"Memcpy": "copies"}
    spans = sorted(events(path))
    if not spans:
        raise SystemExit("error: the profiler reported no kernel of the device")
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
    parser.add_argument("--json", type=Path, help="a file to keep the result in")
    flags = parser.parse_args()
    run = Run(next(row for row in ROWS if row.name == flags.row), SIZES[flags.size])
    run()
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            run()
        path = next(Path(directory).rglob("*.xplane.pb"))
        found = shares(path, run.step.as_text() or "")
    for name, share in found.items():
        print(f"{name:10} {share:.1%}")
    data = facts(flags.size) | run.facts | {"row": flags.row, "shares": found}
    if flags.json:
        flags.json.write_text(json.dumps(data, indent=1) + "\n")


if __name__ == "__main__":
    main()
