"""Stopping runs by signals, and resuming them."""

import dataclasses
import functools
import gc
import os
import pty
import select
import signal
import subprocess
import sys
import threading
import time

import orbax.checkpoint as ocp
import pytest
import runs
from helpers import before_release

from lomo_jax.errors import ConfigError
from lomo_jax.training import MeshConfig, export, loop
from lomo_jax.training.devices import Stop
from lomo_jax.training.resume import open_workdir

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    """The workdir of an uninterrupted run."""
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(runs.make_config(text, workdir))
    return workdir


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, before_release(signal.SIGUSR1)])
def test_a_signal_saves_a_checkpoint_and_the_run_resumes(text, whole, tmp_path, capsys, number):
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1, signal.SIGHUP)
    handlers = [signal.getsignal(s) for s in numbers]
    config = runs.make_config(text, tmp_path, checkpoint_every=0)
    with runs.signal_when(lambda: runs.last_step(tmp_path) >= 3, number):
        loop.train(config)
    assert [signal.getsignal(s) for s in numbers] == handlers
    stopped = runs.last_step(tmp_path)
    assert 3 <= stopped < 12
    assert f"stopped   after step {stopped}, saved" in capsys.readouterr().out
    assert not (tmp_path / "export").exists()
    loop.train(config)
    assert f"resumed   after step {stopped} of 12" in capsys.readouterr().out
    runs.assert_same_run(tmp_path, whole)


def test_a_signal_during_a_save(text, whole, tmp_path):
    checkpoints = tmp_path / "checkpoints"
    with runs.signal_when(lambda: list(checkpoints.glob("*tmp*")), signal.SIGTERM):
        loop.train(runs.make_config(text, tmp_path, checkpoint_every=2))
    assert not list(checkpoints.glob("*tmp*"))
    assert str(runs.last_step(tmp_path)) in {path.name for path in checkpoints.iterdir()}
    loop.train(runs.make_config(text, tmp_path, checkpoint_every=2))
    runs.assert_same_run(tmp_path, whole)


def test_a_signal_before_the_first_step_saves_nothing(text, whole, tmp_path, capsys):
    with runs.signal_when((tmp_path / ".lock").exists, signal.SIGTERM):
        loop.train(runs.make_config(text, tmp_path))
    assert "stopped   before the first step" in capsys.readouterr().out
    loop.train(runs.make_config(text, tmp_path))
    runs.assert_same_run(tmp_path, whole)


def _stop_in_evaluation(monkeypatch, workdir, step):
    """Sends SIGTERM at the start of the evaluation after step `step`."""
    make = loop.make_evaluate

    def make_evaluate(*args):
        made = make(*args)

        def evaluate(params):
            if runs.last_step(workdir) == step:
                signal.raise_signal(signal.SIGTERM)
            return made(params)

        return evaluate

    monkeypatch.setattr(loop, "make_evaluate", make_evaluate)


def test_a_signal_during_an_evaluation_postpones_it(text, whole, tmp_path, monkeypatch):
    _stop_in_evaluation(monkeypatch, tmp_path, 5)
    loop.train(runs.make_config(text, tmp_path))
    assert list(runs.column(tmp_path, "eval_loss")) == [0]
    monkeypatch.undo()
    loop.train(runs.make_config(text, tmp_path))
    runs.assert_same_run(tmp_path, whole)


def test_a_postponed_evaluation_still_preserves_the_best_checkpoint(text, tmp_path, monkeypatch):
    fields = {"optimizer": "lion", "learning_rate": 0.3, "schedule": "constant"}
    fields |= {"eval_every": 3, "checkpoint_every": 2, "decay_mask": "all"}
    _stop_in_evaluation(monkeypatch, tmp_path, 6)
    loop.train(runs.make_config(text, tmp_path, **fields))
    monkeypatch.undo()
    loop.train(runs.make_config(text, tmp_path, **fields))
    losses = runs.column(tmp_path, "eval_loss")
    assert min(losses, key=losses.get) == 6, "the test is about a best one that is postponed"
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"6", "12"}


def test_a_signal_during_the_first_evaluation(text, whole, tmp_path, monkeypatch, capsys):
    _stop_in_evaluation(monkeypatch, tmp_path, 0)
    loop.train(runs.make_config(text, tmp_path))
    assert "stopped   before the first step" in capsys.readouterr().out
    monkeypatch.undo()
    loop.train(runs.make_config(text, tmp_path))
    assert [r["step"] for r in runs.records(tmp_path) if "resumed" in r] == [0]
    assert not (tmp_path / "earlier-1").exists()
    runs.assert_same_run(tmp_path, whole)


def test_a_signal_during_the_last_evaluation(text, whole, tmp_path, monkeypatch, capsys):
    _stop_in_evaluation(monkeypatch, tmp_path, 12)
    loop.train(runs.make_config(text, tmp_path))
    assert "stopped   after step 12, saved" in capsys.readouterr().out
    assert not (tmp_path / "export").exists()
    monkeypatch.undo()
    for _ in range(2):
        loop.train(runs.make_config(text, tmp_path))
        runs.assert_same_run(tmp_path, whole)
    # The second restart does not evaluate again.
    assert sum("eval_loss" in record for record in runs.records(tmp_path)) == 4
    assert (
        export.main(["lomo-jax export", str(tmp_path), str(tmp_path / "best"), "--step=best"]) == 0
    )
    assert "after step 12 |" in (tmp_path / "best" / "README.md").read_text()


def test_a_second_interrupt_does_not_wait_for_the_checkpoint(text, tmp_path, monkeypatch):
    begun, go_on, ended = threading.Event(), threading.Event(), threading.Event()
    finalize = ocp.CompositeCheckpointHandler.finalize

    def finalize_slowly(*args):
        begun.set()
        go_on.wait(20)
        finalize(*args)
        ended.set()

    monkeypatch.setattr(ocp.CompositeCheckpointHandler, "finalize", finalize_slowly)
    config = runs.make_config(text, tmp_path, checkpoint_every=0, eval_every=0)
    with (
        runs.signal_when(lambda: runs.last_step(tmp_path) >= 3, signal.SIGINT),
        runs.signal_when(begun.is_set, signal.SIGINT),
        pytest.raises(KeyboardInterrupt),
    ):
        loop.train(config)
    assert not ended.is_set()
    go_on.set()
    assert ended.wait(20)


def test_a_signal_during_garbage_collection_is_remembered(text, tmp_path, monkeypatch, capsys):
    """Python drops exceptions raised there, so the handler of a first signal must not raise."""
    set_up = loop._set_up

    def set_up_and_collect(*args):
        def interrupt(_phase, _info):
            gc.callbacks.remove(interrupt)
            signal.raise_signal(signal.SIGINT)

        gc.callbacks.append(interrupt)
        gc.collect()
        return set_up(*args)

    monkeypatch.setattr(loop, "_set_up", set_up_and_collect)
    loop.train(runs.make_config(text, tmp_path))
    assert "stopped   before the first step" in capsys.readouterr().out
    assert runs.last_step(tmp_path) == 0


@pytest.fixture(params=[signal.default_int_handler, signal.SIG_IGN], ids=["shell", "background"])
def interrupts(request):
    """SIGINT as in a job of an interactive shell, and as in a background job of a script."""
    before = signal.signal(signal.SIGINT, request.param)
    yield
    signal.signal(signal.SIGINT, before)


def test_only_a_second_interrupt_raises(interrupts):
    with Stop() as stop:
        signal.raise_signal(signal.SIGHUP)
        assert not stop.requested
        signal.raise_signal(signal.SIGINT)
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_a_run_continues_when_its_terminal_is_lost(text, tmp_path):
    """A broken ssh connection: the kernel sends SIGHUP, and writing to stdout fails."""
    config = runs.make_config(text, tmp_path / "run", steps=60, eval_every=0, checkpoint_every=0)
    path = runs.write_config(config, tmp_path / "run.json")
    main, terminal = pty.openpty()
    process = subprocess.Popen(
        # Makes `terminal` the controlling terminal of a new session.
        ["setsid", "--ctty", sys.executable, runs.ROOT / "train.py", "--config", path],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "TERM": "xterm-256color"},
    )
    os.close(terminal)
    shown = b""
    while runs.last_step(tmp_path / "run") < 3:  # read, or the terminal's buffer fills up
        assert process.poll() is None, shown
        if select.select([main], [], [], 0.05)[0]:
            shown += os.read(main, 1 << 16)
    os.close(main)
    assert process.wait(60) == 0, shown
    assert runs.last_step(tmp_path / "run") == 60
    assert (tmp_path / "run" / "export" / "model.safetensors").exists()
    assert " exported " in (tmp_path / "run" / "log.txt").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    "mesh",
    [
        {"data": 2, "fsdp": 2, "tensor": 2},
        pytest.param({"fsdp": 4}, marks=pytest.mark.exhaustive),
    ],
)
def test_a_run_resumes_on_another_mesh(text, tmp_path, mesh, assert_close):
    """Losses and weights equal a run on one device to 1e-6."""
    for name, first, then in (("one", {"fsdp": 1}, {"fsdp": 1}), ("two", mesh, {"fsdp": 2})):
        workdir = tmp_path / name
        shape = runs.make_config(text, workdir).model
        shape.architecture = dataclasses.replace(
            shape.architecture, vocab_size=258
        )  # divisible by 2
        options = {"batch_size": 8, "model": shape}
        began = functools.partial(lambda workdir: runs.last_step(workdir) >= 3, workdir)
        with runs.signal_when(began, signal.SIGTERM):
            loop.train(runs.make_config(text, workdir, mesh=MeshConfig(**first), **options))
        assert 3 <= runs.last_step(workdir) < 12
        loop.train(runs.make_config(text, workdir, mesh=MeshConfig(**then), **options))
    for key in ("loss", "eval_loss"):
        one, two = (runs.column(tmp_path / name, key) for name in ("one", "two"))
        assert two == pytest.approx(one, rel=1e-6)
    one, two = (runs.weights(tmp_path / name) for name in ("one", "two"))
    assert_close(two, one, tolerance=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("line", ["model", "dataset", "step"])
def test_a_signal_at_any_stage_of_the_setup_exits_with_status_0(text, tmp_path, line):
    config = runs.make_config(text, tmp_path / "run", eval_every=0)
    process = runs.start(config)
    while f"{line:<9} " not in runs.output_of(config).read_text():
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 0
    assert runs.output_of(config).read_text().endswith("stopped   before the first step\n")
    assert runs.last_step(tmp_path / "run") == 0


@pytest.mark.slow
def test_one_interrupt_exits_with_0_and_a_second_with_130(text, tmp_path):
    for name, status in (("once", 0), ("again and again", 130)):
        config = runs.make_config(
            text, tmp_path / name, steps=10**6, eval_every=0, checkpoint_every=0
        )
        process = runs.start(config)
        runs.wait_for_step(process, config, 3)
        process.send_signal(signal.SIGINT)
        while status and process.poll() is None:
            time.sleep(0.003)
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == status, runs.output_of(config).read_text()
    assert "stopped at once" in runs.output_of(config).read_text()


@pytest.mark.parametrize("is_deleted", [False, True])
def test_the_lock_outlives_its_file(tmp_path, is_deleted):
    with open_workdir(str(tmp_path)):
        if is_deleted:
            (tmp_path / ".lock").unlink()
        holder = "another process" if is_deleted else f"process {os.getpid()} on "
        with (
            pytest.raises(ConfigError, match=f"'{tmp_path}' is in use by {holder}"),
            open_workdir(str(tmp_path)),
        ):
            pytest.fail("two runs in one folder")
    with open_workdir(str(tmp_path)):
        pass


@pytest.mark.slow
def test_the_lock_refuses_a_second_process_until_the_first_is_killed(text, tmp_path):
    config = runs.make_config(text, tmp_path / "run", steps=10**6, eval_every=0)
    first = runs.start(config)
    runs.wait_for_step(first, config, 5)
    output = runs.output_of(config).rename(tmp_path / "first.out")
    second = runs.start(config)
    assert second.wait(60) == 1
    (error,) = runs.output_of(config).read_text().splitlines()
    assert error.startswith(
        f"error: workdir: '{tmp_path}/run' is in use by process {first.pid} on "
    )
    assert first.poll() is None, output.read_text()
    first.kill()
    first.wait()
    stopped = runs.last_step(tmp_path / "run")
    third = runs.start(config)
    runs.wait_for_step(third, config, stopped + 1)
    third.send_signal(signal.SIGTERM)
    assert third.wait(60) == 0, runs.output_of(config).read_text()
