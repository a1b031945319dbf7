"""Logging: the terminal, log.txt, records and divergence. test_loop.py tests plain stdout."""

import contextlib
import io
import math
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

import lomo_jax
from lomo_jax import models
from lomo_jax.errors import NonFiniteError, UnexpectedError, UserError
from lomo_jax.losses import Metrics
from lomo_jax.training.checkpoint import Progress
from lomo_jax.training.log import Display, Evaluation, Recorder, Stopwatch
from lomo_jax.training.step import learning_rates, make_schedule

_PROGRAM = """
from lomo_jax.training.log import Display
with Display(5) as display:
    display.status("reading the model")
    display.line("sample", "one\\ntwo [bold]x")
    for step in range(1, 6):
        metrics = {"loss": 1 / step, "learning_rate": 1e-3, "tokens_per_second": 1234.5}
        display.step(step, metrics, logged=False)
"""


def test_a_full_disk_loses_the_log_and_the_run_continues(capsys):
    with Display(1) as display:
        display.line("model", "small")
        display.log_to(Path("/dev/full"))
        display.line("text", "short")
    assert capsys.readouterr().out == "model     small\ntext      short\n"


@pytest.mark.parametrize("closed", [False, True])
def test_the_run_continues_when_stdout_cannot_be_written(tmp_path, closed):
    """For a full disk and a closed pipe."""
    log = tmp_path / "log.txt"
    program = _PROGRAM.replace(
        'status("reading the model")', f"log_to(__import__('pathlib').Path({str(log)!r}))"
    )
    if closed:
        end, output = os.pipe()
        os.close(end)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.run(
        [sys.executable, "-c", program], stdout=output, stderr=subprocess.PIPE, check=False
    )
    os.close(output)
    assert (process.returncode, process.stderr) == (0, b"")
    assert "two [bold]x" in log.read_text(encoding="utf-8")


def test_control_characters_in_a_sample_are_replaced(tmp_path, capsys):
    with Display(1) as display:
        display.log_to(tmp_path / "log.txt")
        display.line("sample", "one\x1b[2J\x07\ttwo\x9b \N{HEAVY BLACK HEART}")
    shown = "one\ufffd[2J\ufffd\ttwo\ufffd \N{HEAVY BLACK HEART}\n"
    assert capsys.readouterr().out == f"sample    {shown}".expandtabs(8)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith(f"sample    {shown}")


def _fail(log: Path | None, error: Exception) -> None:
    with Display(1) as display:
        if log is not None:
            display.log_to(log)
        raise error


def test_the_log_contains_a_user_error(tmp_path):
    with pytest.raises(UserError, match=r"^steps: 0$"):
        _fail(tmp_path / "log.txt", UserError("steps: 0"))
    assert (tmp_path / "log.txt").read_text().endswith(" error     steps: 0\n")


def test_the_log_contains_the_traceback_of_any_other_error(tmp_path):
    log = tmp_path / "log.txt"
    with pytest.raises(UnexpectedError) as caught:
        _fail(log, ValueError("a\nbug"))
    assert str(caught.value) == f"ValueError: a bug; the traceback is in {log}"
    assert isinstance(caught.value.__cause__, ValueError)
    text = log.read_text()
    assert "Traceback (most recent call last):" in text
    assert "raise error" in text
    assert "ValueError: a" in text


@pytest.mark.parametrize("log", [None, Path("/dev/full")])
def test_without_a_log_the_error_is_raised_unchanged(log):
    with pytest.raises(ValueError, match=r"^a bug$"):
        _fail(log, ValueError("a bug"))


def _on_a_terminal(columns: int, program: str = _PROGRAM) -> str:
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.run(
        [sys.executable, "-c", program], stdout=terminal, env=environment, check=False
    )
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_a_terminal_shows_a_bar_below_the_lines():
    text = _on_a_terminal(100)
    assert "sample    one" in text
    assert "          two [bold]x" in text
    assert re.search(r"step 5/5 ━+ loss 0\.2000  lr 1\.00e-03  1,23[45] tok/s", text)


def test_a_narrow_terminal_wraps_the_bar():
    program = _PROGRAM.replace("Display(5)", "Display(5000)").replace(
        '{"loss"', '{"eval_loss": 3.2, "seconds_left": 75, "loss"'
    )
    text = _on_a_terminal(80, program)
    *_, last = re.findall(r"step +5/5000 ━+ (.*?left)", text, re.DOTALL)
    words = " ".join(last.split())
    assert re.fullmatch(
        r"loss 0\.2000 held out 3\.2000 lr 1\.00e-03 1,23[45] tok/s 0:01:15 left", words
    )


_SHAPE = models.DecoderConfig(32, 8, 8, 1, 1, 1, 8)
_NAN = float("nan")


class _List(list):
    """A sink."""

    write = list.append

    def close(self):
        pass


def _recorder(progress, display, sink, steps, rates=None, **options) -> Recorder:
    rates = np.full(steps, 0.03, np.float32) if rates is None else rates
    stopwatch = Stopwatch(_SHAPE, batch_size=4, length=32)
    return Recorder(progress, display, [sink], stopwatch, rates, log_every=1, **options)


def _run(
    losses, *, metrics=None, finite=None, scale=None, progress=None, first=1, rates=None, **options
):
    """Records steps; returns progress, records, and the error that stopped the run."""
    progress, sink, why = progress or Progress(), _List(), None
    finite = [math.isfinite(loss) for loss in losses] if finite is None else finite
    with contextlib.redirect_stdout(io.StringIO()):
        recorder = _recorder(progress, Display(len(losses)), sink, len(losses), rates, **options)
        try:
            pairs = list(zip(losses, finite, strict=True))[first - 1 :]
            for step, (loss, is_finite) in enumerate(pairs, first):
                aux = metrics or Metrics(accuracy=jnp.float32(0.5), weight=jnp.float32(8))
                out = lomo_jax.StepOutput(jnp.float32(loss), aux, None, jnp.array(is_finite))
                recorder.step(step, out, None if scale is None else jnp.float32(scale))
            recorder.flush()
        except NonFiniteError as error:
            why = str(error)
    return progress, sink, why


def test_every_step_is_recorded():
    _, sink, _ = _run([1.0, 2.0])
    assert [(record["step"], record["loss"]) for record in sink] == [(1, 1.0), (2, 2.0)]


def test_the_accuracy_is_weighted_over_the_microbatches():
    metrics = Metrics(accuracy=jnp.array([1.0, 0.0]), weight=jnp.array([3.0, 1.0]))
    _, (record,), _ = _run([1.0], metrics=metrics)
    assert record["accuracy"] == 0.75


def test_without_skipping_the_first_nonfinite_loss_stops_the_run():
    _, sink, why = _run([1.0, _NAN, 1.0])
    assert why is not None
    assert why.startswith("loss is nan at step 2: the run stopped and exported nothing; lower ")
    assert [record["step"] for record in sink] == [1, 2]


def test_a_nonfinite_gradient_stops_the_run():
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


def test_a_skipped_update_does_not_advance_the_schedule():
    losses, rates = [1.0, _NAN, _NAN, 1.0], learning_rates(make_schedule("linear", 8.0, 4, 0), 4)
    _, sink, _ = _run(losses, rates=rates, scale=1, skip_nonfinite=2)
    assert [record["learning_rate"] for record in sink] == [8.0, 6.0, 6.0, 6.0]


def test_the_count_of_skipped_updates_continues_after_a_restart():
    before = Progress(step=7, skipped=5, skipped_in_a_row=2)
    losses = [1.0] * 7 + [_NAN]
    progress, _, why = _run(losses, scale=1, skip_nonfinite=2, progress=before, first=8)
    assert why is not None
    assert progress.skipped == 6


def test_an_overflow_that_a_lower_scale_may_fix_does_not_stop_the_run():
    many, overflow = [1.0] * 9, [False] * 9
    progress, _, why = _run(many, finite=overflow, scale=2.0**16, dynamic_loss_scale=True)
    assert why is None
    assert (progress.skipped, progress.skipped_in_a_row) == (9, 0)
    *_, why = _run(many, finite=overflow, scale=1.0, dynamic_loss_scale=True)
    assert why is not None
    assert why.startswith("gradient is not finite at step 1: ")


@pytest.mark.parametrize(
    ("values", "lower", "best"),
    [
        ([0.5, 0.7, 0.6], False, (0.7, 2)),
        ([0.5, 0.7, 0.6], True, (0.5, 1)),
        ([_NAN, 0.7, _NAN, 0.6], True, (0.6, 4)),
        ([_NAN, 0.7, math.inf], False, (0.7, 2)),
    ],
)
def test_the_best_value_of_a_metric(values, lower, best):
    progress, sink = Progress(), _List()
    with contextlib.redirect_stdout(io.StringIO()):
        recorder = _recorder(progress, Display(9), sink, 9, best_metric="a_b")
        for step, value in enumerate(values, 1):
            names = frozenset({"a_b"} if lower else ())
            recorder.evaluation(step, Evaluation(1.0, 0.5, {"a_b": value}, names))
    assert (progress.best, progress.best_step) == best


def test_a_name_that_is_not_utf8_in_the_log(tmp_path):
    with contextlib.redirect_stdout(io.StringIO()), Display(1) as display:
        display.log_to(tmp_path / "log.txt")
        display.warn("caf\udce9")
    assert "caf\\udce9" in (tmp_path / "log.txt").read_text()


def test_a_full_disk_loses_records_and_the_run_continues(capsys):
    class Full(_List):
        def write(self, record):
            raise OSError(28, "No space left on device")

    recorder = _recorder(Progress(), Display(1), Full(), 1)
    metrics = Metrics(accuracy=jnp.float32(0.5), weight=jnp.float32(8))
    recorder.step(1, lomo_jax.StepOutput(jnp.float32(1), metrics, None, jnp.array(True)), None)
    recorder.flush()
    assert (
        "warning   metrics of step 1 are lost: [Errno 28] No space left" in capsys.readouterr().out
    )


_WIDE = models.DecoderConfig(
    vocab_size=100,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


def test_stopwatch_counts_the_steps_since_the_last_reading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stopwatch = Stopwatch(_WIDE, batch_size=2, length=8)
    now[0] = 100.0  # time spent on an evaluation
    stopwatch.restart()
    for _ in range(3):
        stopwatch.step()
    now[0] += 6.0
    assert stopwatch.read()["tokens_per_second"] == 3 * 16 / 6
    stopwatch.step()
    now[0] += 1.0
    assert stopwatch.read()["tokens_per_second"] == 16


def test_the_time_of_a_pause_is_not_spent_on_steps(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    metrics = Metrics(accuracy=jnp.float32(0.5), weight=jnp.float32(8))
    out = lomo_jax.StepOutput(jnp.float32(1), metrics, None, jnp.array(True))
    sink = _List()
    recorder = _recorder(Progress(), Display(2, quiet=True), sink, 2)
    now[0] += 100.0
    with recorder:
        now[0] += 1.0
        recorder.step(1, out, None)
        with recorder.pause():
            assert len(sink) == 1  # step 1 is recorded before an evaluation or a save
            now[0] += 100.0
        now[0] += 2.0
        recorder.step(2, out, None)
        recorder.flush()
    assert [record["tokens_per_second"] for record in sink] == [4 * 32, 4 * 32 / 2]
