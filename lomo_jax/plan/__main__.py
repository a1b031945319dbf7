"""Plans the memory and the time of a run on a GPU that need not be installed.

    lomo-jax plan --config configs/llama7b.py --gpu rtx3090

compiles exactly the step that `lomo-jax train` would run and prints the memory that XLA planned for
it, and a model of its time. Set fields of the config as for training, --config.NAME=VALUE. Neither
dataset nor checkpoint is needed: without model.path the model has the shape of
config.model.architecture.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
import os
import sys
from collections.abc import Sequence
from importlib import metadata
from typing import TYPE_CHECKING

import jax
from absl import flags
from rich.console import Console
from rich.table import Table

from lomo_jax.errors import UserError
from lomo_jax.plan import gpus
from lomo_jax.plan.memory import PARTS, Buffer, MemoryPlan
from lomo_jax.plan.time import SHARES, TimePlan
from lomo_jax.training.config import Config, set_fields
from lomo_jax.training.config_reader import parse

if TYPE_CHECKING:  # slow to import
    from lomo_jax.training.search import Setting


def main(argv: Sequence[str]) -> int:
    """Runs the command line.

    Args:
      argv: program name, then flags.

    Returns:
      The exit status.
    """
    try:
        _plan(argv)
    except (UserError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _plan(argv: Sequence[str]) -> None:
    values = flags.FlagValues()
    names = ", ".join(gpus.GPUS)
    define_bool = functools.partial(flags.DEFINE_bool, default=False, flag_values=values)
    gpu_name = flags.DEFINE_string("gpu", None, f"GPU to plan for: {names}", flag_values=values)
    devices = flags.DEFINE_integer(
        *("devices", None, "number of GPUs; by default the product of the config's mesh"),
        flag_values=values,
    )
    plot = flags.DEFINE_string("plot", None, "image file to draw the plan in", flag_values=values)
    as_json = define_bool("json", help="print only the plan, as one JSON object")
    suggest = define_bool("suggest", help="also plan changes that lower the memory")
    best = define_bool("best", help="also search for the fastest setting that fits")
    batch_sizes = flags.DEFINE_list(
        *("batch_sizes", None, "those that --best tries, such as 4,8,16; by default the config's"),
        flag_values=values,
    )
    measure = define_bool("measure", help="also run the step on the GPU of this machine")
    config = parse(argv, values, for_plan=True)
    if gpu_name.value is None:
        raise UserError(f"--gpu: missing; name one of {names}")
    if as_json.value and (suggest.value or best.value or measure.value):
        raise UserError("--json prints only the plan: leave out --suggest, --best and --measure")
    if best.value and not config.fused:
        raise UserError("--best: its options are those of the fused step; set --config.fused=true")
    if batch_sizes.value is not None and not best.value:
        raise UserError("--batch_sizes: these are for the search; set --best too")
    sizes = batch_sizes.value or [str(config.batch_size)]
    if wrong := [size for size in sizes if not (size.isascii() and size.isdigit() and int(size))]:
        raise UserError(f"--batch_sizes: {wrong[0]!r} is not a positive number")
    gpu = gpus.find(gpu_name.value)

    # JAX cannot read programs for devices that are not there back from its cache.
    jax.config.update("jax_enable_compilation_cache", False)
    # Planning needs no device, and a GPU of this machine may be busy.
    if not measure.value:
        jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(gpus.MEMORY_FRACTION))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lomo_jax.training import planning  # slow to import: report wrong flags first

    compiled = planning.compile_run(config, gpu, devices.value)
    plan, title = compiled.plan, str(values["config"].value)
    if config.remat == "auto":
        title += f", remat={compiled.config.remat}"
    if plot.value is not None:
        _plot(plot.value, title, plan)
    if as_json.value:
        print(_to_json(compiled.config, plan, compiled.time))
        return
    console = Console(highlight=False, soft_wrap=True)
    _show(console, title, plan)
    _show_time(console, config, compiled.time)
    _show_buffers(console, "largest arguments", compiled.argument_buffers()[:8])
    _show_buffers(console, "largest temporaries", compiled.temporary_buffers()[:8])
    if suggest.value:
        savings = planning.memory_savings(config, plan.devices, state_gib=plan.state_gib)
        with console.status("compiling changes that lower the memory"):
            plans = {"no change": plan}
            for changes in savings:
                changed = set_fields(config, changes)
                run = planning.compile_run(changed, gpu, devices.value)
                plans[planning.as_flags(changes)] = run.plan
        _show_suggestions(console, plans)
    if best.value:
        from lomo_jax.training import search  # slow to import

        with console.status("compiling settings"):
            batches = [dataclasses.replace(config, batch_size=int(size)) for size in sizes]
            found = (search.search(one, gpu, devices.value) for one in batches)
            settings = list(itertools.chain.from_iterable(found))
        _show_best(console, config, settings, search.fastest(settings))
    if measure.value:
        _show_measured(console, plan, planning.measure(compiled.config, gpu))


def _to_json(config: Config, plan: MemoryPlan, time: TimePlan) -> str:
    values = {"remat": config.remat, **dataclasses.asdict(plan), **dataclasses.asdict(time)}
    tokens, hours = _whole_run(config, time)
    values |= {"run_tokens": tokens, "run_hours": hours}
    rounded = {
        name: round(value, 4) if isinstance(value, float) else value
        for name, value in values.items()
    }
    return json.dumps(rounded)


def _whole_run(config: Config, time: TimePlan) -> tuple[int | None, float | None]:
    """Returns tokens and hours of the training steps, None if their number is not known."""
    if config.epochs is not None:  # the dataset sets it
        return None, None
    tokens = config.steps * config.batch_size * config.sequence_length
    return tokens, config.steps * time.step_seconds / 3600


def _show(console: Console, title: str, plan: MemoryPlan) -> None:
    compiler = f"XLA of jaxlib {metadata.version('jaxlib')}"
    console.print(f"[bold]{title}[/bold]")
    console.print(f"planned (compiled by {compiler} for {plan.gpu}, not measured)\n")
    each = "" if plan.devices == 1 else f", each of {plan.devices}"
    table = _table(f"device memory{each}", "GiB")
    for label, field in PARTS.items():
        table.add_row(label, f"{getattr(plan, field):.2f}")
    table.add_section()
    table.add_row("total", f"{plan.total_gib:.2f}", style="bold")
    table.add_row("on the GPU", f"{plan.device_gib:.2f}")
    table.add_row("JAX may allocate", f"{plan.usable_gib:.2f}")
    table.add_section()
    table.add_row("host memory", f"{plan.host_gib:.2f}")
    console.print(table)
    console.print(f"\n[bold]{_verdict(plan)}[/bold]\n")


def _show_time(console: Console, config: Config, time: TimePlan) -> None:
    table = _table("time of a step, modelled", "s")
    table.add_column("share", justify="right")
    for label, field in SHARES.items():
        seconds = getattr(time, field)
        table.add_row(label, f"{seconds:.3g}", f"{seconds / time.step_seconds:.0%}")
    table.add_section()
    table.add_row("step", f"{time.step_seconds:.3g}", style="bold")
    if time.hidden_fraction is not None:
        hidden = f"{time.hidden_fraction:.0%} hidden"
        table.add_row("all transfers", f"{time.transfer_seconds:.3g}", hidden)
    console.print(table)
    console.print(f"\n[bold]modelled: {time.tokens_per_second:,.0f} tokens/s[/bold]")
    tokens, hours = _whole_run(config, time)
    if tokens is not None:
        run = f"{config.steps:,} steps of the run, {tokens / 1e6:,.1f} million tokens"
        console.print(f"modelled: {hours:.3g} hours for the {run}; evaluation is not counted")
    console.print("(the model assumes how efficient kernels and links are; nothing was run)\n")


def _show_buffers(console: Console, title: str, buffers: Sequence[Buffer]) -> None:
    table = _table(title, "MiB")
    table.add_column("shape")
    table.add_column("memory")
    for buffer in buffers:
        where = "host" if buffer.on_host else "device"
        table.add_row(buffer.name, f"{buffer.size / 2**20:,.0f}", buffer.shape, where)
    console.print(table)
    console.print()


def _show_suggestions(console: Console, plans: dict[str, MemoryPlan]) -> None:
    table = _table("changes, each alone", "device GiB")
    table.add_column("host GiB", justify="right")
    table.add_column("")
    for change, plan in plans.items():
        table.add_row(change, f"{plan.total_gib:.2f}", f"{plan.host_gib:.2f}", _verdict(plan))
    console.print(table)
    console.print()


def _show_best(
    console: Console, config: Config, settings: Sequence[Setting], best: Setting | None
) -> None:
    table = _table(f"{len(settings)} settings compiled", "device GiB")
    for title in ("host GiB", "modelled tokens/s"):
        table.add_column(title, justify="right")
    for setting in settings:
        memory = setting.memory
        # XLA recomputes more in a program that does not fit: its time says nothing.
        speed = f"{setting.time.tokens_per_second:,.0f}" if memory.fits else _verdict(memory)
        changes = setting.flags(config).replace("--config.", "") or "no change"
        table.add_row(changes, f"{memory.total_gib:.2f}", f"{memory.host_gib:.2f}", speed)
    console.print(table)
    if best is None:
        console.print("\n[bold]none of them fits[/bold]\n")
    else:
        flags = best.flags(config) or "no change"
        console.print(f"\n[bold]fastest that fits, modelled:[/bold]\n{flags}\n")


def _show_measured(console: Console, plan: MemoryPlan, peak_gib: float) -> None:
    table = _table("device memory", "GiB")
    table.add_row("planned", f"{plan.total_gib:.2f}")
    table.add_row(f"measured, peak in use on {plan.gpu}", f"{peak_gib:.2f}")
    console.print(table)


def _plot(path: str, title: str, plan: MemoryPlan) -> None:
    """Draws a plan as one stacked bar."""
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError:
        raise UserError("--plot needs matplotlib: pip install 'lomo_jax[plot]'") from None

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
    try:
        figure.savefig(path, dpi=150)
    except (OSError, ValueError) as error:  # no such folder, or no such format
        raise UserError(f"--plot {path}: {error}") from error


def _verdict(plan: MemoryPlan) -> str:
    return "fits" if plan.fits else "does not fit"


def _table(first: str, second: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="dim")
    table.add_column(first)
    table.add_column(second, justify="right")
    return table


if __name__ == "__main__":
    sys.exit(main(sys.argv))
