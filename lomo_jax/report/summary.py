"""The numbers of a run that stand at the head of the page."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np

from lomo_jax.report.read import Record, Run
from lomo_jax.report.series import series


class Point(NamedTuple):
    """A value after so many steps; NaN if it was not finite."""

    step: int
    value: float


@dataclasses.dataclass(frozen=True)
class Summary:
    """What a run came to; None is what it did not record."""

    held_out: tuple[Point, Point, Point] | None  # first, best, last evaluation
    training: tuple[Point, Point] | None  # loss of the first and of the last logged step
    tokens_per_second: float | None  # median over the logged steps
    done: int  # steps
    steps: int | None  # of the whole run
    seconds: float | None
    parameters: int | None
    device: str | None
    planned_gib: float | None  # of each device, by the compiler
    usable_gib: float | None
    measured_gib: float | None  # the most in use on a device
    resumed: int  # times
    skipped: int | None  # updates


def summarise(run: Run) -> Summary:
    """Sums a run up."""
    _, speeds = series(run.train, "tokens_per_second")
    _, memory = series(run.train, "device_memory_gib")
    losses, evals = _points(run.train, "loss"), _points(run.evals, "eval_loss")
    plan = run.facts.get("plan") or {}
    skipped = [record["skipped"] for record in run.train if record.get("skipped") is not None]
    return Summary(
        held_out=(evals[0], _best(evals), evals[-1]) if evals else None,
        training=(losses[0], losses[-1]) if losses else None,
        tokens_per_second=_of_finite(np.median, speeds),
        done=max(record["step"] for record in (*run.train, *run.evals, *run.samples)),
        steps=run.config.get("steps"),
        seconds=run.seconds,
        parameters=run.facts.get("parameters"),
        device=_device(run.facts),
        planned_gib=plan.get("total_gib"),
        usable_gib=plan.get("usable_gib"),
        measured_gib=_of_finite(np.max, memory),
        resumed=run.times_resumed,
        skipped=skipped[-1] if skipped else None,
    )


def _points(records: Sequence[Record], key: str) -> list[Point]:
    steps, values = series(records, key)
    return [Point(int(step), float(value)) for step, value in zip(steps, values, strict=True)]


def _best(points: Sequence[Point]) -> Point:
    return min(points, key=lambda point: math.inf if math.isnan(point.value) else point.value)


def _of_finite(reduce: Any, values: np.ndarray) -> float | None:
    finite = values[np.isfinite(values)]
    return float(reduce(finite)) if len(finite) else None


def _device(facts: dict[str, Any]) -> str | None:
    device = facts.get("device")
    if device is None:
        return None
    devices = facts.get("devices") or 1
    processes = facts.get("processes") or 1
    count = f"{devices} \N{MULTIPLICATION SIGN} " if devices > 1 else ""
    return f"{count}{device}" + (f", {processes} processes" if processes > 1 else "")
