"""Reads what runs of `train.py` have left in their folders."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

Record = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run; its records are in the order of their steps, one a step."""

    name: str  # what tells it from the others on the page
    config: dict[str, Any]  # every field, nested; empty if the run left none
    facts: dict[str, Any]  # run.json: source, parameters, device, versions, plan; may be empty
    train: list[Record]  # the logged steps
    evals: list[Record]
    samples: list[Record]
    resumes: list[int]  # steps from whose checkpoint it went on, as far as they still count
    times_resumed: int  # all of them
    seconds: float | None  # in which a process of it ran; None if the records bear no time
    started: float | None  # Unix time of the first record
    unreadable: int  # lines that no kill explains


def read(workdirs: Sequence[str]) -> list[Run]:
    """Reads runs.

    A run that went on from a checkpoint has overwritten what a lost process wrote after it: such
    records are left out.

    Args:
      workdirs: The folders of the runs.

    Returns:
      The runs, in that order, named by the shortest ends of their paths that differ.

    Raises:
      ValueError: A folder is named twice, holds no run or a broken file; one line.
      OSError: It cannot be read.
    """
    paths = [Path(workdir).expanduser() for workdir in workdirs]
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read(path: Path, name: str) -> Run:
    if not path.is_dir():
        what = "is a file" if path.exists() else "no such folder"
        raise ValueError(f"{path}: {what}; give the workdir of a run of train.py")
    metrics = path / "metrics.jsonl"
    if not metrics.is_file():
        raise ValueError(f"{path} has no metrics.jsonl: give the workdir of a run of train.py")
    entries = [_parse(line) for line in _lines(metrics)]
    records = _since_the_beginning([record for record in entries if record is not None])
    kept = _without_superseded(records)
    kinds = {key: _by_step(kept, key) for key in ("loss", "eval_loss", "sample")}
    if not any(kinds.values()):
        raise ValueError(f"{metrics} has no records yet: wait for the first logged step")
    times = [record["time"] for record in records if "time" in record]
    return Run(
        name=name,
        config=_read_json(path / "config.json"),
        facts=_read_json(path / "run.json"),
        train=kinds["loss"],
        evals=kinds["eval_loss"],
        samples=kinds["sample"],
        resumes=[record["step"] for record in kept if "resumed" in record],
        times_resumed=sum("resumed" in record for record in records),
        seconds=_seconds(records) if times else None,
        started=times[0] if times else None,
        unreadable=_unreadable(entries),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise ValueError(f"{path}: named twice; a run is compared with others")
    length = 1
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    names = [str(Path(*own[-length:])) for own in parts]
    # Nor may a name hold what XML has no character for.
    return ["".join(c if c.isprintable() else "\ufffd" for c in name) for name in names]


def _lines(metrics: Path) -> Iterator[str]:
    with metrics.open(encoding="utf-8", errors="replace") as file:
        yield from (line for line in file if line.strip())


def _parse(line: str) -> Record | None:
    """Returns the record of a line, None if there is none."""
    # A process that was killed leaves a torn line, and if the next one wrote on right behind it,
    # a whole record ends that line.
    start = line.find("{")
    while start >= 0:
        try:
            # The trainer writes null, but other writers of JSON write NaN.
            record = json.loads(line[start:], parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            start = line.find("{", start + 1)
            continue
        is_record = type(record.get("step")) is int and 0 <= record["step"] < 2**53
        is_timed = isinstance(record.get("time", 0.0), int | float)
        return record if is_record and is_timed else None
    return None


def _since_the_beginning(records: list[Record]) -> list[Record]:
    """Leaves out the records of processes that ended before their first checkpoint."""
    begun = [n for n, record in enumerate(records) if "resumed" in record and record["step"] == 0]
    return records[begun[-1] + 1 :] if begun else records


def _without_superseded(records: Sequence[Record]) -> list[Record]:
    kept: list[Record] = []
    for record in records:
        if "resumed" in record:
            kept = [earlier for earlier in kept if earlier["step"] <= record["step"]]
        kept.append(record)
    return kept


def _by_step(records: Sequence[Record], key: str) -> list[Record]:
    """The records of one kind; of several after the same step, the last one counts."""
    last = {record["step"]: record for record in records if key in record}
    return [last[step] for step in sorted(last)]


def _seconds(records: Sequence[Record]) -> float:
    """The time between a process's first and last record, summed over the processes."""
    seconds, previous = 0.0, None
    for record in records:
        time = record.get("time")
        if time is None:
            continue
        if previous is not None and "resumed" not in record:
            seconds += time - previous
        previous = time
    return seconds


def _unreadable(entries: Sequence[Record | None]) -> int:
    """Counts lines without a record, but for those that a killed process leaves."""
    following = [*entries[1:], {"resumed": True}]
    return sum(
        entry is None and (after is None or "resumed" not in after)
        for entry, after in zip(entries, following, strict=True)
    )


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON, {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: not a JSON object")
    return value
