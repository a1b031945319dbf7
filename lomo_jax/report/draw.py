"""Draws charts with matplotlib, as SVG that stands in the page and takes its fonts and colours."""

from __future__ import annotations

import io
import warnings
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lomo_jax.report import series, svg, words
from lomo_jax.report.charts import Chart, Line
from lomo_jax.report.memory import Bar

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDE, HALF, NARROW = 920, 440, 350  # pixels: the page's column, half of it, a phone's
COLOURS = 8
_LETTER = 7  # pixels
_POINTS = 3000  # of all lines of a chart; a page of many runs stays small
# matplotlib wants colours, the page decides on them: these stand for its variables.
_INK, _FAINT = "#010000", "#020000"
_SERIES = [f"#0300{number:02x}" for number in range(COLOURS)]
_VARIABLES = {
    _INK: "var(--dim)",
    _FAINT: "var(--line)",
    **{colour: f"var(--c{number})" for number, colour in enumerate(_SERIES)},
}
_STEPS = (1, 2, 2.5, 5, 10)  # between the numbers on an axis
_DASHES = ("-", (0, (4, 2)), (0, (1, 1.5)))  # for runs after the eighth
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "lomo_jax",
    "path.simplify": False,  # the lines are thinned out already
    "text.parse_math": False,  # a run's name may hold dollars
    "font.family": "DejaVu Sans",  # comes with matplotlib, and is wider than a page's fonts
    "axes.edgecolor": _INK,
    "axes.grid": True,
    "axes.grid.axis": "y",
    "axes.axisbelow": True,
    "axes.spines.left": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.linewidth": 0.8,
    "grid.color": _FAINT,
    "grid.linewidth": 0.8,
    "axes.labelcolor": _INK,
    "text.color": _INK,
    "xtick.color": _INK,
    "ytick.color": _INK,
    "xtick.major.size": 3,
    "ytick.major.size": 0,
    "xtick.minor.size": 0,
    "ytick.minor.size": 0,
}


def chart(what: Chart, width: int) -> str:
    """Draws a chart.

    Args:
      what: The chart.
      width: Of the drawing, in pixels.

    Returns:
      An `<svg>` element, the same for the same chart.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    height = 330 if what.wide and width > NARROW else 230

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _paint(axes, what, width)
        # Not a layout engine: charts in one column have their axes below each other.
        left, right, top, bottom = 48, 14, 10, 40
        figure.subplots_adjust(left / width, bottom / height, 1 - right / width, 1 - top / height)

    return _svg(paint, width, height, f"{what.name}-{width}", what.alt())


def memory(bars: Sequence[Bar], alt: str, width: int) -> str:
    """Draws memory as stacked bars, one below the other; see `chart`."""
    height = 44 * len(bars) + 52

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        _paint_bars(axes, bars, width)
        figure.subplots_adjust(14 / width, 40 / height, 1 - 14 / width, 1 - 12 / height)

    return _svg(paint, width, height, f"memory-{width}", alt)


def _paint(axes: Axes, what: Chart, width: int) -> None:
    from matplotlib import ticker

    points = max(200, min(1000, _POINTS // max(1, len(what.lines)), 3 * width))
    for line in what.lines:
        _paint_line(axes, what, line, points)
    for colour, steps in what.ticks:
        shown = _INK if colour < 0 else _SERIES[colour % COLOURS]
        for step in sorted(set(steps)):
            axes.axvline(step, 0, 0.08, color=shown, linewidth=1.2)
    if what.log is not None:
        axes.set_yscale("log", base=what.log)
        lowest, highest = what.span()
        places = (1, 2, 5) if what.log == 10 and highest < 100 * lowest else (1,)
        axes.yaxis.set_major_locator(ticker.LogLocator(what.log, subs=places, numticks=7))
        axes.yaxis.set_minor_locator(ticker.NullLocator())
    else:
        axes.yaxis.set_major_locator(ticker.MaxNLocator(6, steps=_STEPS))
        axes.set_ylim(*what.span())
    axes.xaxis.set_major_locator(
        ticker.MaxNLocator(4 if width <= HALF else 8, integer=True, steps=_STEPS)
    )
    axes.set_xlim(*_span(what.lines))
    _label(axes, what)
    axes.set_xlabel("step", loc="right", fontsize=12)
    axes.tick_params(labelsize=12)


def _label(axes: Axes, what: Chart) -> None:
    """Writes the numbers of both axes, each with the digits that its neighbours have."""
    form = words.percents if what.percent else words.ticks
    form = {2: words.powers_of_two, 10: words.magnitudes}.get(what.log or 0, form)
    for axis, span, label in (
        (axes.xaxis, axes.get_xlim(), words.ticks),
        (axes.yaxis, axes.get_ylim(), form),
    ):
        shown = [place for place in axis.get_majorticklocs() if span[0] <= place <= span[1]]
        axis.set_ticks(shown, label(shown))


def _paint_line(axes: Axes, what: Chart, line: Line, points: int) -> None:
    colour = _SERIES[line.colour % COLOURS]
    dash = _DASHES[line.colour // COLOURS % len(_DASHES)]
    smooth = series.smooth(line.values) if what.smooth and not line.marked else None
    steps, values = series.downsample(line.steps, line.values, points // (8 if line.marked else 1))
    style: dict[str, Any] = {"color": colour, "linestyle": dash, "linewidth": 1.8}
    if line.marked:
        style |= {"marker": "o", "markersize": 5 if len(steps) <= 40 else 3}
    if line.stairs:
        style |= {"drawstyle": "steps-post"}
    if smooth is None:
        axes.plot(steps, values, **style)
        alone = series.isolated(values)
        if np.any(alone) and not line.marked:
            axes.plot(steps[alone], values[alone], "o", color=colour, markersize=5)
        return
    axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.4)
    axes.plot(*series.downsample(line.steps, smooth, points // 2), **style)


def _span(lines: Sequence[Line]) -> tuple[float, float]:
    steps = np.concatenate([line.steps for line in lines])
    first, last = min(0.0, float(steps.min())), float(steps.max())
    margin = 0.01 * (last - first) or 0.5
    return first - margin, last + margin


def _paint_bars(axes: Axes, bars: Sequence[Bar], width: int) -> None:
    from matplotlib import ticker

    axes.grid(visible=False)
    for row, bar in enumerate(bars):
        left = 0.0
        for gib, colour in bar.parts:
            axes.barh(row, gib, left=left, height=0.38, color=_SERIES[colour])
            left += gib
        axes.text(0, row - 0.26, bar.label(width // _LETTER), fontsize=12, va="bottom")
        if bar.limit_gib is not None:
            axes.plot([bar.limit_gib] * 2, [row - 0.3, row + 0.3], color=_INK, linewidth=2)
    ends = [max(sum(gib for gib, _ in bar.parts), bar.limit_gib or 0) for bar in bars]
    axes.set_xlim(0, 1.02 * max(ends) or 1)
    axes.set_ylim(len(bars) - 0.6, -0.75)
    axes.set_yticks([])
    axes.xaxis.set_major_locator(ticker.MaxNLocator(4 if width <= NARROW else 8, steps=_STEPS))
    axes.set_xlabel("GiB", loc="right", fontsize=12)
    axes.tick_params(labelsize=12)


def _svg(paint: Any, width: int, height: int, name: str, alt: str) -> str:
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError(
            "a report needs matplotlib: pip install 'lomo_jax[plot]'"
        ) from None
    file = io.StringIO()
    # Not the user's matplotlibrc: the page looks the same everywhere.
    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_STYLE)
        figure = Figure(figsize=(width / 72, height / 72))
        paint(figure)
        with warnings.catch_warnings():
            # The page's fonts have more letters than matplotlib's.
            warnings.filterwarnings("ignore", "Glyph .* missing from font")
            figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    return svg.embed(file.getvalue(), name, alt, _VARIABLES)
