"""Tells a run's progress to the person and to its sinks, and stops it where it went wrong."""

import contextlib
import math
import time
from collections.abc import Sequence
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import lomo_jax
from lomo_jax.errors import NonFiniteError
from lomo_jax.models import LlamaConfig
from lomo_jax.run_files import Record
from lomo_jax.training.checkpoint import Progress
from lomo_jax.training.config import Config
from lomo_jax.training.display import Display
from lomo_jax.training.evaluate import Evaluation
from lomo_jax.training.metrics import Stopwatch, device_memory
from lomo_jax.training.optimizer import make_schedule
from lomo_jax.training.sinks import Sink


class Recorder:
    """Takes in what each step and each evaluation gave; use as a context."""

    def __init__(
        self,
        config: Config,
        model_config: LlamaConfig,
        progress: Progress,
        display: Display,
        sinks: Sequence[Sink],
        devices: int = 1,
        is_resumed: bool = False,
    ) -> None:
        """Starts to record.

        Args:
          config: Of the run.
          model_config: The model's shape.
          progress: Where the run goes on. What is skipped and evaluated is counted there.
          display: Shows it to the person.
          sinks: Take the records.
          devices: The number of them.
          is_resumed: Whether the sinks have records of this run already.
        """
        self._config = config
        self._progress = progress
        self._display = display
        self._sinks = sinks
        self._late: tuple[int, Any] | None = None
        self._stopwatch = Stopwatch(
            model_config, config.batch_size, config.sequence_length, devices
        )
        schedule = make_schedule(config.schedule, config.learning_rate, config.steps, config.warmup)
        # All at once: asking the schedule in the loop would put work on the device.
        self._learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(config.steps)))
        self._measured: dict[str, float] = {}  # of the last steps
        if progress.skipped:
            self._measured["skipped"] = progress.skipped
        self._shown: dict[str, float] = {}  # beside it, to the person
        if is_resumed:
            self._write({"step": progress.step, "resumed": True})

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        if kind is KeyboardInterrupt:
            return  # of a person who does not want to wait for the network
        for sink in self._sinks:
            with contextlib.suppress(OSError):  # a full disk
                sink.close()

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the throughput."""
        self._stopwatch.restart()

    def step(self, step: int, out: lomo_jax.StepOutput, scale: jax.Array | None) -> None:
        """Takes what step number `step` (from 1) will give, and records the one before.

        So the device has its next step already when the host waits for the last one.

        Args:
          step: Its number.
          out: Its output.
          scale: What its loss was multiplied by, if the loss scale is dynamic.

        Raises:
          NonFiniteError: Loss or gradient of the step before is not finite.
        """
        before, self._late = self._late, (step, (out, scale))
        self._record(before)

    def flush(self) -> None:
        """Waits for the last step and records it; raises what `step` does."""
        before, self._late = self._late, None
        self._record(before)

    def _record(self, late: tuple[int, Any] | None) -> None:
        if late is None:
            return
        step, given = late
        out, scale = jax.device_get(given)
        self._stopwatch.step()
        loss = float(out.loss)
        # An update that is skipped does not count for the schedule either.
        learning_rate = float(self._learning_rates[step - 1 - self._progress.skipped])
        self._measured |= {"loss": loss, "learning_rate": learning_rate}
        if out.grad_norm is not None:
            self._measured["grad_norm"] = float(out.grad_norm)
        if scale is not None and self._config.dynamic_loss_scale:
            self._measured["loss_scale"] = float(scale)
        stopped = self._count_skipped(step, loss, finite=bool(out.finite), scale=scale)
        logged = step in (1, self._config.steps) or step % self._config.log_every == 0
        if logged or stopped:
            self._measured |= self._stopwatch.read() | device_memory()
            tokens = self._config.batch_size * self._config.sequence_length
            seconds = tokens / self._measured["tokens_per_second"]
            # There is one of each for every microbatch.
            metrics = out.aux
            accuracy = np.average(np.ravel(metrics.accuracy), weights=np.ravel(metrics.weight))
            self._write({"step": step, **self._measured, "accuracy": float(accuracy)})
            self._shown["seconds_left"] = (self._config.steps - step) * seconds
        self._display.step(step, self._measured | self._shown, logged=logged)
        if stopped:
            raise NonFiniteError(stopped)

    def evaluation(self, step: int, result: Evaluation) -> bool:
        """Records an evaluation after `step` steps.

        Returns:
          Whether its loss is the lowest after a step so far.

        Raises:
          NonFiniteError: Its loss is NaN or infinite.
        """
        if not math.isfinite(result.loss):
            raise NonFiniteError(self._advice("held-out loss", result.loss, step))
        self._write({"step": step, "eval_loss": result.loss, "eval_accuracy": result.accuracy})
        self._display.line(
            "held out",
            f"loss {result.loss:.4f}  accuracy {result.accuracy:.1%}  after {step} steps",
        )
        self._shown["eval_loss"] = result.loss
        self._progress.evaluated = step
        best = math.inf if self._progress.best is None else self._progress.best
        if step == 0 or result.loss >= best:
            return False
        self._progress.best, self._progress.best_step = result.loss, step
        return True

    def sample(self, step: int, prompt: str, text: str) -> None:
        """Records how the model continues the prompt after `step` steps."""
        self._write({"step": step, "prompt": prompt, "sample": text})
        self._display.line("sample", prompt + text)

    def _write(self, record: Record) -> None:
        record = {"step": record["step"], "time": time.time(), **record}
        for sink in self._sinks:
            try:
                sink.write(record)
            except OSError as error:
                # The run is worth more than its metrics, and a disk that is full may not stay so.
                self._display.line("warning", f"metrics of step {record['step']} are lost: {error}")

    def _count_skipped(
        self, step: int, loss: float, *, finite: bool, scale: np.ndarray | None
    ) -> str | None:
        """Counts the step if its update was skipped; returns why the run has to stop, if it has."""
        progress = self._progress
        if finite:
            progress.skipped_in_a_row = 0
            return None
        if math.isfinite(loss):
            norm = self._measured.get("grad_norm")
            why = self._advice("gradient", "not finite" if norm is None else norm, step)
        else:
            why = self._advice("loss", loss, step)
        if scale is None:
            return why
        progress.skipped += 1
        self._measured["skipped"] = progress.skipped
        if self._config.dynamic_loss_scale and math.isfinite(loss) and scale > 1:
            return None  # a lower scale may do: what it is dynamic for
        progress.skipped_in_a_row += 1
        limit = self._config.skip_nonfinite
        return why if progress.skipped_in_a_row > limit else None

    def _advice(self, name: str, value: object, step: int) -> str:
        after = self._progress.skipped_in_a_row
        skipped = f", after {after} steps in a row were skipped" if after > 1 else ""
        return (
            f"{name} is {value} at step {step}{skipped}: the run stopped and exported nothing; "
            f"lower learning_rate ({self._config.learning_rate:g}) or lengthen warmup"
        )
