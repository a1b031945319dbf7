"""What a person sees of a run: a live bar on a terminal, plain lines elsewhere."""

from typing import Self

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text


class Display:
    """A run's progress on standard output; use as a context."""

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        """Args: steps: Length of the run; quiet: Whether to show nothing, as a second process."""
        # A file or a pipe has no width: lines are never folded there.
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._bar = Progress(
            TextColumn("[bold]step"),
            MofNCompleteColumn(),
            BarColumn(bar_width=20),
            TextColumn("{task.description}"),
            TimeRemainingColumn(compact=True),
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

    def line(self, label: str, text: str) -> None:
        """Prints a line that stays, above the bar."""
        hanging = text.rstrip().replace("\n", "\n" + " " * 10)
        self._console.print(Text.assemble((f"{label:<9} ", "bold"), hanging))

    def status(self, text: str) -> None:
        """Says beside the bar what is being done now."""
        self._bar.update(self._task, description=text)

    def step(self, step: int, metrics: dict[str, float], *, logged: bool) -> None:
        """Moves the bar to `step`; off a terminal, prints the steps that are logged."""
        if self._console.is_terminal:
            self._bar.update(self._task, completed=step, description=describe(metrics))
        elif logged:
            self.line(f"step {step}", describe(metrics))


def describe(metrics: dict[str, float]) -> str:
    """Formats the metrics of a step for a person."""
    formats = {
        "loss": "loss {:.4f}",
        "learning_rate": "lr {:.2e}",
        "tokens_per_second": "{:,.0f} tok/s",
        "flop_utilisation": "MFU {:.1%}",
        "device_memory_gib": "{:.1f} GiB",
    }
    return "  ".join(form.format(metrics[key]) for key, form in formats.items() if key in metrics)
