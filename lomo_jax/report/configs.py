"""The configs of the runs, and what they ran on."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from typing import Any

from lomo_jax.report import markup, words
from lomo_jax.report.read import Run


def differing(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    """Returns the fields that are not the same for all runs: name, value of each run."""
    return [(name, values) for name, values in _fields(runs) if values.count(values[0]) < len(runs)]


def section(runs: Sequence[Run]) -> str:
    """The configs: of one run by groups, of several what differs before the rest."""
    if not any(run.config for run in runs):
        return ""
    if len(runs) == 1:
        return markup.section("Configuration", f'<div class="groups">{_groups(runs[0])}</div>')
    different = differing(runs)
    every = _table(runs, _fields(runs))
    return markup.section(
        "Configuration",
        _table(runs, different) if different else markup.note("All fields are the same."),
        markup.folded("All fields", every),
    )


def environment(runs: Sequence[Run]) -> str:
    """Versions and devices, and how to run it again."""
    rows = [
        ("device", _column(runs, "device")),
        ("devices", _column(runs, "devices")),
        ("processes", _column(runs, "processes")),
        ("model from", _column(runs, "source")),
        *(
            (name, [str((run.facts.get("versions") or {}).get(name, words.NONE)) for run in runs])
            for name in _versions(runs)
        ),
    ]
    known = [
        (markup.text(name), [markup.text(cell) for cell in cells])
        for name, cells in rows
        if set(cells) != {words.NONE}
    ]
    head = ("", *(markup.text(run.name) for run in runs)) if len(runs) > 1 else ()
    return markup.section(
        "Environment",
        _scrolling(head, known) if known else "",
        *(
            _repeat(run, f"Run {run.name} again" if len(runs) > 1 else "Run it again")
            for run in runs
            if run.config
        ),
    )


def _repeat(run: Run, title: str) -> str:
    workdir = (run.config.get("workdir") or "runs/default").rstrip("/")
    config = shlex.quote(f"{workdir}/config.json")
    command = f"lomo-jax train --config {config} --config.workdir={shlex.quote(f'{workdir}-again')}"
    return markup.folded(title, f'<pre tabindex="0"><code>{markup.text(command)}</code></pre>')


def _fields(runs: Sequence[Run]) -> list[tuple[str, list[Any]]]:
    leaves = [dict(words.leaves(run.config)) for run in runs]
    names = dict.fromkeys(name for own in leaves for name in own)
    return [(name, [own.get(name) for own in leaves]) for name in names]


def _groups(run: Run) -> str:
    groups: dict[str, list[tuple[str, list[str]]]] = {"": []}  # first the fields in no group
    for name, value in words.leaves(run.config):
        group, _, field = name.rpartition(".")
        groups.setdefault(group, []).append(_row(field, [value]))
    return "\n".join(
        markup.table((), rows, "fields", group or "the run") for group, rows in groups.items()
    )


def _table(runs: Sequence[Run], fields: Sequence[tuple[str, list[Any]]]) -> str:
    head = ("", *(markup.text(run.name) for run in runs))
    return _scrolling(head, [_row(*field) for field in fields])


def _scrolling(head: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]) -> str:
    return markup.scrolling(markup.table(head, rows, "fields compared"), "Values of each run")


def _row(name: str, values: Sequence[Any]) -> tuple[str, list[str]]:
    return markup.text(name), [markup.text(words.field(value)) for value in values]


def _column(runs: Sequence[Run], fact: str) -> list[str]:
    return [words.field(run.facts.get(fact)) for run in runs]


def _versions(runs: Sequence[Run]) -> list[str]:
    names = (name for run in runs for name in run.facts.get("versions") or {})
    return list(dict.fromkeys(names))
