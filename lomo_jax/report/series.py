"""Numbers on their way from records to a chart."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

from lomo_jax.report.read import Record

_SMOOTH = 20  # a mean is over that part of a line
_FEW = 20  # values of which none is an outlier


def series(records: Sequence[Record], key: str) -> tuple[np.ndarray, np.ndarray]:
    """Returns steps and values, float64, of the records that have `key`; null is NaN there."""
    found = [(record["step"], record[key]) for record in records if key in record]
    steps = np.array([step for step, _ in found], np.float64)
    values = [value if isinstance(value, int | float) else np.nan for _, value in found]
    return steps, np.array(values, np.float64)


def downsample(steps: np.ndarray, values: np.ndarray, points: int) -> tuple[np.ndarray, np.ndarray]:
    """Thins out a line, so that its spikes stay.

    Args:
      steps: Where the points are.
      values: The points; NaN is a gap.
      points: How many may be left, at least 4.

    Returns:
      The lowest and the highest point of each stretch of the line, and its two ends.
    """
    if len(steps) <= points:
        return steps, values
    edges = np.linspace(1, len(steps) - 1, (points - 2) // 2 + 1).astype(int)
    kept = {0, len(steps) - 1}
    for start, end in itertools.pairwise(edges):
        part = values[start:end]
        if np.all(np.isnan(part)):
            kept.add(start)
        else:
            kept |= {start + int(np.nanargmin(part)), start + int(np.nanargmax(part))}
    index = np.array(sorted(kept))
    return steps[index], values[index]


def smooth(values: np.ndarray) -> np.ndarray | None:
    """Returns the mean over a twentieth of the line around each point; None for a short line.

    A gap stays one and does not count. At the ends the stretch is shorter, on both sides alike: a
    mean of one side would lie beside a line that is steep there.
    """
    width = 2 * (len(values) // (2 * _SMOOTH)) + 1
    if width < 3:
        return None
    known = ~np.isnan(values)
    sums = np.concatenate(([0.0], np.cumsum(np.where(known, values, 0.0))))
    counts = np.concatenate(([0], np.cumsum(known)))
    place = np.arange(len(values))
    half = np.minimum(width // 2, np.minimum(place, place[::-1]))
    start, end = place - half, place + half + 1
    mean = (sums[end] - sums[start]) / np.maximum(counts[end] - counts[start], 1)
    return np.where(known, mean, np.nan)


def isolated(values: np.ndarray) -> np.ndarray:
    """Returns where a line is a single point, which has to be marked to be seen."""
    gap = np.isnan(np.concatenate(([np.nan], values, [np.nan])))
    return ~gap[1:-1] & gap[:-2] & gap[2:]


def ceiling(values: np.ndarray) -> float:
    """Returns the value up to which a line is worth drawing; NaN if it has none.

    A few outliers, such as the first steps of random weights or a spike, would press all the rest
    of the line against the axis.
    """
    finite = values[np.isfinite(values)]
    if len(finite) == 0:
        return np.nan
    highest, lowest = float(finite.max()), float(finite.min())
    if len(finite) < _FEW:
        return highest
    usual = float(np.percentile(finite, 95))
    return min(highest, usual + 1.5 * (usual - lowest))
