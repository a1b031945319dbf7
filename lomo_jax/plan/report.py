"""A plan, for a person to read."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from importlib import metadata

from rich.console import Console
from rich.table import Table

from lomo_jax.plan.buffers import Buffer
from lomo_jax.plan.memory import PARTS, MemoryPlan


def to_json(plan: MemoryPlan) -> str:
    """Returns a plan as one JSON object, whose keys are its fields."""
    rounded = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in dataclasses.asdict(plan).items()
    }
    return json.dumps(rounded)


def show(console: Console, title: str, plan: MemoryPlan, usable_gib: float) -> None:
    """Prints a plan as a table."""
    compiler = f"XLA of jaxlib {metadata.version('jaxlib')}"
    console.print(f"[bold]{title}[/bold]")
    console.print(f"planned (compiled by {compiler} for {plan.gpu}, not measured)\n")
    each = "" if plan.devices == 1 else f", each of {plan.devices}"
    table = _table(f"device memory{each}", "GiB")
    for label, field in PARTS.items():
        table.add_row(label, f"{getattr(plan, field):.2f}")
    table.add_section()
    table.add_row("total", f"{plan.total_gib:.2f}", style="bold")
    table.add_row("the card has", f"{plan.device_gib:.2f}")
    table.add_row("JAX may allocate", f"{usable_gib:.2f}")
    table.add_section()
    table.add_row("host memory", f"{plan.host_gib:.2f}")
    console.print(table)
    console.print(f"\n[bold]{_verdict(plan)}[/bold]\n")


def show_buffers(console: Console, title: str, buffers: Sequence[Buffer]) -> None:
    """Prints values in memory."""
    table = _table(title, "MiB")
    table.add_column("shape")
    table.add_column("memory")
    for buffer in buffers:
        where = "host" if buffer.on_host else "device"
        table.add_row(buffer.name, f"{buffer.size / 2**20:,.0f}", buffer.shape, where)
    console.print(table)
    console.print()


def show_suggestions(
    console: Console, plan: MemoryPlan, variants: Sequence[tuple[str, MemoryPlan]]
) -> None:
    """Prints what each of several changes would do to the memory of a run."""
    table = _table("changes, each alone", "device GiB")
    table.add_column("host GiB", justify="right")
    table.add_column("")
    for flags, variant in (("as it is", plan), *variants):
        numbers = (f"{gib:.2f}" for gib in (variant.total_gib, variant.host_gib))
        table.add_row(flags, *numbers, _verdict(variant))
    console.print(table)
    console.print()


def show_measured(console: Console, plan: MemoryPlan, peak_gib: float) -> None:
    """Prints the plan beside what was measured."""
    table = _table("device memory", "GiB")
    table.add_row("planned", f"{plan.total_gib:.2f}")
    table.add_row(f"measured, peak in use on {plan.gpu}", f"{peak_gib:.2f}")
    console.print(table)


def plot(path: str, title: str, plan: MemoryPlan) -> None:
    """Draws a plan as one stacked bar.

    Raises:
      ModuleNotFoundError: matplotlib is not installed.
      ValueError, OSError: no picture can be written to `path`.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise ModuleNotFoundError("--plot needs matplotlib: pip install 'lomo_jax[plot]'") from None

    figure = Figure(figsize=(9, 2.6), layout="constrained")
    axes = figure.subplots()
    left = 0.0
    for label, field in PARTS.items():
        gib = getattr(plan, field)
        axes.barh(0, gib, left=left, height=0.5, label=f"{label} {gib:.2f}")
        left += gib
    if plan.device_gib is not None:
        axes.axvline(
            plan.device_gib, color="black", linestyle="--", label=f"{plan.gpu} {plan.device_gib:g}"
        )
    axes.set_yticks([])
    axes.set_xlabel(
        f"GiB of device memory, planned, not measured; {plan.host_gib:.2f} GiB of host memory"
    )
    axes.set_title(title)
    figure.legend(loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, dpi=150)


def _verdict(plan: MemoryPlan) -> str:
    return "fits" if plan.fits else "does not fit"


def _table(first: str, second: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    table.add_column(second, justify="right")
    return table
