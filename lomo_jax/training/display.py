"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere and in a log."""

import contextlib
import datetime
import os
import sys
from pathlib import Path
from typing import Self, TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from rich.table import Column
from rich.text import Text

# A model may write what moves a terminal's cursor.
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
del _CONTROL[ord("\n")], _CONTROL[ord("\t")]


class Display:
    """A run's progress on standard output; use as a context.

    The run is worth more than what is said of it: where nothing can be written, it goes on.
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        """Args: steps: Length of the run; quiet: Whether to show nothing, as a second process."""
        # A file or a pipe has no width: lines are never folded there.
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._quiet = quiet
        self._log: TextIO | None = None
        self._before_log: list[str] = []
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
            # The one that gives way where the terminal is narrow: to a second line.
            TextColumn("{task.description}", table_column=Column()),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, ValueError | OSError):
            self._to_log("error", str(error))  # which `train.py` prints
        with _unheard():
            self._bar.stop()
        try:
            sys.stdout.flush()
        except OSError:
            # Or the interpreter would try again on its way out, and end with another status.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self._log is not None:
            with _unheard():
                self._log.close()

    def log_to(self, path: Path) -> None:
        """From now on appends every line to a file, too, and those that were shown before."""
        if not self._quiet:
            self._log = path.open("a", buffering=1, encoding="utf-8")
            with _unheard():
                self._log.writelines(self._before_log)

    def line(self, label: str, text: str) -> None:
        """Prints a line that stays, above the bar."""
        text = text.rstrip().translate(_CONTROL)
        hanging = text.replace("\n", "\n" + " " * 10)
        with _unheard():
            self._console.print(Text.assemble((f"{label:<9} ", "bold"), hanging))
        self._to_log(label, text)

    def status(self, text: str) -> None:
        """Says beside the bar what is being done now."""
        with _unheard():
            self._bar.update(self._task, description=text)

    def step(self, step: int, metrics: dict[str, float], *, logged: bool) -> None:
        """Moves the bar to `step`; off a terminal, and in the log, tells the steps to be logged."""
        text = describe(metrics)
        if self._console.is_terminal:
            with _unheard():
                self._bar.update(self._task, completed=step, description=text)
            if logged:
                self._to_log(f"step {step}", text)
        elif logged:
            self.line(f"step {step}", text)

    def _to_log(self, label: str, text: str) -> None:
        now = datetime.datetime.now().isoformat(" ", "seconds")
        hanging = text.replace("\n", "\n" + " " * 30)
        line = f"{now} {label:<9} {hanging}\n"
        if self._log is None and not self._quiet:
            self._before_log.append(line)
        elif self._log is not None:
            with _unheard():
                self._log.write(line)


def _unheard() -> contextlib.AbstractContextManager[None]:
    """Lets a full disk or a lost terminal be; of a closed pipe rich makes a SystemExit."""
    return contextlib.suppress(OSError, SystemExit)


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
