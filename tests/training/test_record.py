"""What is counted of steps that are not finite, and when they stop a run."""

import contextlib
import io
import math

import jax.numpy as jnp
import numpy as np
import runs

import lomo_jax
from lomo_jax import models
from lomo_jax.errors import NonFiniteError
from lomo_jax.losses import Metrics
from lomo_jax.training.checkpoint import Progress
from lomo_jax.training.display import Display
from lomo_jax.training.record import Recorder

_SHAPE = models.LlamaConfig(32, 8, 8, 1, 1, 1, 8)
_NAN = float("nan")


class _List(list):
    """A sink."""

    write = list.append

    def close(self):
        pass


def _run(losses, *, finite=None, scale=None, progress=None, first=1, **changes):
    """Records steps; returns what was counted, the records, and why it stopped."""
    changes = {"schedule": "constant", **changes}
    config = runs.make_config("text", "workdir", steps=len(losses), **changes)
    progress, sink, why = progress or Progress(), _List(), None
    finite = [math.isfinite(loss) for loss in losses] if finite is None else finite
    with contextlib.redirect_stdout(io.StringIO()):
        recorder = Recorder(config, _SHAPE, progress, Display(len(losses)), [sink])
        try:
            pairs = list(zip(losses, finite, strict=True))[first - 1 :]
            for step, (loss, is_finite) in enumerate(pairs, first):
                metrics = Metrics(accuracy=jnp.float32(0.5), weight=jnp.float32(8))
                out = lomo_jax.StepOutput(jnp.float32(loss), metrics, None, jnp.array(is_finite))
                recorder.step(step, out, None if scale is None else jnp.float32(scale))
            recorder.flush()
        except NonFiniteError as error:
            why = str(error)
    return progress, sink, why


def test_a_step_is_recorded_when_the_next_one_is_under_way():
    _, sink, _ = _run([1.0, 2.0])
    assert [(record["step"], record["loss"]) for record in sink] == [(1, 1.0), (2, 2.0)]


def test_without_skipping_the_first_one_stops_the_run():
    _, sink, why = _run([1.0, _NAN, 1.0])
    assert why is not None
    assert why.startswith("loss is nan at step 2: the run stopped and exported nothing; lower ")
    assert [record["step"] for record in sink] == [1, 2]


def test_a_gradient_stops_it_too():
    _, _, why = _run([1.0, 1.0], finite=[True, False])
    assert why is not None
    assert why.startswith("gradient is not finite at step 2: ")


def test_skipped_updates_are_counted_and_limited():
    progress, sink, why = _run([1.0, _NAN, _NAN, 1.0, _NAN, 1.0], scale=1, skip_nonfinite=2)
    assert why is None
    assert (progress.skipped, progress.skipped_in_a_row) == (3, 0)
    assert [record.get("skipped", 0) for record in sink] == [0, 1, 2, 2, 3, 3]
    assert np.isnan([record["loss"] for record in sink]).tolist() == [0, 1, 1, 0, 1, 0]

    progress, _, why = _run([1.0, _NAN, _NAN, _NAN, 1.0], scale=1, skip_nonfinite=2)
    assert why is not None
    assert why.startswith("loss is nan at step 4, after 2 steps in a row were skipped: ")
    assert progress.skipped == 3


def test_a_skipped_update_does_not_count_for_the_schedule():
    fields = {"warmup": 0, "learning_rate": 8.0, "scale": 1, "skip_nonfinite": 2}
    losses = [1.0, _NAN, _NAN, 1.0]
    _, sink, _ = _run(losses, **fields, schedule="linear")
    assert [record["learning_rate"] for record in sink] == [8.0, 6.0, 6.0, 6.0]


def test_the_count_goes_on_after_a_restart():
    before = Progress(step=7, skipped=5, skipped_in_a_row=2)
    losses = [1.0] * 7 + [_NAN]
    progress, _, why = _run(losses, scale=1, skip_nonfinite=2, progress=before, first=8)
    assert why is not None
    assert progress.skipped == 6


def test_an_overflow_that_a_lower_scale_may_heal_is_no_reason_to_stop():
    many, overflow = [1.0] * 9, [False] * 9
    progress, _, why = _run(many, finite=overflow, scale=2.0**16, dynamic_loss_scale=True)
    assert why is None
    assert (progress.skipped, progress.skipped_in_a_row) == (9, 0)
    *_, why = _run(many, finite=overflow, scale=1.0, dynamic_loss_scale=True)
    assert why is not None
    assert why.startswith("gradient is not finite at step 1: ")


def test_a_full_disk_takes_the_records_and_not_the_run(capsys):
    class Full(_List):
        def write(self, record):
            raise OSError(28, "No space left on device")

    config = runs.make_config("text", "workdir", steps=1, schedule="constant")
    recorder = Recorder(config, _SHAPE, Progress(), Display(1), [Full()])
    metrics = Metrics(accuracy=jnp.float32(0.5), weight=jnp.float32(8))
    recorder.step(1, lomo_jax.StepOutput(jnp.float32(1), metrics, None, jnp.array(True)), None)
    recorder.flush()
    assert (
        "warning   metrics of step 1 are lost: [Errno 28] No space left" in capsys.readouterr().out
    )
