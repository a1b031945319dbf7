"""What the model wrote, after so many steps."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from lomo_jax.report import markup
from lomo_jax.report.read import Record, Run

_SAMPLES = 40  # of a run: a page is to be read
_CHARACTERS = 3000  # of a text


def section(runs: Sequence[Run]) -> str:
    """The samples of all runs, of each the latest first; empty if there are none."""
    parts = []
    for run in (run for run in runs if run.samples):
        if len(runs) > 1:
            parts.append(f"<h3>{markup.text(run.name)}</h3>")
        parts.append(f'<div class="samples">{_samples(run)}</div>')
    if not parts:
        return ""
    note = markup.note("The prompt is dim, what the model wrote is not.")
    has_prompts = any(_prompt(run, record) for run in runs for record in run.samples)
    return markup.section("Samples of text", note if has_prompts else "", *parts)


def _samples(run: Run) -> str:
    shown = _thinned(run.samples)
    latest, *earlier = (_sample(_prompt(run, record), record) for record in reversed(shown))
    if not earlier:
        return latest
    left_out = len(run.samples) - len(shown)
    more = f", of {len(run.samples) - 1:,}" if left_out else ""
    return latest + markup.folded(f"Earlier samples ({len(earlier)}{more})", "".join(earlier))


def _thinned(samples: Sequence[Record]) -> list[Record]:
    count = min(_SAMPLES, len(samples))
    return [samples[index] for index in np.linspace(0, len(samples) - 1, count).astype(int)]


def _sample(prompt: str, record: Record) -> str:
    continuation = markup.text(_cut(str(record["sample"])))
    asked = f'<span class="prompt">{markup.text(prompt)}</span>' if prompt else ""
    step = record["step"]
    when = "Before training" if step == 0 else f"After {step:,} step{'s' * (step != 1)}"
    return (
        f'<article class="sample"><p class="when">{when}</p>'
        f'<p class="text">{asked}{continuation}</p></article>'
    )


def _prompt(run: Run, record: Record) -> str:
    # A run that is resumed may have another one.
    return _cut(str(record.get("prompt", run.config.get("prompt")) or ""))


def _cut(value: str) -> str:
    if len(value) <= _CHARACTERS:
        return value
    return f"{value[:_CHARACTERS]}… [{len(value) - _CHARACTERS:,} characters more]"
