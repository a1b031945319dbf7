"""Damaged checkpoints and full disks."""

import contextlib
import gc
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import CoroutineType

import jax.numpy as jnp
import pytest
import runs
from flax import nnx
from helpers import before_release

import lomo_jax
from lomo_jax.errors import CheckpointError
from lomo_jax.training import Config, log, loop, to_dict
from lomo_jax.training.checkpoint import CheckpointMetadata, Checkpoints, Progress

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


@pytest.fixture(scope="module")
def stopped(text, tmp_path_factory):
    """The workdir of a stopped run that saved a checkpoint every two steps."""
    workdir = tmp_path_factory.mktemp("stopped")
    with runs.signal_when(lambda: runs.last_step(workdir) >= 7, signal.SIGTERM):
        loop.train(_config(text, workdir))
    return workdir


@pytest.fixture(scope="module")
def whole(text, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("whole")
    loop.train(_config(text, workdir))
    return workdir


def _config(text, workdir, **changes):
    fields = {"checkpoint_every": 2, "keep_checkpoints": 3, "keep_best": False, "eval_every": 0}
    fields |= {"optimizer": "adamw"}  # so that a checkpoint is three times as large as an export
    return runs.make_config(text, workdir, **fields | changes)


def _steps(workdir: Path) -> list[int]:
    folder = workdir / "checkpoints"
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _largest(checkpoint: Path, item: str) -> Path:
    return max((checkpoint / item).rglob("d/*"), key=lambda path: path.stat().st_size)


def _truncate(checkpoint: Path) -> None:
    file = _largest(checkpoint, "params")
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])


def _flip_a_bit(checkpoint: Path) -> None:
    file = _largest(checkpoint, "optimizer")
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 4
    file.write_bytes(content)


def _empty_the_metadata(checkpoint: Path) -> None:
    (checkpoint / "metadata" / "metadata").write_text("")


def _remove_an_item(checkpoint: Path) -> None:
    shutil.rmtree(checkpoint / "optimizer")


def _leave_half_of_a_new_one(checkpoint: Path) -> None:
    """Leaves the folder as a process killed during the save does."""
    half = checkpoint.with_name(f"{checkpoint.name}.orbax-checkpoint-tmp")
    checkpoint.rename(half)
    shutil.rmtree(half / "optimizer")


def _garble_what_orbax_notes(checkpoint: Path) -> None:
    (checkpoint / "_CHECKPOINT_METADATA").write_text("{")
    (checkpoint / "metrics").mkdir()
    (checkpoint / "metrics" / "metrics").write_text("")
    _truncate(checkpoint)


@pytest.mark.parametrize(
    "damage",
    [
        _truncate,
        _flip_a_bit,
        before_release(_empty_the_metadata),
        before_release(_remove_an_item),
        _garble_what_orbax_notes,
        _leave_half_of_a_new_one,
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(
    text, stopped, whole, tmp_path, capsys, damage
):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    *_, before, last = _steps(workdir)
    damage(workdir / "checkpoints" / str(last))
    loop.train(_config(text, workdir))
    output = capsys.readouterr()
    assert f"resumed   after step {before} of 12" in output.out
    assert "Traceback" not in output.err
    if damage is _leave_half_of_a_new_one:
        assert not list((workdir / "checkpoints").glob("*tmp*"))
    else:
        assert f"warning   {workdir}/checkpoints/{last} is damaged: " in output.out
        assert (workdir / "checkpoints" / f"{last}.damaged").is_dir()
    assert _steps(workdir) == [8, 10, 12]
    runs.assert_same_run(workdir, whole)


def test_if_all_checkpoints_are_damaged_the_run_stops_and_changes_no_file(text, stopped, tmp_path):
    workdir = tmp_path / "run"
    shutil.copytree(stopped, workdir)
    for step in _steps(workdir):
        _truncate(workdir / "checkpoints" / str(step))
    before = _contents(workdir)
    listed = ", ".join(str(step) for step in reversed(_steps(workdir)))
    with pytest.raises(CheckpointError, match=f"no readable checkpoint among the steps {listed}"):
        loop.train(_config(text, workdir))
    assert _contents(workdir) == before


def _contents(workdir: Path) -> dict[Path, bytes]:
    files = (path for path in workdir.rglob("*") if path.is_file() and path.name != ".lock")
    return {path: path.read_bytes() for path in files}


def test_the_latest_checkpoints_and_the_best_are_preserved(text, tmp_path):
    fields = {"optimizer": "lion", "learning_rate": 0.3, "schedule": "constant", "eval_every": 3}
    loop.train(_config(text, tmp_path, keep_checkpoints=2, keep_best=True, **fields))
    losses = runs.column(tmp_path, "eval_loss")
    del losses[0]
    best = min(losses, key=losses.get)
    assert best < 10, "the test is about a best one that is not among the last"
    assert _steps(tmp_path) == [best, 10, 12]


def test_a_resumed_run_that_keeps_no_best_one(text, tmp_path):
    fields = {"keep_checkpoints": 1, "checkpoint_every": 3, "eval_every": 3, "schedule": "constant"}
    loop.train(_config(text, tmp_path, steps=6, **fields))
    loop.train(_config(text, tmp_path, steps=12, **fields))
    assert _steps(tmp_path) == [12]


def test_the_best_checkpoint_stays_if_writing_a_better_one_fails(tmp_path):
    warnings = []
    with Checkpoints(tmp_path / "checkpoints", keep=1, warn=warnings.append) as checkpoints:
        checkpoints.start_anew()
        _save(checkpoints, step=1, best=1)
        _save(checkpoints, step=2, best=1)
        assert checkpoints.steps() == [2, 1]
        with _files_of_at_most(1000):
            _save(checkpoints, step=3, best=3)
        assert warnings == [
            "the checkpoint of step 3 was not written, a file may not become so large; the last "
            "good one is of step 2"
        ]
        _save(checkpoints, step=4, best=3)
        assert checkpoints.steps() == [4, 1]
    # The same holds after a restart.
    with Checkpoints(tmp_path / "checkpoints", keep=1) as checkpoints:
        checkpoints.restore(checkpoints.metadata(4), *_arrays(4))
        _save(checkpoints, step=5, best=3)
        assert checkpoints.steps() == [5, 1]
        _save(checkpoints, step=6, best=6)
        assert checkpoints.steps() == [6]


def test_a_deleted_folder_of_checkpoints_is_made_again(tmp_path):
    warnings, folder = [], tmp_path / "checkpoints"
    with Checkpoints(folder, warn=warnings.append) as checkpoints:
        checkpoints.start_anew()
        _save(checkpoints, step=1, best=1)
        shutil.rmtree(folder)
        _save(checkpoints, step=2, best=1)
        assert checkpoints.steps() == [2]
        assert checkpoints.last == 2
    assert warnings == [f"{folder} was deleted while the run went on, with its checkpoints"]
    with Checkpoints(folder) as checkpoints:
        assert checkpoints.metadata(2).progress.step == 2


@pytest.mark.parametrize("how", ["deleted", before_release("moved"), "replaced"])
def test_a_run_whose_folder_disappears_ends_with_a_line(text, tmp_path, monkeypatch, how):
    workdir, elsewhere = tmp_path / "run", tmp_path / "elsewhere"
    record = log.Recorder.step

    def step(self, number, *outputs):
        record(self, number, *outputs)
        if number == 6:  # the checkpoint of step 4 is being written, or complete
            time.sleep(1)
            shutil.rmtree(workdir) if how == "deleted" else workdir.rename(elsewhere)
            if how == "replaced":
                (workdir / "checkpoints").mkdir(parents=True)

    monkeypatch.setattr(log.Recorder, "step", step)
    config = _config(text, workdir, checkpoint_every=4)
    with pytest.raises(CheckpointError, match=f"{workdir} was deleted or moved while") as caught:
        loop.train(config)
    assert "\n" not in str(caught.value)
    assert not list(workdir.rglob("*/*"))
    if how != "deleted":
        assert _steps(elsewhere) == [4]
        monkeypatch.undo()
        loop.train(_config(text, elsewhere))
        assert [r["step"] for r in runs.records(elsewhere) if "resumed" in r] == [4]


def test_no_coroutine_of_a_failed_save_survives_close(tmp_path):
    """Python would warn when it collects the coroutine; an error may hold it until then."""
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.start_anew()
        _save(checkpoints, step=1, best=1)
        with _files_of_at_most(1000):
            _save(checkpoints, step=2, best=2)
    assert not _of_orbax(), checkpoints


def test_no_coroutine_of_a_failed_read_survives_close(tmp_path):
    with Checkpoints(tmp_path / "checkpoints") as checkpoints:
        checkpoints.start_anew()
        _save(checkpoints, step=1, best=1)
        _truncate(tmp_path / "checkpoints" / "1")
        with pytest.raises(CheckpointError) as error:
            checkpoints.restore(checkpoints.metadata(1), *_arrays(1))
    assert not _of_orbax(), (checkpoints, error)


def _of_orbax() -> list[CoroutineType]:
    """Returns the live coroutines of orbax."""
    # Not isinstance: it reads `__class__`, which warns for an object of torch.
    found = [each for each in gc.get_objects() if type(each) is CoroutineType]
    return [each for each in found if "orbax" in each.cr_code.co_filename]


def _arrays(step: int) -> tuple[nnx.State, lomo_jax.StepState]:
    params = nnx.State({"w": nnx.Param(jnp.arange(2048.0) + step)})
    return params, lomo_jax.StepState({"w": jnp.zeros(3)}, None, None)


def _save(checkpoints: Checkpoints, step: int, best: int) -> None:
    progress = Progress(step=step, best=1 / step, best_step=best)
    metadata = CheckpointMetadata(progress, to_dict(Config(param_dtype="float32")), "text", {})
    assert checkpoints.save(*_arrays(step), metadata)
    checkpoints.wait()


@contextlib.contextmanager
def _files_of_at_most(size: int) -> Iterator[None]:
    """Limits the size of files of this process, as a quota does."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


_STOP = "& until grep -q {at!r} {output} || ! kill -0 $!; do sleep 0.1; done; kill $!; wait $!"
_ON_A_SMALL_DISK = """
mount -t tmpfs -o size={kib}k none {disk} || exit
{command} > {output} {stop}
status=$?
cp -r {disk}/. {copy}
exit $status
"""


def _run_on_a_small_disk(
    config: Config, folder: Path, kib: int, stop_at: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Runs with a file system of `kib` KiB at `folder / "disk"`; copies it to `folder / "copy"`.

    Sends SIGTERM when the run prints `stop_at`.
    """
    disk, copy = folder / "disk", folder / "copy"
    output = folder / "output.txt"
    disk.mkdir()
    copy.mkdir()
    path = runs.write_config(config, folder / "config.json")
    command = f"{sys.executable} {runs.ROOT / 'train.py'} --config {path}"
    stop = "" if stop_at is None else _STOP.format(at=stop_at, output=output)
    script = _ON_A_SMALL_DISK.format(
        kib=kib, disk=disk, command=command, output=output, stop=stop, copy=copy
    )
    unshare = ["unshare", "--map-root-user", "--mount", "sh", "-c"]
    if subprocess.run([*unshare, f"mount -t tmpfs none {disk}"], check=False).returncode:
        pytest.skip("no file system can be mounted here")
    result = subprocess.run(
        [*unshare, script],
        stderr=subprocess.PIPE,
        text=True,
        check=False,
        env={**os.environ, "JAX_PLATFORMS": "cpu"},
    )
    result.stdout = output.read_text()
    return result


@pytest.mark.slow
def test_a_full_disk_preserves_the_last_good_checkpoint(text, whole, tmp_path):
    config = _config(text, tmp_path / "disk" / "run", keep_checkpoints=1)
    # Room for the export (164 KiB), the run's other files (44 KiB) and one checkpoint, but not two:
    # a checkpoint has 570 to 610 KiB, depending on how orbax's threads batch their writes.
    result = _run_on_a_small_disk(config, tmp_path, 1000)
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning   the checkpoint of step {step} was not written, the disk is full; the last good "
        "one is of step 2"
        for step in (4, 6, 8, 10, 12)
    ]
    copy = tmp_path / "copy" / "run"
    runs.assert_same_run(copy, whole)
    assert _steps(copy) == [2]
    assert not list((copy / "checkpoints").glob("*tmp*"))
    shutil.rmtree(copy / "export")
    loop.train(_config(text, copy))
    assert [r["step"] for r in runs.records(copy) if "resumed" in r] == [2]
    runs.assert_same_run(copy, whole)


@pytest.mark.slow
def test_a_file_size_limit_fails_the_run_only_at_its_export(text, tmp_path):
    """Like a full disk, for machines that do not allow mounts."""
    config = _config(text, tmp_path / "run")
    path = runs.write_config(config, tmp_path / "config.json")
    command = f"ulimit -f 50; exec {sys.executable} {runs.ROOT / 'train.py'} --config {path}"
    result = subprocess.run(
        ["bash", "-c", command],  # bash: its ulimit counts KiB
        capture_output=True,
        text=True,
        check=False,
        # The limit counts for JAX's compilation cache too, which would warn.
        env={**os.environ, "JAX_PLATFORMS": "cpu", "JAX_ENABLE_COMPILATION_CACHE": "false"},
    )
    warnings = [line for line in result.stdout.splitlines() if line.startswith("warning")]
    assert warnings == [
        f"warning   the checkpoint of step {step} was not written, a file may not become so large; "
        "there is none yet"
        for step in (2, 4, 6, 8, 10, 12)
    ]
    assert result.returncode == 1
    assert result.stderr.startswith(f"error: {tmp_path / 'run' / 'export'} was not written: ")
    assert result.stderr.count("\n") == 1
    assert runs.last_step(tmp_path / "run") == 12


@pytest.mark.slow
def test_a_stopped_run_that_cannot_save_reports_it(text, tmp_path):
    config = _config(text, tmp_path / "disk" / "run", steps=10**6, log_every=1000)
    result = _run_on_a_small_disk(config, tmp_path, 300, stop_at="was not written")
    assert result.returncode == 1
    *_, error = result.stderr.splitlines()
    assert re.fullmatch(
        r"error: stopped after step \d+, which could not be saved; there is no checkpoint; make "
        rf"room on the disk of '{config.workdir}'",
        error,
    )
