"""Draws the curves of runs with matplotlib."""

from __future__ import annotations

import base64
import io
from collections.abc import Sequence
from typing import Any, NamedTuple

import matplotlib.style
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from lomo_jax.report.runs import Run

# Okabe and Ito's, which colour-blind readers can tell apart.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#1c1d1f", "#8d9096")
_STYLE: dict[str, Any] = {
    "font.size": 13,
    "path.simplify_threshold": 0.5,  # pixels: keeps the page of a long run small
    "svg.fonttype": "none",
    "svg.hashsalt": "lomo_jax",  # the same runs give the same page
}


# Title of a chart -> names of its curves -> keys of the records.
_CHARTS = {
    "loss": {"training": "loss", "held-out": "eval_loss"},
    "accuracy": {"training": "accuracy", "held-out": "eval_accuracy"},
    "learning rate": {"": "learning_rate"},
    "tokens per second": {"": "tokens_per_second"},
    "share of peak compute": {"": "flop_utilisation"},
    "gradient norm": {"": "grad_norm"},
    "loss scale": {"": "loss_scale"},
}
_NOT_FROM_ZERO = {"loss", "eval_loss", "accuracy", "eval_accuracy"}
# Values of single steps: these get a running mean.
_NOISY = {"loss", "accuracy", "tokens_per_second", "flop_utilisation", "grad_norm"}


class Curve(NamedTuple):
    """One curve."""

    label: str
    key: str  # of the records
    number: int  # of its colour
    steps: np.ndarray
    values: np.ndarray  # NaN is a gap


class Chart(NamedTuple):
    """A chart over steps."""

    title: str
    curves: list[Curve]
    image: str  # URL that contains the SVG
    alt: str
    notes: list[str]  # values above the chart or not finite


def draw(runs: Sequence[Run]) -> list[Chart]:
    """Draws the charts that the runs have values for, the most important first."""
    charts = _CHARTS
    if tasks := dict.fromkeys(key for run in runs for key in run.task_keys()):
        charts = charts | {"tasks": {key.removeprefix("eval_"): key for key in tasks}}
    if len(runs) > 1:  # training and held-out curves of several runs in one chart are a tangle
        charts = {
            f"{name} {title}".strip(): {"": key}
            for title, keys in charts.items()
            for name, key in reversed(keys.items())
        }
    drawn = ((title, _curves(keys, runs)) for title, keys in charts.items())
    return [_chart(title.capitalize(), curves) for title, curves in drawn if curves]


def _curves(keys: dict[str, str], runs: Sequence[Run]) -> list[Curve]:
    named = ((name or run.name, key, run) for run in runs for name, key in keys.items())
    curves = [Curve(name, key, n, *run.series(key)) for n, (name, key, run) in enumerate(named)]
    return [curve for curve in curves if np.isfinite(curve.values).any()]


def _chart(title: str, curves: list[Curve]) -> Chart:
    limits = _limits(curves)
    alt, notes = [], []
    for label, _, _, steps, values in curves:
        finite = np.flatnonzero(np.isfinite(values))
        first, top, last = (
            f"{values[n]:,.6g} at step {steps[n]:,.0f}"
            for n in (finite[0], np.nanargmax(values), finite[-1])
        )
        alt.append(f"{label}: {first} to {last}")
        if above := np.sum(values > limits[1]):
            notes.append(f"{label}: {above:,} above the chart, up to {top}.")
        if gaps := len(values) - len(finite):
            step = steps[np.isnan(values)][0]
            notes.append(f"{label}: {gaps:,} not finite, the first at step {step:,.0f}.")
    return Chart(title, curves, _svg(curves, limits), f"{title}. {'; '.join(alt)}.", notes)


def _limits(curves: Sequence[Curve]) -> tuple[float, float]:
    """Returns the ends of the values' axis, without rare spikes that would flatten the rest."""
    finite = [curve.values[np.isfinite(curve.values)] for curve in curves]
    from_zero = curves[0].key not in _NOT_FROM_ZERO
    low = 0.0 if from_zero else min(values.min() for values in finite)
    usual = max(np.percentile(v, 95) if len(v) >= 20 else v.max() for v in finite)
    high = min(max(values.max() for values in finite), usual + 1.5 * (usual - low))
    margin = 0.05 * (high - low) or 0.5
    return (low if from_zero else low - margin), high + margin


def _svg(curves: Sequence[Curve], limits: tuple[float, float]) -> str:
    file = io.BytesIO()
    with matplotlib.style.context(["default", _STYLE]):  # not the user's matplotlibrc
        figure = Figure(figsize=(6.4, 3.2), layout="constrained")
        axes = figure.subplots()
        for curve in curves:
            _plot(axes, curve)
        axes.spines[["left", "right", "top"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.01)
        axes.set_ylim(limits)
        axes.set_xlabel("step")
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.xaxis.set_major_formatter("{x:,.10g}")
        axes.yaxis.set_major_formatter("{x:,.10g}")
        figure.savefig(file, format="svg", metadata={"Date": None})
    return f"data:image/svg+xml;base64,{base64.b64encode(file.getvalue()).decode()}"


def _plot(axes: Axes, curve: Curve) -> None:
    colour, values = COLOURS[curve.number % len(COLOURS)], curve.values
    is_short = len(values) <= 50
    if curve.key in _NOISY and not is_short:
        axes.plot(curve.steps, values, color=colour, alpha=0.35, linewidth=0.8)
        values = _running_mean(values)
    marker = "o" if is_short else None  # a single point is invisible without
    axes.plot(curve.steps, values, color=colour, marker=marker, markersize=4)


def _running_mean(values: np.ndarray) -> np.ndarray:
    """Returns the mean over the twentieth of the curve around each point; NaN stays NaN."""
    place = np.arange(len(values))
    # Symmetric at the ends too, so that the mean of a steep curve stays on it.
    half = np.minimum(len(values) // 40, np.minimum(place, place[::-1]))
    return np.array(
        [
            np.nan if np.isnan(value) else np.nanmean(values[n - k : n + k + 1])
            for n, (value, k) in enumerate(zip(values, half, strict=True))
        ]
    )
