"""Collects the results of `gpu.sh` in benchmarks/results/DEVICE-DATE.json and README.md.

python benchmarks/collect.py DIR
"""

import argparse
import json
import re
import statistics
from pathlib import Path
from typing import Any

_START, _END = "<!-- gpu: written by collect.py -->", "<!-- gpu: end -->"


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path, help="folder that gpu.sh wrote to")
    parser.add_argument("--into", type=Path, default=Path(__file__).parent, help="has README.md")
    flags = parser.parse_args()
    parts = {
        path.stem: json.loads(path.read_text()) for path in sorted(flags.directory.glob("*.json"))
    }
    device = next(filter(None, map(_device, parts.values())), None)
    if device is None:
        raise SystemExit(f"error: {flags.directory} has no results; run benchmarks/gpu.sh first")
    date = max(part["date"] for part in parts.values())[:10]
    name = re.sub(r"[^A-Za-z0-9]+", "-", device).strip("-").lower()
    target = flags.into / "results" / f"{name}-{date}.json"
    target.parent.mkdir(exist_ok=True)
    target.write_text(json.dumps(parts, indent=1) + "\n")
    table = "\n".join(lines(device, target.name, parts))
    page = flags.into / "README.md"
    before, rest = page.read_text().split(_START)
    page.write_text(f"{before}{_START}\n{table}\n{_END}{rest.split(_END)[1]}")
    print(f"{target}\n\n{table}")


def lines(device: str, name: str, parts: dict[str, Any]) -> list[str]:
    """Returns the table, in Markdown."""
    first = next(iter(parts.values()))
    versions = ", ".join(f"{package} {version}" for package, version in first["versions"].items())
    found = [f"{device}, commit {first['commit']}, {versions} ([{name}](results/{name}))", ""]
    checks = parts.get("correct", {}).get("checks", [])
    if checks:
        ran = [check for check in checks if "skipped" not in check]
        wrong = [check["check"] for check in ran if not check["measured"] <= check["bound"]]
        verdict = f"failed: {'; '.join(wrong)}" if wrong else "all passed"
        found += [f"Correctness: {len(ran)} checks on the device, {verdict}.", ""]
    found += [
        "| size | row | s a step | tokens/s | GiB, measured | planned with the GPU | without it |",
        "|---|---|---|---|---|---|---|",
    ]
    for part, data in parts.items():
        if part.startswith("planned") or "rows" not in data:
            continue
        planned = next(
            (
                other["rows"]
                for name, other in parts.items()
                if name.startswith("planned") and other["size"] == data["size"]
            ),
            {},
        )
        for row, values in data["rows"].items():
            if reason := values.get("skipped"):
                found.append(f"| {data['size']} | {row} | {reason} | | | | |")
                continue
            seconds = statistics.median(values["seconds"]) if values["seconds"] else None
            cells = [
                "" if seconds is None else f"{seconds:.3f}",
                "" if seconds is None else f"{data['tokens'] / seconds:.0f}",
                *(
                    "" if value is None else f"{value:.2f}"
                    for value in (
                        values.get("peak_gib"),
                        values.get("planned_gib"),
                        planned.get(row, {}).get("planned_gib"),
                    )
                ),
            ]
            found.append(f"| {data['size']} | {row} | " + " | ".join(cells) + " |")
    if shares := parts.get("profile", {}).get("shares"):
        found += ["", "One step: " + ", ".join(f"{k} {v:.0%}" for k, v in shares.items()) + "."]
    return found


def _device(part: dict[str, Any]) -> str | None:
    rows = part.get("rows", {}).values()
    return part.get("device") or next((row["device"] for row in rows if "device" in row), None)


if __name__ == "__main__":
    main()
