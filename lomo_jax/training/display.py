"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere and in a log."""

import contextlib
import datetime
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.text import Text


class Display:
    """A run's progress on standard output; use as a context."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        """Args: steps: Length of the run; quiet: Whether to show nothing, as a second process."""
        # A file or a pipe has no width: lines are never folded there.
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._quiet = quiet
        self._log: TextIO | None = None
        self._before_log: list[str] = []
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()
        if self._log is not None:
            with contextlib.suppress(OSError):  # as below
                self._log.close()

    def log_to(self, path: Path) -> None:
        """From now on appends every line to a file, too, and those that were shown before."""
        if not self._quiet:
            self._log = path.open("a", buffering=1)
            with contextlib.suppress(OSError):  # a full disk; the lines were shown, at least
                self._log.writelines(self._before_log)

    def line(self, label: str, text: str) -> None:
        """Prints a line that stays, above the bar."""
        hanging = text.rstrip().replace("\n", "\n" + " " * 10)
        self._console.print(Text.assemble((f"{label:<9} ", "bold"), hanging))
        self._to_log(label, text)

    def status(self, text: str) -> None:
        """Says beside the bar what is being done now."""
        self._bar.update(self._task, description=text)

    def step(self, step: int, metrics: dict[str, float], *, logged: bool) -> None:
        """Moves the bar to `step`; off a terminal, and in the log, tells the steps to be logged."""
        text = describe(metrics)
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=text)
            if logged:
                self._to_log(f"step {step}", text)
        elif logged:
            self.line(f"step {step}", text)

    def _to_log(self, label: str, text: str) -> None:
        now = datetime.datetime.now().isoformat(" ", "seconds")
        hanging = text.rstrip().replace("\n", "\n" + " " * 30)
        line = f"{now} {label:<9} {hanging}\n"
        if self._log is None:
            self._before_log.append(line)
        else:
            with contextlib.suppress(OSError):  # as above
                self._log.write(line)


def describe(metrics: dict[str, float]) -> str:
    """Formats the metrics of a step for a person."""
    formats = {
        "loss": "loss {:.4f}",
        "eval_loss": "held out {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tok/s",
        "flop_utilisation": "MFU {:.1%}",
        "device_memory_gib": "{:.1f} GiB",
    }
    parts = [form.format(metrics[key]) for key, form in formats.items() if key in metrics]
    if metrics.get("skipped"):
        parts.append(f"{metrics['skipped']:.0f} skipped")
    if "seconds_left" in metrics:
        left = datetime.timedelta(seconds=round(metrics["seconds_left"]))
        parts.append(f"{left} left")
    return "  ".join(parts)
