"""Draws the curves of runs with matplotlib, as SVG that takes its colours from the page."""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from lomo_jax.report.runs import Run

_NARROW = (440, 220)  # width and height in pixels
_BOTH = ((920, 300), _NARROW)  # for a desktop and for a phone
_STYLE: dict[str, Any] = {
    **{"axes.grid": True, "axes.grid.axis": "y", "grid.color": "black", "grid.alpha": 0.15},
    **{f"axes.spines.{side}": False for side in ("left", "right", "top")},
    **{"axes.xmargin": 0.01, "ytick.major.size": 0, "font.size": 13},
    "path.simplify_threshold": 0.5,  # pixels: keeps the page of a long run small
    "svg.fonttype": "none",
    "svg.hashsalt": "lomo_jax",  # the same runs give the same page
}


class _Kind(NamedTuple):
    title: str
    keys: dict[str, str]  # keys of the records -> names of their curves
    form: str  # of a value in words
    from_zero: bool = True
    is_noisy: bool = True  # gets a running mean
    sizes: tuple[tuple[int, int], ...] = (_NARROW,)


_KINDS = (
    _Kind("loss", {"loss": "training", "eval_loss": "held-out"}, ".3f", False, True, _BOTH),
    _Kind("accuracy", {"accuracy": "training", "eval_accuracy": "held-out"}, ".1%", False),
    _Kind("learning rate", {"learning_rate": ""}, ".3g", is_noisy=False),
    _Kind("tokens per second", {"tokens_per_second": ""}, ",.0f"),
    _Kind("share of peak compute", {"flop_utilisation": ""}, ".1%"),
    _Kind("gradient norm", {"grad_norm": ""}, ".3g"),
    _Kind("loss scale", {"loss_scale": ""}, ",.0f", is_noisy=False),
)


class Line(NamedTuple):
    """One curve."""

    label: str
    number: int  # of its colour
    steps: np.ndarray
    values: np.ndarray  # NaN is a gap
    is_held_out: bool


class Chart(NamedTuple):
    """A chart over steps."""

    title: str
    lines: list[Line]
    drawings: list[tuple[int, int, Markup]]  # width, height, content of <svg>; for phones the last
    alt: str
    notes: list[str]  # values outside the chart or not finite


def draw(runs: Sequence[Run]) -> list[Chart]:
    """Draws the charts that the runs have values for, the most important first."""
    kinds: Sequence[_Kind] = _KINDS
    if len(runs) > 1:  # training and held-out curves of several runs in one chart are a tangle
        kinds = [
            kind._replace(title=f"{label} {kind.title}".strip(), keys={key: ""})
            for kind in _KINDS
            for key, label in reversed(kind.keys.items())
        ]
    drawn = ((kind, _lines(kind, runs)) for kind in kinds)
    return [_chart(kind, runs, lines) for kind, lines in drawn if lines]


def _lines(kind: _Kind, runs: Sequence[Run]) -> list[Line]:
    pairs = ((run, key, label) for run in runs for key, label in kind.keys.items())
    lines = [
        Line(label or run.name, number, *run.series(key), key.startswith("eval_"))
        for number, (run, key, label) in enumerate(pairs)
    ]
    return [line for line in lines if np.isfinite(line.values).any()]


def _chart(kind: _Kind, runs: Sequence[Run], lines: list[Line]) -> Chart:
    limits = _limits(lines, from_zero=kind.from_zero)
    alt, notes = [], []
    for label, _, steps, values, _ in lines:
        finite = np.flatnonzero(np.isfinite(values))
        first, top, last = (
            f"{values[n]:{kind.form}} at step {steps[n]:,.0f}"
            for n in (finite[0], np.nanargmax(values), finite[-1])
        )
        alt.append(f"{label}: {first} to {last}")
        if above := np.sum(values > limits[1]):
            notes.append(f"{label}: {above:,} above the chart, up to {top}.")
        if gaps := len(values) - len(finite):
            step = steps[np.isnan(values)][0]
            notes.append(f"{label}: {gaps:,} not finite, the first at step {step:,.0f}.")
    resumes = {step for run in runs for step in run.resumes}
    drawings = [(*size, _svg(kind, lines, limits, resumes, *size)) for size in kind.sizes]
    title = kind.title.capitalize()
    return Chart(title, lines, drawings, f"{title}. {'; '.join(alt)}.", notes)


def _limits(lines: Sequence[Line], *, from_zero: bool) -> tuple[float, float]:
    """Returns the ends of the values' axis, without rare spikes that would flatten the rest."""
    known = [line.values[np.isfinite(line.values)] for line in lines]
    low, high = min(values.min() for values in known), max(values.max() for values in known)
    usual = max(np.percentile(v, 95) if len(v) >= 20 else v.max() for v in known)
    high = min(high, usual + 1.5 * (usual - low))
    bottom = min(low, 0.0) if from_zero else low
    margin = 0.05 * (high - bottom) or 0.05 * abs(high) or 1.0
    return (bottom if from_zero else bottom - margin), high + margin


def _svg(
    kind: _Kind,
    lines: Sequence[Line],
    limits: tuple[float, float],
    resumes: Iterable[int],
    width: int,
    height: int,
) -> Markup:
    file = io.StringIO()
    with matplotlib.style.context(["default", _STYLE]):  # not the user's matplotlibrc
        figure = Figure(figsize=(width / 72, height / 72))
        axes = figure.add_axes((52 / width, 42 / height, 1 - 64 / width, 1 - 62 / height))
        for line in lines:
            _plot(axes, line, is_noisy=kind.is_noisy)
        for step in sorted(resumes):
            axes.axvline(step, 0, 0.06, color="black", linewidth=1.5)
        axes.set_ylim(limits)
        is_percent = kind.form.endswith("%")
        axes.yaxis.set_major_formatter(PercentFormatter(1) if is_percent else "{x:,.10g}")
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.xaxis.set_major_locator(MaxNLocator(width // 100, integer=True))
        axes.set_xlabel("step", loc="right")
        nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(file, format="svg", transparent=True, metadata=nothing)
    svg = re.sub(r"(?s)^.*?<svg.*?>|<style.*?</style>|</svg>\s*$", "", file.getvalue())
    svg = re.sub(r"#00c0d(\d)", r"var(--c\1)", svg.replace("#000000", "currentColor"))
    # An id is unique on the page, not only in its drawing.
    name = f"{kind.title}-{width}".replace(" ", "-")
    return Markup(re.sub(r'(\bid="|url\(#|href="#)', rf"\g<1>{name}-", svg))


def _plot(axes: Axes, line: Line, *, is_noisy: bool) -> None:
    colour, values = f"#00c0d{line.number % 8}", line.values  # the page's variables --c0 to --c7
    if is_noisy and not line.is_held_out and len(values) >= 40:
        axes.plot(line.steps, values, color=colour, alpha=0.35, linewidth=0.8)
        values = _running_mean(values)
    gap = np.isnan(np.pad(values, 1, constant_values=np.nan))
    marked = ~gap[1:-1] & gap[:-2] & gap[2:]  # a single point is invisible without a marker
    marked |= line.is_held_out and len(values) <= 50
    axes.plot(line.steps, values, color=colour, marker="o", markevery=marked, markersize=5)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the twentieth of the line around each point; NaN stays NaN."""
    place = np.arange(len(values))
    # Symmetric at the ends too, so that the mean of a steep line stays on the line.
    half = np.minimum(len(values) // 40, np.minimum(place, place[::-1]))
    return np.array(
        [
            np.nan if np.isnan(value) else np.nanmean(values[n - k : n + k + 1])
            for n, (value, k) in enumerate(zip(values, half, strict=True))
        ]
    )
