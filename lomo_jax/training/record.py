"""Tells a run's progress to the person and to `metrics.jsonl`, and stops it where it went wrong."""

import math

import jax
import numpy as np

import lomo_jax
from lomo_jax.training.config import Config
from lomo_jax.training.display import Display
from lomo_jax.training.errors import NonFiniteError
from lomo_jax.training.evaluate import Evaluation
from lomo_jax.training.metrics import MetricsFile, Stopwatch, device_memory


class Recorder:
    """Takes in what each step and each evaluation gave."""

    def __init__(
        self,
        config: Config,
        learning_rates: np.ndarray,
        display: Display,
        file: MetricsFile,
        stopwatch: Stopwatch,
    ) -> None:
        """Args: learning_rates: [steps], that of each step."""
        self._config = config
        self._learning_rates = learning_rates
        self._display = display
        self._file = file
        self._stopwatch = stopwatch
        self._shown: dict[str, float] = {}

    def step(self, step: int, out: lomo_jax.StepOutput) -> None:
        """Waits for step number `step` (from 1) and records it.

        Raises:
          NonFiniteError: Its loss is NaN or infinite.
        """
        loss, aux = jax.device_get((out.loss, out.aux))
        self._stopwatch.step()
        self._check_finite("loss", float(loss), step)
        learning_rate = float(self._learning_rates[step - 1])
        self._shown |= {"loss": float(loss), "learning_rate": learning_rate}
        logged = step in (1, self._config.steps) or step % self._config.log_every == 0
        if logged:
            self._shown |= self._stopwatch.read() | device_memory()
            self._file.write({"step": step, **self._shown, "accuracy": float(aux.accuracy)})
        self._display.step(step, self._shown, logged=logged)

    def evaluation(self, step: int, result: Evaluation) -> None:
        """Records an evaluation after `step` steps.

        Raises:
          NonFiniteError: Its loss is NaN or infinite.
        """
        self._check_finite("held-out loss", result.loss, step)
        self._file.write({"step": step, "eval_loss": result.loss, "eval_accuracy": result.accuracy})
        self._display.line(
            "held out",
            f"loss {result.loss:.4f}  accuracy {result.accuracy:.1%}  after {step} steps",
        )

    def _check_finite(self, name: str, loss: float, step: int) -> None:
        if not math.isfinite(loss):
            raise NonFiniteError(
                f"{name} is {loss} at step {step}: the run stopped and exported nothing; lower "
                f"learning_rate ({self._config.learning_rate:g}) or lengthen warmup"
            )
