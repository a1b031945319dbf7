"""The page: what stands on it, in which order."""

from __future__ import annotations

import importlib.resources
import string
from collections.abc import Sequence
from datetime import UTC, datetime
from typing import Any

from lomo_jax.report import configs, figures, headline, samples, words
from lomo_jax.report.markup import text
from lomo_jax.report.read import Run


def make(runs: Sequence[Run]) -> str:
    """Makes the page.

    Args:
      runs: One run, or several to compare.

    Returns:
      One HTML document that refers to nothing outside itself; the same for the same runs.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
    """
    compared = len(runs) > 1
    heading = f"{len(runs)} runs compared" if compared else runs[0].name
    template = importlib.resources.files("lomo_jax.report").joinpath("page.html")
    sections = (
        headline.compared(runs) if compared else headline.single(runs[0]),
        figures.curves(runs),
        figures.memory(runs),
        samples.section(runs),
        configs.section(runs),
        configs.environment(runs),
    )
    return string.Template(template.read_text(encoding="utf-8")).substitute(
        title=text(", ".join(run.name for run in runs) + " \N{EN DASH} lomo_jax"),
        kind=text("lomo_jax, runs of train.py" if compared else _kind(runs[0])),
        heading=text(heading),
        lead=text(_compared_lead(runs) if compared else _lead(runs[0])),
        sections="\n".join(section for section in sections if section),
        footer=text(_footer(runs)),
    )


def _kind(run: Run) -> str:
    workdir = run.config.get("workdir")
    return "lomo_jax, a run of train.py" + (f" in {workdir}" if workdir else "")


def _lead(run: Run) -> str:
    config = run.config
    parts = [
        _filled(config, "{optimizer}"),
        _filled(config, "learning rate {learning_rate:g} ({schedule})"),
        _filled(config, "batches of {batch_size} \N{MULTIPLICATION SIGN} {sequence_length} tokens"),
        _filled(config, "{param_dtype} weights"),
    ]
    said = ", ".join(part for part in parts if part)
    sentences = [f"{said}." if said else "The run left no config.json."]
    if run.started is not None:
        sentences.append(
            f"Started {datetime.fromtimestamp(run.started, UTC):%-d %B %Y, %H:%M} UTC."
        )
    return " ".join(sentences)


def _filled(config: dict[str, Any], form: str) -> str:
    try:
        return form.format(**config)
    except (KeyError, ValueError, TypeError):  # of a run that has other fields
        return ""


def _compared_lead(runs: Sequence[Run]) -> str:
    names = [name for name, _ in configs.differing(runs) if name != "workdir"]
    if not names:
        return "Their configs are the same."
    more = f" and {len(names) - 6} more fields" if len(names) > 6 else ""
    return f"They differ in {', '.join(names[:6])}{more}."


def _footer(runs: Sequence[Run]) -> str:
    said = [
        "Planned memory is what XLA's compiler reserves for the step; measured memory is the most "
        "that the device reported in use.",
        "Time is that between the first and the last record of each process, without loading and "
        "compiling, and without what lay between a stop and a resume.",
    ]
    said += [
        f"{run.name}: {words.whole(run.unreadable)} lines of metrics.jsonl could not be read."
        for run in runs
        if run.unreadable
    ]
    return " ".join(said)
