"""The numbers at the head of the page."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lomo_jax.report import words
from lomo_jax.report.markup import fact, note, scrolling, section, swatch, table, text
from lomo_jax.report.read import Run
from lomo_jax.report.summary import Point, Summary, summarise

_ARROW = '<span class="arrow">→</span>'


def single(run: Run) -> str:
    """The headline of one run."""
    summary = summarise(run)
    facts = [
        _training(summary),
        _steps(summary),
        fact("Throughput", _speed(summary), "median of the logged steps"),
        fact(
            "Time", text(words.duration(summary.seconds)), "stops left out" * (summary.resumed > 0)
        ),
        _model(run, summary),
        fact("Device", text(summary.device or "not recorded")),
        *_memory(summary),
        _resumed(run, summary),
    ]
    if summary.skipped is not None:
        facts.append(
            fact(
                "Updates skipped",
                words.whole(summary.skipped),
                "for a gradient that was not finite",
            )
        )
    return section(
        "Result",
        f'<dl class="hero">{_held_out(summary)}</dl>',
        f'<dl class="facts">{"".join(facts)}</dl>',
    )


def compared(runs: Sequence[Run]) -> str:
    """The headline of several runs: a row for each."""
    summaries = [summarise(run) for run in runs]
    best = [summary.held_out[1].value for summary in summaries if summary.held_out]
    lowest = min((value for value in best if math.isfinite(value)), default=None)
    head = (
        *("run", "held-out loss, first", "held-out, best", "held-out, last"),
        *("training loss, last", "tokens/s, median", "steps", "time"),
        *("memory, planned", "memory, measured"),
        *("resumed", "updates skipped", "parameters", "device"),
    )
    rows = [
        (swatch(number, run.name), _cells(summary, lowest))
        for number, (run, summary) in enumerate(zip(runs, summaries, strict=True))
    ]
    return section(
        "Results",
        scrolling(table(head, rows, "numbers"), "Results"),
        note("Planned memory is compiled by XLA; measured is the peak that the device reported."),
    )


def _cells(summary: Summary, lowest: float | None) -> list[str]:
    first = best = last = words.NONE
    if summary.held_out:
        first, best, last = (_at(point) for point in summary.held_out)
        if summary.held_out[1].value == lowest:
            best = f"<strong>{best}</strong>"
    return [
        *(first, best, last),
        _at(summary.training[1]) if summary.training else words.NONE,
        words.rate(summary.tokens_per_second),
        _of(summary),
        words.duration(summary.seconds),
        words.gib(summary.planned_gib),
        words.gib(summary.measured_gib),
        words.whole(summary.resumed),
        words.whole(summary.skipped),
        words.NONE if summary.parameters is None else words.compact(summary.parameters),
        text(summary.device or words.NONE),
    ]


def _at(point: Point) -> str:
    return f"{words.loss(point.value)}<small>step {point.step:,}</small>"


def _held_out(summary: Summary) -> str:
    if summary.held_out is None:
        return fact("Held-out loss", words.NONE, "no evaluation yet")
    first, best, last = summary.held_out
    if first == last:
        return fact("Held-out loss", words.loss(first.value), f"at step {first.step:,}")
    where = f"step {first.step:,} to step {last.step:,}"
    detail = (
        f"{where}, the best at the end"
        if best == last
        else f"{where}; the best was {words.loss(best.value)} at step {best.step:,}"
    )
    value = f"{words.loss(first.value)}{_ARROW}{words.loss(last.value)}"
    return fact("Held-out loss", value, detail)


def _training(summary: Summary) -> str:
    if summary.training is None:
        return fact("Training loss", words.NONE, "no step logged yet")
    first, last = summary.training
    if first == last:
        return fact("Training loss", words.loss(last.value), f"step {last.step:,}")
    value = f"{words.loss(first.value)}{_ARROW}{words.loss(last.value)}"
    return fact("Training loss", value, f"step {first.step:,} to step {last.step:,}")


def _of(summary: Summary) -> str:
    total = "" if summary.steps is None else f" of {summary.steps:,}"
    return f"{summary.done:,}{total}"


def _steps(summary: Summary) -> str:
    ended = summary.steps is None or summary.done >= summary.steps
    return fact("Steps", _of(summary), "" if ended else "still running, or stopped")


def _speed(summary: Summary) -> str:
    speed = summary.tokens_per_second
    return words.NONE if speed is None else f"{words.rate(speed)} tokens/s"


def _model(run: Run, summary: Summary) -> str:
    source = str(run.facts.get("source") or "")
    if summary.parameters is None:
        return fact("Parameters", "not recorded", source)
    return fact("Parameters", words.compact(summary.parameters), source)


def _memory(summary: Summary) -> list[str]:
    usable = summary.usable_gib
    of = "" if usable is None else f" for a device that may use {words.gib(usable)}"
    planned = fact("Memory, planned", words.gib(summary.planned_gib), f"compiled{of}")
    if summary.planned_gib is None:
        planned = fact("Memory, planned", words.NONE, "no plan was recorded")
    if summary.measured_gib is not None:
        return [planned, fact("Memory, measured", words.gib(summary.measured_gib), "peak in use")]
    cpu = "cpu" in (summary.device or "").lower()
    why = "not measured: a CPU does not report it" if cpu else "not measured"
    return [planned, fact("Memory, measured", words.NONE, why)]


def _resumed(run: Run, summary: Summary) -> str:
    if summary.resumed == 0:
        return fact("Resumed", "never")
    steps = ", ".join(f"{step:,}" for step in dict.fromkeys(run.resumes[-3:]))
    if summary.resumed == 1:
        return fact("Resumed", "once", f"from the checkpoint of step {steps}")
    detail = f"from the checkpoints of steps {steps}"
    return fact("Resumed", f"{summary.resumed:,} times", detail)
