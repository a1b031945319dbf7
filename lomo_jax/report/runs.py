"""Reads the folders of runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lomo_jax import run_files
from lomo_jax._json import read_json
from lomo_jax.errors import UserError
from lomo_jax.run_files import Record, RunInfo


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. Its records are sorted by step, at most one per step."""

    name: str  # unique on the page
    config: dict[str, Any]  # nested; empty without config.json
    info: RunInfo | None  # None without run.json
    logged: list[Record]  # training steps
    evaluations: list[Record]
    samples: list[Record]
    resumes: list[int]  # steps of the checkpoints it resumed from, in order of time
    started: float | None  # Unix time
    seconds: float  # of training, without the time between a stop and a resume
    unreadable: int  # lines that hold no record though no process was killed there

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps and values of a number in the records.

        Args:
          key: Its name, such as "loss" or "eval_loss".

        Returns:
          Two float64 arrays of one length. A value that is not finite is NaN.
        """
        records = self.evaluations if key.startswith("eval_") else self.logged
        found = [(record["step"], record[key]) for record in records if key in record]
        values = [
            value if isinstance(value, int | float) and abs(value) < 1e300 else math.nan
            for _, value in found
        ]
        return np.array([step for step, _ in found], np.float64), np.array(values, np.float64)


def read(folders: Sequence[str | Path]) -> list[Run]:
    """Reads runs, finished or not.

    Args:
      folders: The folder of each run.

    Returns:
      The runs in the same order. A run is named by its folder, with as many parent folders as it
      takes to make the names differ.

    Raises:
      UserError: A folder holds no run or is given twice, or one of its files is damaged.
      OSError: A file cannot be read.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    return [_read(path, name) for path, name in zip(paths, _names(paths), strict=True)]


def _read(path: Path, name: str) -> Run:
    if not (path / run_files.METRICS).is_file():
        problem = f"has no {run_files.METRICS}" if path.is_dir() else "is not a folder"
        raise UserError(f"{path} {problem}: give the folder of a run, such as runs/quickstart")
    lines = list(run_files.read_metrics(path))
    history = _since_start([record for record in lines if record is not None])
    records = [_by_step(history, key) for key in ("loss", "eval_loss", "sample")]
    if not any(records):
        raise UserError(f"{path / run_files.METRICS} has no records yet: wait for the first step")
    has_config = (path / run_files.CONFIG).exists()
    return Run(
        name=name,
        config=read_json(path / run_files.CONFIG) if has_config else {},
        info=RunInfo.read(path),
        **dict(zip(("logged", "evaluations", "samples"), records, strict=True)),
        resumes=[record["step"] for record in history if "resumed" in record],
        started=next((record["time"] for record in history if "time" in record), None),
        seconds=_seconds(history),
        unreadable=_count_unreadable(lines),
    )


def _names(paths: Sequence[Path]) -> list[str]:
    parts = [path.resolve().parts for path in paths]
    for path, own in zip(paths, parts, strict=True):
        if parts.count(own) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    length = 1
    while len({own[-length:] for own in parts}) < len(parts):
        length += 1
    names = ("/".join(own[-length:]) for own in parts)
    return [
        "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in n) for n in names
    ]


def _since_start(history: list[Record]) -> list[Record]:
    """Drops the records of processes that ended before the first checkpoint."""
    restarts = [n for n, r in enumerate(history) if "resumed" in r and r["step"] == 0]
    return history[restarts[-1] + 1 :] if restarts else history


def _by_step(history: Sequence[Record], key: str) -> list[Record]:
    """Returns the record that counts of each step that has `key`.

    A resumed run computes the later steps again, and may evaluate a step twice.
    """
    found: dict[int, Record] = {}
    end = math.inf  # the lowest step that a later process resumed at
    for record in reversed(history):
        if "resumed" in record:
            end = min(end, record["step"])
        elif key in record and record["step"] <= end:
            found.setdefault(record["step"], record)
    return [found[step] for step in sorted(found)]


def _seconds(history: Sequence[Record]) -> float:
    """Returns the time between the first and the last record of each process, summed."""
    timed = [record for record in history if "time" in record]
    return sum(
        max(0.0, after["time"] - before["time"])  # a clock may be set back
        for before, after in itertools.pairwise(timed)
        if "resumed" not in after
    )


def _count_unreadable(lines: Sequence[Record | None]) -> int:
    # A killed process leaves half a line, at the end of the file or before a resume.
    following = [*lines[1:], {"resumed": True}]
    return sum(
        line is None and "resumed" not in (after or {})
        for line, after in zip(lines, following, strict=True)
    )
