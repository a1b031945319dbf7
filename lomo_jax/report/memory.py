"""The memory of a run: what the compiler planned beside what was measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from lomo_jax.report import words
from lomo_jax.report.read import Run
from lomo_jax.report.summary import summarise

# Label, field of the plan, colour of the palette.
PARTS = (
    ("weights", "weights_gib", 0),
    ("optimizer state", "state_gib", 4),
    ("layer inputs", "layer_inputs_gib", 2),
    ("other temporaries", "temporaries_gib", 3),
)
MEASURED = 5  # colour


@dataclasses.dataclass(frozen=True)
class Bar:
    """One bar of the chart."""

    run: str  # its name, where there are several
    what: str
    parts: Sequence[tuple[float, int]]  # GiB and colour
    limit_gib: float | None = None  # marked on the bar

    def label(self, letters: int | None = None) -> str:
        """What is said of the bar, with so much of the run's name as there is room for."""
        if not self.run:
            return self.what
        room = len(self.run) if letters is None else max(9, letters - len(self.what) - 2)
        return f"{self.what}, {_elided(self.run, room)}"


def bars(runs: Sequence[Run]) -> list[Bar]:
    """Returns two bars a run, of the plan and of the measurement, as far as it has them."""
    found = []
    for run in runs:
        summary, plan = summarise(run), run.facts.get("plan") or {}
        name = run.name if len(runs) > 1 else ""
        if summary.planned_gib is not None:
            parts = [(plan.get(field) or 0.0, colour) for _, field, colour in PARTS]
            planned = f"planned (compiled) {words.gib(summary.planned_gib)}"
            found.append(Bar(name, planned, parts, summary.usable_gib))
        if summary.measured_gib is not None:
            measured = f"measured peak {words.gib(summary.measured_gib)}"
            parts = [(summary.measured_gib, MEASURED)]
            found.append(Bar(name, measured, parts, summary.usable_gib))
    return found


def _elided(name: str, room: int) -> str:
    """Leaves out the middle of a name that is too long."""
    if len(name) <= room:
        return name
    return f"{name[: room // 2]}\N{HORIZONTAL ELLIPSIS}{name[len(name) - (room - 1) // 2 :]}"


def table(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Returns the same in numbers: rows of a label and one cell a run."""
    plans = [run.facts.get("plan") or {} for run in runs]
    summaries = [summarise(run) for run in runs]
    rows = [
        (f"planned: {label}", [words.gib(plan.get(field)) for plan in plans])
        for label, field, _ in PARTS
    ]
    return [
        *rows,
        ("planned: total", [words.gib(summary.planned_gib) for summary in summaries]),
        ("planned: host memory", [words.gib(plan.get("host_gib")) for plan in plans]),
        ("JAX may allocate", [words.gib(summary.usable_gib) for summary in summaries]),
        ("measured: peak in use", [words.gib(summary.measured_gib) for summary in summaries]),
    ]
