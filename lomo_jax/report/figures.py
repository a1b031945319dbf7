"""The charts of the page, each drawn for a wide and for a narrow screen."""

from __future__ import annotations

from collections.abc import Sequence

from lomo_jax.report import draw, markup
from lomo_jax.report.charts import Chart, charts
from lomo_jax.report.memory import MEASURED, PARTS, bars, table
from lomo_jax.report.read import Run
from lomo_jax.report.series import smooth


def curves(runs: Sequence[Run]) -> str:
    """All curves over steps."""
    shown = charts(runs)
    said = []
    if any(_is_smoothed(chart) for chart in shown):
        said.append("Faint lines are single logged steps, strong ones their running mean.")
    if any(run.resumes for run in runs):
        said.append("A tick on the axis is a step from whose checkpoint the run went on.")
    figures = "\n".join(_figure(chart) for chart in shown)
    return markup.section(
        "Curves", markup.note(" ".join(said)), f'<div class="charts">\n{figures}\n</div>'
    )


def memory(runs: Sequence[Run]) -> str:
    """The plan of each run beside what was measured."""
    shown = bars(runs)
    if not shown:
        return ""
    alt = "Device memory. " + ". ".join(bar.label() for bar in shown) + "."
    swatches = [markup.swatch(colour, label, "box") for label, _, colour in PARTS]
    if any(colour == MEASURED for bar in shown for _, colour in bar.parts):
        swatches.append(markup.swatch(MEASURED, "measured peak", "box"))
    if any(bar.limit_gib is not None for bar in shown):
        swatches.append(markup.swatch(-1, "JAX may allocate", "mark"))
    figure = _drawn(
        "Memory of each device",
        markup.key(swatches),
        draw.memory(shown, alt, draw.WIDE),
        draw.memory(shown, alt, draw.NARROW),
        full=True,
    )
    head = ("", *(markup.text(run.name) for run in runs)) if len(runs) > 1 else ()
    rows = markup.scrolling(markup.table(head, table(runs), "numbers"), "Memory in numbers")
    return markup.section(
        "Memory",
        f'<div class="charts">{figure}</div>',
        markup.folded("The same in numbers", rows),
    )


def _figure(chart: Chart) -> str:
    mixed = not all(line.marked for line in chart.lines)
    swatches = [
        markup.swatch(line.colour, line.label, "dot" if line.marked and mixed else "line")
        for line in chart.lines
    ]
    return _drawn(
        chart.title,
        markup.key(swatches) if swatches[1:] else "",
        draw.chart(chart, draw.WIDE if chart.wide else draw.HALF),
        draw.chart(chart, draw.NARROW),
        "".join(markup.note(note) for note in chart.notes()),
        full=chart.wide,
    )


def _drawn(
    title: str, key: str, wide: str, narrow: str, notes: str = "", *, full: bool = False
) -> str:
    kind = ' class="full"' if full else ""
    return (
        f"<figure{kind}>\n<figcaption><h3>{markup.text(title)}</h3>{key}</figcaption>\n"
        f'<div class="wide">{wide}</div>\n<div class="narrow">{narrow}</div>\n{notes}</figure>'
    )


def _is_smoothed(chart: Chart) -> bool:
    return chart.smooth and any(
        smooth(line.values) is not None for line in chart.lines if not line.marked
    )
