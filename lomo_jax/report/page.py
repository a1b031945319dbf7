"""Fills the template of the page."""

from __future__ import annotations

import datetime
import json
import math
from collections.abc import Iterator, Sequence
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
    environment.filters["loss"] = _loss
    return environment.get_template("page.html.jinja").render(
        runs=runs,
        charts=charts.draw(runs),
        held_out=[_held_out(run) for run in runs],
        facts=_rows([dict(_facts(run)) for run in runs]),
        parts=PARTS,
        memory=_rows([dict(_memory(run)) for run in runs]),
        environment=_rows([dict(_environment(run)) for run in runs]),
        differing=[
            row
            for row in _rows([dict(_fields(run.config)) for run in runs])
            if len(set(row[1])) > 1
        ],
        configs=[json.dumps(run.config, indent=2, ensure_ascii=False) for run in runs],
    )


def _rows(columns: Sequence[dict[str, str]]) -> list[tuple[str, list[str]]]:
    """Returns the rows of a table: a name and a cell for each run, a dash where it has none."""
    names = dict.fromkeys(name for column in columns for name in column)
    return [(name, [column.get(name, "\N{EN DASH}") for column in columns]) for name in names]


def _held_out(run: Run) -> list[tuple[float, float]]:
    """Returns loss and step of the first, the best and the last evaluation, [] without one."""
    evaluations = [(value, step) for step, value in zip(*run.series("eval_loss"), strict=True)]
    finite = [evaluation for evaluation in evaluations if math.isfinite(evaluation[0])]
    return [evaluations[0], min(finite or evaluations), evaluations[-1]] if evaluations else []


def _facts(run: Run) -> Iterator[tuple[str, str]]:
    done = max(record["step"] for record in (*run.logged, *run.evaluations, *run.samples))
    steps = run.config.get("steps")
    total = f" of {steps:,}" + ", not finished" * (done < steps) if type(steps) is int else ""
    yield "Steps", f"{done:,}{total}"
    if run.logged:
        first, *_, last = np.repeat(run.series("loss")[1], 2)
        yield "Training loss", f"{_loss(first)} \N{RIGHTWARDS ARROW} {_loss(last)}"
    _, speeds = run.series("tokens_per_second")
    if np.isfinite(speeds).any():
        yield "Median throughput", f"{np.nanmedian(speeds):,.0f} tokens/s"
    if run.started is not None:
        started = datetime.datetime.fromtimestamp(run.started, datetime.UTC)
        yield "Started", f"{started:%-d %B %Y, %H:%M} UTC"
    yield "Training time", str(datetime.timedelta(seconds=round(run.seconds)))
    if run.info is not None:
        yield "Parameters", f"{run.info.parameters / 1e6:,.1f} M"
        yield "Device", f"{run.info.devices} \N{MULTIPLICATION SIGN} {run.info.device}"
    if run.resumes:
        yield "Resumed", f"at step {', '.join(f'{step:,}' for step in run.resumes[-5:])}"
    _, skipped = run.series("skipped")
    if np.any(skipped > 0):
        yield "Skipped updates", f"{np.nanmax(skipped):,.0f}, gradient not finite"
    if run.unreadable:
        yield "Unreadable lines", f"{run.unreadable:,} in metrics.jsonl"


def _memory(run: Run) -> Iterator[tuple[str, str]]:
    if run.info is not None:
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


def _environment(run: Run) -> Iterator[tuple[str, str]]:
    if run.info is not None:
        yield "model from", run.info.source
        yield "processes", str(run.info.processes)
        yield from run.info.versions.items()


def _fields(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, str]]:
    """Yields name and value of every field, such as ("model.path", "...")."""
    for name, value in config.items():
        if isinstance(value, dict) and value:
            yield from _fields(value, f"{prefix}{name}.")
        else:
            yield prefix + name, str(value)


def _loss(value: float) -> str:
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def _gib(value: float) -> str:
    return f"{value:.2f} GiB" if value >= 0.1 else f"{value * 2**10:.2f} MiB"
