"""Fills the template of the page."""

from __future__ import annotations

import datetime
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lomo_jax.errors import UserError
from lomo_jax.plan.memory import PARTS
from lomo_jax.report.runs import Run


def render(runs: Sequence[Run]) -> str:
    """Renders one run, or several side by side.

    Returns:
      An HTML document that refers to nothing outside itself; the same for the same runs.

    Raises:
      UserError: jinja2 or matplotlib is not installed.
    """
    try:
        import jinja2

        from lomo_jax.report import charts
    except ModuleNotFoundError as error:
        raise UserError(f"a report needs {error.name}: pip install 'lomo_jax[plot]'") from None
    loader = jinja2.PackageLoader("lomo_jax.report", "")
    environment = jinja2.Environment(autoescape=True, loader=loader, trim_blocks=True)
    config = _rows(_fields(run.config) for run in runs)
    evaluations = _rows(_evaluations(run) for run in runs)
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        charts=charts.draw(runs),
        colours=charts.COLOURS,
        parts=PARTS,
        facts=_rows(_facts(run) for run in runs),
        memory=_rows(_memory(run) for run in runs),
        config=config,
        evaluations=evaluations,
        differing=[(name, cells) for name, cells in config if len(set(cells)) > 1],
    )


def _rows(columns: Iterable[Iterable[tuple[str, str]]]) -> list[tuple[str, list[str]]]:
    """Returns the rows of a table from (name, cell) of each run; a dash where a run has none."""
    cells = [dict(column) for column in columns]
    names = dict.fromkeys(name for column in cells for name in column)
    return [(name, [column.get(name, "\N{EN DASH}") for column in cells]) for name in names]


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    steps, losses = run.series("eval_loss")
    yield "Held-out loss", _change(losses) if len(losses) else "not evaluated yet"
    if np.isfinite(losses).any():
        best = np.nanargmin(losses)
        yield "Best held-out loss", f"{losses[best]:.3f} at step {steps[best]:,.0f}"
    if run.logged:
        yield "Training loss", _change(run.series("loss")[1])
    done = max(record["step"] for record in (*run.logged, *run.evaluations, *run.samples))
    total = run.config["steps"]
    yield "Steps", f"{done:,} of {total:,}{', not finished' * (done < total)}"
    _, speeds = run.series("tokens_per_second")
    if np.isfinite(speeds).any():
        yield "Median throughput", f"{np.nanmedian(speeds):,.0f} tokens/s"
    started = datetime.datetime.fromtimestamp(run.started, datetime.UTC)
    yield "Started", f"{started:%-d %B %Y, %H:%M} UTC"
    seconds = min(round(run.seconds), 10**12)  # a hand may have edited the times
    yield "Training time", str(datetime.timedelta(seconds=seconds))
    yield "Model", run.info.source
    yield "Parameters", f"{run.info.parameters / 1e6:,.1f} M"
    yield "Device", f"{run.info.devices} \N{MULTIPLICATION SIGN} {run.info.device}"
    yield "Versions", ", ".join(f"{name} {text}" for name, text in run.info.versions.items())
    if run.resumes:
        yield "Resumed", f"at step {', '.join(f'{step:,}' for step in run.resumes[-5:])}"
    _, skipped = run.series("skipped")
    if np.any(skipped > 0):
        yield "Skipped updates", f"{np.nanmax(skipped):,.0f}, gradient not finite"
    if run.unreadable:
        yield "Unreadable lines", f"{run.unreadable:,} in metrics.jsonl"


def _evaluations(run: Run) -> Iterator[tuple[str, str]]:
    """Yields each metric that `lomo-jax eval` measured, at the step that it measured last."""
    for record in run.evaluated:
        examples = record.get("limit")
        limit = f", at most {examples:,} examples" if examples else ""
        for name, value in record["metrics"].items():
            shown = "not finite" if value is None else f"{value:.4g}"
            yield name, f"{shown} at step {record['step']:,}{limit}"


def _memory(run: Run) -> Iterator[tuple[str, str]]:
    plan = run.info.memory
    yield from ((label, _gib(getattr(plan, field))) for label, field in PARTS.items())
    yield "planned in all", _gib(plan.total_gib)
    if plan.usable_gib is not None:
        yield "JAX may allocate", _gib(plan.usable_gib)
    if plan.host_gib:
        yield "planned in host memory", _gib(plan.host_gib)
    _, used = run.series("device_memory_gib")
    if np.isfinite(used).any():
        yield "measured peak", _gib(np.nanmax(used))


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields name and value of every field, such as ("model.path", "...")."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def _change(losses: np.ndarray) -> str:
    """Returns the first and the last loss, such as "4.003 → 3.445"."""
    ends = ("not finite" if np.isnan(loss) else f"{loss:.3f}" for loss in losses[[0, -1]])
    return " \N{RIGHTWARDS ARROW} ".join(dict.fromkeys(ends))


def _gib(value: float) -> str:
    return f"{value:.2f} GiB" if value >= 0.1 else f"{value * 2**10:.2f} MiB"
