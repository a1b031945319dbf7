"""Reads the folders of runs."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from lomo_jax import run_files
from lomo_jax._json import read_json
from lomo_jax._schema import RUN_CONFIG
from lomo_jax.errors import UserError
from lomo_jax.run_files import Record, RunInfo


@dataclasses.dataclass(frozen=True)
class Run:
    """One run. Its records are sorted by step, at most one per step."""

    name: str  # unique on the page
    config: dict[str, Any]  # nested
    info: RunInfo
    logged: list[Record]  # training steps
    evaluations: list[Record]
    samples: list[Record]
    resumes: list[int]  # steps of the checkpoints it resumed from, in order of time
    started: float  # Unix time
    seconds: float  # of training, without the time between a stop and a resume
    evaluated: list[Record]  # by `lomo-jax eval`; see `run_files.append_evaluation`
    unreadable: int  # lines that hold no record, except a last one that is being written

    def task_keys(self) -> list[str]:
        """Returns the keys of what the tasks of the evaluations measure, "eval_boolq_acc"."""
        own = ("eval_loss", "eval_accuracy", "eval_perplexity")
        keys = dict.fromkeys(key for record in self.evaluations for key in record)
        return [key for key in keys if key.startswith("eval_") and key not in own]

    def series(self, key: str) -> tuple[np.ndarray, np.ndarray]:
        """Returns the steps and the values of a number, such as "loss", as float64 arrays.

        A value that is not finite is NaN.
        """
        records = self.evaluations if key.startswith("eval_") else self.logged
        points = [(record["step"], record[key]) for record in records if key in record]
        steps, values = np.array(points, np.float64).reshape(-1, 2).T
        return steps, values


def read(folders: Sequence[str | Path]) -> list[Run]:
    """Reads runs, finished or not.

    Args:
      folders: The folder of each run.

    Returns:
      The runs in the same order. The name of a run is its path below the folder that all are in.

    Raises:
      UserError: A folder holds no run or is given twice, or one of its files is damaged.
      OSError: A file cannot be read.
    """
    paths = [Path(folder).expanduser() for folder in folders]
    places = [path.resolve() for path in paths]
    for path, place in zip(paths, places, strict=True):
        if places.count(place) > 1:
            raise UserError(f"{path} is given twice: name each run once")
    common = os.path.commonpath([place.parent for place in places])
    return [
        _read(path, str(place.relative_to(common)))
        for path, place in zip(paths, places, strict=True)
    ]


def _read(path: Path, name: str) -> Run:
    info = RunInfo.read(path)
    if info is None:
        raise UserError(f"{path} is not the folder of a run: it has no {run_files.RUN}")
    has_metrics = (path / run_files.METRICS).exists()
    lines = list(run_files.read_metrics(path)) if has_metrics else []
    history = [record for record in lines if record is not None]
    logged, evaluations, samples = (
        _by_step(history, key) for key in ("loss", "eval_loss", "sample")
    )
    if not (logged or evaluations or samples):
        raise UserError(f"{path / run_files.METRICS} has no records yet: wait for the first step")
    return Run(
        name=name,
        config=read_json(path / run_files.CONFIG, RUN_CONFIG),
        info=info,
        logged=logged,
        evaluations=evaluations,
        samples=samples,
        resumes=[record["step"] for record in history if "resumed" in record],
        started=history[0]["time"],
        seconds=_seconds(history),
        evaluated=run_files.read_evaluations(path),
        unreadable=lines[:-1].count(None),
    )


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
    return sum(
        max(0.0, after["time"] - before["time"])  # a clock may be set back
        for before, after in itertools.pairwise(history)
        if "resumed" not in after
    )
