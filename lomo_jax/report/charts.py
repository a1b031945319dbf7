"""Which charts there are of some runs, and what is on each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np

from lomo_jax.report import words
from lomo_jax.report.read import Run
from lomo_jax.report.series import ceiling, series

_Format = Callable[[float], str]


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve."""

    label: str
    colour: int  # of the palette; a run's number where runs are compared
    steps: np.ndarray
    values: np.ndarray  # NaN is a gap
    marked: bool = False  # each point is shown
    stairs: bool = False  # holds its value until the next point


@dataclasses.dataclass(frozen=True)
class Chart:
    """Curves over steps."""

    name: str  # unique on the page
    title: str
    lines: Sequence[Line]
    form: _Format  # of a value, in words
    ticks: Sequence[tuple[int, Sequence[int]]] = ()  # colour, steps: where runs went on
    wide: bool = False  # takes the whole width of the page
    smooth: bool = False  # noisy lines get their mean
    percent: bool = False
    from_zero: bool = False
    log: int | None = None  # the base, if the axis is logarithmic

    def span(self) -> tuple[float, float]:
        """The lowest and the highest value that there is room for; outliers have none."""
        every = np.concatenate([np.ravel(line.values) for line in self.lines])
        every = every[np.isfinite(every)]
        if len(every) == 0:
            return 0.0, 1.0
        lowest = float(every.min())
        if self.log is not None:
            return lowest, float(every.max())
        highest = float(np.nanmax([ceiling(line.values) for line in self.lines]))
        bottom = min(0.0, lowest) if self.from_zero else lowest
        margin = 0.06 * (highest - bottom) or 0.1 * abs(highest) or 1.0
        return (bottom if self.from_zero else bottom - margin), highest + margin

    def alt(self) -> str:
        """What a person who does not see the chart should know of it."""
        said = " ".join(self._name(line) + self._describe(line) for line in self.lines)
        return f"{self.title} over steps. {said}"

    def notes(self) -> list[str]:
        """What has to be told of the chart in words."""
        return [
            self._name(line) + note
            for line in self.lines
            for note in (*self._above(line), *self._gaps(line))
        ]

    def _name(self, line: Line) -> str:
        return f"{line.label}: " if len(self.lines) > 1 else ""

    def _describe(self, line: Line) -> str:
        finite = np.flatnonzero(np.isfinite(line.values))
        if len(finite) == 0:
            return "nothing finite."
        first, last = (self._point(line, index) for index in (finite[0], finite[-1]))
        return first + (f", {last}." if len(finite) > 1 else ".")

    def _point(self, line: Line, index: int) -> str:
        return f"{self.form(line.values[index])} at step {line.steps[index]:,.0f}"

    def _above(self, line: Line) -> list[str]:
        above = int(np.sum(line.values > self.span()[1]))
        if above == 0:
            return []
        highest = self._point(line, int(np.nanargmax(line.values)))
        points = "1 point is" if above == 1 else f"{above:,} points are"
        return [f"{points} above the chart, the highest {highest}."]

    def _gaps(self, line: Line) -> list[str]:
        steps = line.steps[np.isnan(line.values)]
        if len(steps) == 0:
            return []
        named = ", ".join(f"{step:,.0f}" for step in steps[:3])
        more = f" and {len(steps) - 3:,} more" if len(steps) > 3 else ""
        return [f"not finite at step {named}{more}."]


def charts(runs: Sequence[Run]) -> list[Chart]:
    """Returns the charts that these runs have the records for, most telling first."""
    compared = len(runs) > 1
    losses = _compared_losses(runs) if compared else [_losses(runs[0])]
    plain = (
        _chart(runs, "accuracy", "Accuracy", _accuracy(runs), _percent, percent=True, smooth=True),
        _chart(runs, "rate", "Learning rate", _one(runs, "learning_rate"), _short, from_zero=True),
        _chart(
            *(runs, "speed", "Tokens per second", _one(runs, "tokens_per_second"), words.rate),
            from_zero=True,
            smooth=True,
        ),
        _chart(
            *(runs, "flops", "Share of the device's peak FLOP/s"),
            *(_one(runs, "flop_utilisation"), _percent),
            percent=True,
            from_zero=True,
            smooth=True,
        ),
        _norms(runs),
        _chart(
            *(runs, "scale", "Loss scale", _one(runs, "loss_scale", stairs=True), _short), log=2
        ),
    )
    return [chart for chart in (*losses, *plain) if chart.lines]


def _losses(run: Run) -> Chart:
    training = _line(run.train, "loss", "training", 0)
    held_out = _line(run.evals, "eval_loss", "held out", 1, marked=True)
    return _chart([run], "loss", "Loss", [*training, *held_out], words.loss, wide=True, smooth=True)


def _compared_losses(runs: Sequence[Run]) -> list[Chart]:
    held_out = _one(runs, "eval_loss", of="evals", marked=True)
    return [
        _chart(runs, "held-out", "Held-out loss", held_out, words.loss, wide=True),
        _chart(
            *(runs, "loss", "Training loss", _one(runs, "loss"), words.loss),
            wide=True,
            smooth=True,
        ),
    ]


def _accuracy(runs: Sequence[Run]) -> list[Line]:
    if len(runs) > 1:
        return _one(runs, "eval_accuracy", of="evals", marked=True) or _one(runs, "accuracy")
    training = _line(runs[0].train, "accuracy", "training", 0)
    return [*training, *_line(runs[0].evals, "eval_accuracy", "held out", 1, marked=True)]


def _norms(runs: Sequence[Run]) -> Chart:
    lines = _one(runs, "grad_norm")
    every = np.concatenate([line.values for line in lines]) if lines else np.empty(0)
    every = every[np.isfinite(every)]
    # One spike of a norm may be a thousand times the rest.
    spread = len(every) > 0 and every.min() > 0 and every.max() > 10 * np.median(every)
    return _chart(
        *(runs, "norm", "Gradient norm", lines, _short),
        log=10 if spread else None,
        from_zero=not spread,
        smooth=True,
    )


def _one(runs: Sequence[Run], key: str, *, of: str = "train", **options: bool) -> list[Line]:
    """One line a run that has the key."""
    return [
        line
        for colour, run in enumerate(runs)
        for line in _line(getattr(run, of), key, run.name, colour, **options)
    ]


def _line(records: Sequence[dict], key: str, label: str, colour: int, **options: bool):
    steps, values = series(records, key)
    return [Line(label, colour, steps, values, **options)] if len(steps) else []


def _chart(
    runs: Sequence[Run],
    name: str,
    title: str,
    lines: Sequence[Line],
    form: _Format,
    **options,
) -> Chart:
    resumed = [(colour, run.resumes) for colour, run in enumerate(runs) if run.resumes]
    if len(runs) == 1:
        resumed = [(_INK, steps) for _, steps in resumed]
    return Chart(name, title, lines, form, ticks=resumed, **options)


def _percent(value: float) -> str:
    return f"{value:.1%}"


def _short(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


_INK = -1  # the colour of the text
