"""Logging: the terminal, log.txt, metrics.jsonl, TensorBoard, Weights & Biases."""

import contextlib
import datetime
import math
import os
import sys
import time
import traceback
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, Protocol, Self, TextIO

import jax
import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn
from rich.progress import Progress as Bar
from rich.table import Column
from rich.text import Text

import lomo_jax
from lomo_jax import run_files
from lomo_jax.errors import ConfigError, NonFiniteError, UnexpectedError, UserError
from lomo_jax.flops import flops_per_token
from lomo_jax.models import DecoderConfig
from lomo_jax.plan import peak_flops
from lomo_jax.run_files import MetricsWriter, Record
from lomo_jax.training.checkpoint import Progress

# A model may write characters that move a terminal's cursor.
_CONTROL = dict.fromkeys((*range(32), *range(127, 160)), "\N{REPLACEMENT CHARACTER}")
del _CONTROL[ord("\n")], _CONTROL[ord("\t")]


def printable(text: str) -> str:
    """Returns a text without characters that would move a terminal's cursor."""
    return text.translate(_CONTROL)


class Display:
    """The progress of a run on stdout and in log.txt; use as a context.

    On a terminal there is a progress bar below the lines. A run never fails because its output
    cannot be written: stdout may be closed, the terminal lost, the disk full.
    """

    def __init__(self, steps: int, *, quiet: bool = False) -> None:
        """Args: steps: Length of the run; quiet: Whether to show and log nothing."""
        # A file or a pipe has no width: lines are never folded there.
        self._console = Console(highlight=False, soft_wrap=True, quiet=quiet)
        self._quiet = quiet
        self._log: TextIO | None = None
        self._before_log: list[str] = []
        self._bar = Bar(
            TextColumn("[bold]step"),
            MofNCompleteColumn(table_column=Column(no_wrap=True)),
            BarColumn(bar_width=20, table_column=Column(no_wrap=True)),
            # A narrow terminal wraps this column onto a second line.
            TextColumn("{task.description}", table_column=Column()),
            console=self._console,
            disable=not self._console.is_terminal,
            transient=True,
        )
        self._task = self._bar.add_task("", total=steps)

    def __enter__(self) -> Self:
        with _ignore_output_errors():
            self._bar.start()
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        """Logs the error that ends the run.

        Raises:
          UnexpectedError: The error is not a `UserError`, and its traceback is in log.txt.
        """
        is_unexpected = isinstance(error, Exception) and not isinstance(error, UserError)
        is_logged = False
        if is_unexpected:
            is_logged = self._to_log("error", "".join(traceback.format_exception(error)))
        elif isinstance(error, UserError):
            self._to_log("error", str(error))  # the command prints this error
        if not self._bar.disable:  # rich 13 would print an empty line
            with _ignore_output_errors():
                self._bar.stop()
        try:
            sys.stdout.flush()
        except OSError:
            # Otherwise the interpreter flushes again on exit, fails and changes the exit status.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if self._log is not None:
            with _ignore_output_errors():
                self._log.close()
            if is_unexpected and is_logged:
                what = " ".join(str(error).split())
                what = what if len(what) <= 300 else f"{what[:300]}..."
                raise UnexpectedError(
                    f"{type(error).__name__}: {what}; the traceback is in {self._log.name}"
                ) from error

    def set_steps(self, steps: int) -> None:
        """Sets the length of the run, once it is known."""
        with _ignore_output_errors():
            self._bar.update(self._task, total=steps)

    def log_to(self, path: Path) -> None:
        """Appends every line to a file as well, including the earlier ones."""
        if not self._quiet:
            self._log = path.open("a", buffering=1, encoding="utf-8", errors="backslashreplace")
            with _ignore_output_errors():
                self._log.writelines(self._before_log)

    def line(self, label: str, text: str) -> None:
        """Prints a line that stays, above the bar."""
        text = printable(text.rstrip())
        hanging = text.replace("\n", "\n" + " " * 10)
        with _ignore_output_errors():
            self._console.print(Text.assemble((f"{label:<9} ", "bold"), hanging))
        self._to_log(label, text)

    def warn(self, text: str) -> None:
        """Prints a warning."""
        self.line("warning", text)

    def status(self, text: str) -> None:
        """Shows the current activity next to the bar."""
        with _ignore_output_errors():
            self._bar.update(self._task, description=text)

    def step(self, step: int, metrics: dict[str, float], *, logged: bool) -> None:
        """Moves the bar to `step`; a logged step is a line in log.txt, and without a bar here."""
        text = format_metrics(metrics)
        if self._console.is_terminal:
            with _ignore_output_errors():
                self._bar.update(self._task, completed=step, description=text)
            if logged:
                self._to_log(f"step {step}", text)
        elif logged:
            self.line(f"step {step}", text)

    def _to_log(self, label: str, text: str) -> bool:
        """Appends a line to log.txt; returns whether that succeeded."""
        now = datetime.datetime.now().isoformat(" ", "seconds")
        hanging = text.rstrip().replace("\n", "\n" + " " * 30)
        line = f"{now} {label:<9} {hanging}\n"
        if self._log is None and not self._quiet:
            self._before_log.append(line)
        elif self._log is not None:
            with _ignore_output_errors():
                self._log.write(line)
                return True
        return False


def _ignore_output_errors() -> contextlib.AbstractContextManager[None]:
    # Rich turns a closed pipe into a SystemExit.
    return contextlib.suppress(OSError, SystemExit)


def format_metrics(metrics: dict[str, float]) -> str:
    """Formats the metrics of a step for the terminal and the log."""
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


class Stopwatch:
    """Measures tokens per second since the last reading, and the model FLOP utilisation (MFU)."""

    def __init__(
        self, config: DecoderConfig, batch_size: int, length: int, devices: int = 1
    ) -> None:
        """Starts.

        Args:
          config: The shape of the model.
          batch_size: Sequences in a step.
          length: Tokens in a sequence.
          devices: Number of devices.
        """
        self.tokens = batch_size * length  # in a step
        self._flops = self.tokens * flops_per_token(config, length)
        peak = peak_flops(jax.devices()[0].device_kind)
        self._peak = None if peak is None else peak * devices
        self.restart()

    def restart(self) -> None:
        """Restarts the clock: the time until now was not spent on steps."""
        self._start, self._steps = time.perf_counter(), 0

    def step(self) -> None:
        """Counts a finished step."""
        self._steps += 1

    def read(self) -> dict[str, float]:
        """Returns `tokens_per_second` and, if the peak is known, `flop_utilisation`; restarts."""
        steps_per_second = self._steps / (time.perf_counter() - self._start)
        self.restart()
        speed = {"tokens_per_second": steps_per_second * self.tokens}
        if self._peak is not None:
            speed["flop_utilisation"] = steps_per_second * self._flops / self._peak
        return speed


def device_memory() -> dict[str, float]:
    """Returns `device_memory_gib`, the peak so far, if the backend reports it."""
    stats = jax.local_devices()[0].memory_stats() or {}
    if "peak_bytes_in_use" not in stats:
        return {}
    return {"device_memory_gib": stats["peak_bytes_in_use"] / 2**30}


class Sink(Protocol):
    """A destination of records."""

    def write(self, record: Record) -> None:
        """Writes a record."""
        ...

    def close(self) -> None:
        """Closes the destination."""
        ...


class Evaluation(NamedTuple):
    """Means over the held-out tokens, and what the tasks measure."""

    loss: float  # nats per token
    accuracy: float  # fraction of the targets that have the largest logit
    tasks: Mapping[str, float] = MappingProxyType({})  # by name, such as "boolq_acc"
    lower_is_better: frozenset[str] = frozenset()  # names in `tasks`

    @property
    def perplexity(self) -> float:
        """The exponential of the mean loss."""
        return math.exp(min(self.loss, 700))  # the largest that a float holds

    def metrics(self) -> dict[str, float]:
        """Returns all numbers by name."""
        own = {"loss": self.loss, "accuracy": self.accuracy, "perplexity": self.perplexity}
        return own | dict(self.tasks)


class Recorder:
    """Records the metrics of steps and evaluations, and stops a run that diverges; a context."""

    def __init__(
        self,
        progress: Progress,
        display: Display,
        sinks: Sequence[Sink],
        stopwatch: Stopwatch,
        learning_rates: np.ndarray,
        *,
        log_every: int,
        skip_nonfinite: int = 0,
        dynamic_loss_scale: bool = False,
        is_resumed: bool = False,
        best_metric: str = "loss",
    ) -> None:
        """Starts to record.

        Args:
          progress: The run's progress; the recorder updates its evaluations and skipped updates.
          display: Shows the metrics.
          sinks: Destinations of the records.
          stopwatch: Measures the throughput.
          learning_rates: The learning rate of each step, float32 [steps].
          log_every: Steps between two records.
          skip_nonfinite: Number of updates in a row that may be skipped.
          dynamic_loss_scale: Whether the loss scale may fall after an overflow.
          is_resumed: Whether the sinks already have records of this run.
          best_metric: The metric of an evaluation that says which checkpoint is the best.
        """
        self._best_metric = best_metric
        self._progress, self._display, self._sinks = progress, display, sinks
        self._stopwatch, self._learning_rates = stopwatch, learning_rates
        self._log_every, self._skip_nonfinite = log_every, skip_nonfinite
        self._dynamic_loss_scale = dynamic_loss_scale
        self._pending: tuple[int, Any] | None = None
        self._metrics: dict[str, float] = {}  # of the last steps
        if progress.skipped:
            self._metrics["skipped"] = progress.skipped
        self._shown: dict[str, float] = {}  # shown together with them
        if is_resumed:
            self._write({"step": progress.step, "resumed": True})

    def __enter__(self) -> Self:
        self._stopwatch.restart()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is KeyboardInterrupt:
            return  # the user does not want to wait for the network
        for sink in self._sinks:
            with contextlib.suppress(OSError):  # a full disk
                sink.close()

    def step(self, step: int, out: lomo_jax.StepOutput, scale: jax.Array | None) -> None:
        """Accepts the output of a step that may still be running, and records the step before.

        Thus the devices have work while the host waits for the metrics.

        Args:
          step: The number of the step, from 1.
          out: The output of the step.
          scale: The loss scale of the step, if any.

        Raises:
          NonFiniteError: Loss or gradient of the step before is not finite.
        """
        before, self._pending = self._pending, (step, (out, scale))
        self._record(before)

    def flush(self) -> None:
        """Waits for the last step and records it; raises the same errors as `step`."""
        before, self._pending = self._pending, None
        self._record(before)

    @contextlib.contextmanager
    def pause(self) -> Iterator[None]:
        """Flushes, and excludes the time in the block from the throughput."""
        self.flush()
        yield
        self._stopwatch.restart()

    def _record(self, pending: tuple[int, Any] | None) -> None:
        if pending is None:
            return
        step, outputs = pending
        out, scale = jax.device_get(outputs)
        self._stopwatch.step()
        loss, steps = float(out.loss), len(self._learning_rates)
        # A skipped update does not advance the schedule.
        learning_rate = float(self._learning_rates[step - 1 - self._progress.skipped])
        self._metrics |= {"loss": loss, "learning_rate": learning_rate}
        if out.grad_norm is not None:
            self._metrics["grad_norm"] = float(out.grad_norm)
        if scale is not None and self._dynamic_loss_scale:
            self._metrics["loss_scale"] = float(scale)
        failure = self._count_skipped(step, loss, finite=bool(out.finite), scale=scale)
        logged = step in (1, steps) or step % self._log_every == 0
        if logged or failure:
            self._metrics |= self._stopwatch.read() | device_memory()
            seconds = self._stopwatch.tokens / self._metrics["tokens_per_second"]
            # One accuracy and one weight per microbatch.
            metrics = out.aux
            accuracy = np.average(np.ravel(metrics.accuracy), weights=np.ravel(metrics.weight))
            self._write({"step": step, **self._metrics, "accuracy": float(accuracy)})
            self._shown["seconds_left"] = (steps - step) * seconds
        self._display.step(step, self._metrics | self._shown, logged=logged)
        if failure:
            raise NonFiniteError(failure)

    def evaluation(self, step: int, result: Evaluation) -> bool:
        """Records an evaluation after `step` steps.

        Returns:
          Whether it is the best so far, ignoring the evaluation before the first step.

        Raises:
          NonFiniteError: The held-out loss is NaN or infinite.
          ConfigError: `best_metric` is not among the metrics.
        """
        if not math.isfinite(result.loss):
            raise NonFiniteError(self._advice("held-out loss", result.loss, step))
        metrics = result.metrics()
        if self._best_metric not in metrics:
            raise ConfigError(
                f"keep_best: {self._best_metric!r} is no metric of an evaluation; they are "
                f"{', '.join(metrics)}"
            )
        self._write({"step": step} | {f"eval_{name}": value for name, value in metrics.items()})
        self._display.line(
            "held out",
            f"loss {result.loss:.4f}  perplexity {result.perplexity:.4g}  "
            f"accuracy {result.accuracy:.1%}  after {step} steps",
        )
        if result.tasks:
            values = (f"{name} {value:.4g}" for name, value in result.tasks.items())
            self._display.line("tasks", "  ".join(values))
        self._shown["eval_loss"] = result.loss
        self._progress.evaluated = step
        value, best = metrics[self._best_metric], self._progress.best
        is_lower_better = self._best_metric in {"loss", "perplexity", *result.lower_is_better}
        is_better = best is None or (value < best if is_lower_better else value > best)
        if step == 0 or not math.isfinite(value) or not is_better:
            return False
        self._progress.best, self._progress.best_step = value, step
        return True

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records the sample: the model's continuation of the prompt after `step` steps."""
        self._write({"step": step, "prompt": prompt, "sample": text})
        self._display.line("sample", prompt + text)

    def _write(self, record: Record) -> None:
        record = {"step": record["step"], "time": time.time(), **record}
        for sink in self._sinks:
            try:
                sink.write(record)
            except OSError as error:
                # The run matters more than its metrics, and a full disk may get room again.
                self._display.warn(f"metrics of step {record['step']} are lost: {error}")

    def _count_skipped(
        self, step: int, loss: float, *, finite: bool, scale: np.ndarray | None
    ) -> str | None:
        """Counts the step if its update was skipped; returns why the run must stop, if it must."""
        progress = self._progress
        if finite:
            progress.skipped_in_a_row = 0
            return None
        if math.isfinite(loss):
            norm = self._metrics.get("grad_norm")
            why = self._advice("gradient", "not finite" if norm is None else norm, step)
        else:
            why = self._advice("loss", loss, step)
        if scale is None:
            return why
        progress.skipped += 1
        self._metrics["skipped"] = progress.skipped
        if self._dynamic_loss_scale and math.isfinite(loss) and scale > 1:
            return None  # the next step tries a lower scale
        progress.skipped_in_a_row += 1
        return why if progress.skipped_in_a_row > self._skip_nonfinite else None

    def _advice(self, name: str, value: object, step: int) -> str:
        if step == 0:
            return (
                f"{name} is {value} before the first step: the weights of the model are damaged; "
                "download it again"
            )
        after = self._progress.skipped_in_a_row
        skipped = f", after {after} steps in a row were skipped" if after > 1 else ""
        return (
            f"{name} is {value} at step {step}{skipped}: the run stopped and exported nothing; "
            f"lower learning_rate ({self._learning_rates.max():g}) or lengthen warmup"
        )


def open_sinks(
    workdir: Path, wandb: str | None, config: dict[str, Any], resumed: int | None
) -> list[Sink]:
    """Opens the destinations of the metrics.

    Args:
      workdir: The run's folder.
      wandb: The Weights & Biases project, if any.
      config: The run's config, for Weights & Biases.
      resumed: The step from which a run is resumed; None for a new run.

    Raises:
      ConfigError: Weights & Biases refuses the run.
      OSError: A file cannot be written.
    """
    if jax.process_index() > 0:  # all processes compute the same metrics; the first one writes them
        return []
    sinks: list[Sink] = []
    if wandb is not None:
        sinks.append(WeightsAndBiases(wandb, workdir, config))
    sinks.append(MetricsWriter(workdir))
    sinks.append(TensorBoard(workdir / run_files.TENSORBOARD, resumed))
    return sinks


class TensorBoard:
    """Event files for TensorBoard; a record is on disk as soon as it is written."""

    def __init__(self, folder: Path, resumed: int | None) -> None:
        """Starts a file.

        Args:
          folder: The folder of the event files.
          resumed: The step from which a run is resumed; None for a new run. TensorBoard hides
            later steps in earlier files, written before the process died.
        """
        # Slow to import. Not SummaryWriter: its thread ends when the disk is full, and the process
        # would wait for it forever.
        from tensorboardX import summary
        from tensorboardX.event_file_writer import EventsWriter
        from tensorboardX.proto import event_pb2

        proto: Any = event_pb2
        self._summary, self._event = summary, proto.Event
        folder.mkdir(exist_ok=True)
        # The writer's names differ only by the second, and two processes may start within one.
        self._file = EventsWriter(str(folder / "events"), f".{os.getpid()}")
        if resumed is not None:
            start = proto.SessionLog(status=proto.SessionLog.START)
            self._file.write_event(proto.Event(step=resumed + 1, session_log=start))

    def write(self, record: Record) -> None:
        """Adds a point to the curve of each number."""
        for name, value in record.items():
            if name == "sample":
                summary = self._summary.text(name, value)
            elif isinstance(value, str):
                continue
            elif name not in ("step", "time", "resumed") and math.isfinite(value):
                summary = self._summary.scalar(name, value)
            else:
                continue
            self._file.write_event(
                self._event(wall_time=record["time"], step=record["step"], summary=summary)
            )
        self._file.flush()

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


class WeightsAndBiases:
    """One run of Weights & Biases, which continues after each restart."""

    def __init__(self, project: str, workdir: Path, config: dict[str, Any]) -> None:
        """Starts or resumes the run.

        Args:
          project: The name of the project.
          workdir: The run's folder; holds the files of wandb and the identifier of its run.
          config: The run's config, for the web page.

        Raises:
          ConfigError: The service refuses the run.
        """
        import wandb  # pyright: ignore[reportMissingImports]  # an extra

        folder = workdir / run_files.WANDB
        folder.mkdir(exist_ok=True)
        identifier = folder / "run_id"
        if not identifier.exists():
            identifier.write_text(uuid.uuid4().hex)
        try:
            self._run = wandb.init(
                project=project,
                name=workdir.name,
                dir=os.fspath(workdir),
                config=config,
                id=identifier.read_text(),
                resume="allow",
            )
        except wandb.Error as error:
            raise ConfigError(f"wandb: {str(error).splitlines()[0]}") from error
        # wandb's own step count cannot go back when a run is resumed.
        self._run.define_metric("*", step_metric="step")

    def write(self, record: Record) -> None:
        """Logs a record."""
        self._run.log(record)

    def close(self) -> None:
        """Waits until everything is sent."""
        self._run.finish()
