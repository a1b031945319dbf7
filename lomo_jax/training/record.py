"""Tells a run's progress to the person and to `metrics.jsonl`, and stops it where it went wrong."""

import json
import math
from pathlib import Path
from typing import Any, Self

import jax
import jax.numpy as jnp
import numpy as np

import lomo_jax
from lomo_jax.models import LlamaConfig
from lomo_jax.training.config import Config, to_dict
from lomo_jax.training.display import Display
from lomo_jax.training.errors import NonFiniteError
from lomo_jax.training.evaluate import Evaluation
from lomo_jax.training.metrics import MetricsFile, Stopwatch, device_memory
from lomo_jax.training.optimizer import make_schedule


class Recorder:
    """Takes in what each step and each evaluation gave; use as a context."""

    def __init__(
        self,
        config: Config,
        model_config: LlamaConfig,
        workdir: Path,
        display: Display,
        devices: int = 1,
    ) -> None:
        self._config = config
        self._display = display
        # Every process computes the same metrics, and the first one writes them.
        self._file = None
        if jax.process_index() == 0:
            (workdir / "config.json").write_text(json.dumps(to_dict(config), indent=2) + "\n")
            self._file = MetricsFile(workdir / "metrics.jsonl")
        self._stopwatch = Stopwatch(
            model_config, config.batch_size, config.sequence_length, devices
        )
        schedule = make_schedule(config.schedule, config.learning_rate, config.steps, config.warmup)
        # All at once: asking the schedule in the loop would put work on the device.
        self._learning_rates = np.asarray(jax.vmap(schedule)(jnp.arange(config.steps)))
        self._shown: dict[str, float] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._file is not None:
            self._file.close()

    def restart_clock(self) -> None:
        """Leaves the time since the last step out of the throughput."""
        self._stopwatch.restart()

    def step(self, step: int, out: lomo_jax.StepOutput) -> None:
        """Waits for step number `step` (from 1) and records it.

        Raises:
          NonFiniteError: Its loss is NaN or infinite.
        """
        loss, metrics, norm = jax.device_get((out.loss, out.aux, out.grad_norm))
        self._stopwatch.step()
        self._check_finite("loss", float(loss), step)
        learning_rate = float(self._learning_rates[step - 1])
        self._shown |= {"loss": float(loss), "learning_rate": learning_rate}
        if norm is not None:
            self._shown["grad_norm"] = float(norm)
        logged = step in (1, self._config.steps) or step % self._config.log_every == 0
        if logged:
            self._shown |= self._stopwatch.read() | device_memory()
            # There is one of each for every microbatch.
            accuracy = np.average(np.ravel(metrics.accuracy), weights=np.ravel(metrics.weight))
            self._write({"step": step, **self._shown, "accuracy": float(accuracy)})
        self._display.step(step, self._shown, logged=logged)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Records an evaluation after `step` steps.

        Raises:
          NonFiniteError: Its loss is NaN or infinite.
        """
        self._check_finite("held-out loss", result.loss, step)
        self._write({"step": step, "eval_loss": result.loss, "eval_accuracy": result.accuracy})
        self._display.line(
            "held out",
            f"loss {result.loss:.4f}  accuracy {result.accuracy:.1%}  after {step} steps",
        )

    def _write(self, record: dict[str, Any]) -> None:
        if self._file is not None:
            self._file.write(record)

    def _check_finite(self, name: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{name} is {loss} at step {step}: the run stopped and exported nothing; lower "
                f"learning_rate ({self._config.learning_rate:g}) or lengthen warmup"
            )
