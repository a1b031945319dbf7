"""What a run starts from: its folder, which it locks, and a checkpoint that fits the config.

A run starts from the first of these that exists:

1. the last intact checkpoint in `workdir`, unless `resume` is "never";
2. the weights at `model.path`: a Hugging Face directory, a .gguf file, or another run's checkpoint;
3. random weights, if `model.init` is "random".
"""

import contextlib
import fcntl
import itertools
import json
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import jax
from flax import nnx

import lomo_jax
from lomo_jax import models, run_files
from lomo_jax._lock import lock_folder
from lomo_jax.errors import CheckpointError, ConfigError, os_errors_are_the_users
from lomo_jax.training.checkpoint import CheckpointMetadata, Checkpoints, Progress
from lomo_jax.training.log import Display
from lomo_jax.training.step import CompiledStep

_LOCK = ".lock"
_MOVING = ".earlier"  # files being moved to `earlier-1`

# Fields that must not change: weights, optimizer state or position in the dataset would no longer
# fit. The dataset itself is compared by its fingerprint.
IDENTITY_FIELDS = (
    *("model", "optimizer", "optimizer_kwargs", "decay_mask", "param_dtype", "seed"),
    *("batch_size", "sequence_length", "data.eval_fraction", "data.eval_documents"),
    *("data.packing", "data.too_long", "data.repeated"),
    *("lora.rank", "lora.alpha", "lora.targets", "lora.rank_stabilized"),
    *("lora.base", "lora.base_kwargs", "lora.quantize"),
)
# Changes of these are not logged: they do not affect the result.
SILENT_FIELDS = (
    "lora.path",
    *("workdir", "resume", "wandb", "data.path", "data.validation_path", "data.format"),
    *("data.text_key", "data.template", "data.train_on", "data.special_tokens"),
)


@contextlib.contextmanager
def open_workdir(name: str) -> Iterator[Path]:
    """Creates the folder of a run, and locks it against other runs.

    It completes a move to `earlier-1` that was interrupted. The first process holds the lock for
    all: one on the folder, which nobody can delete, and one on the file `.lock`, which also works
    on NFS and names the holder. Written by hand so that the error can name it.

    Raises:
      ConfigError: The folder cannot be written, or another run holds the lock.
    """
    workdir = Path(name).expanduser().absolute()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir: {name!r} cannot be written: {error.strerror}; set --config.workdir"
        ) from error
    if jax.process_index() > 0:
        yield workdir
        return
    with contextlib.ExitStack() as stack:
        with os_errors_are_the_users():
            file = stack.enter_context((workdir / _LOCK).open("a+"))
        _lock(stack, file, workdir)
        if (workdir / _MOVING).exists():
            set_aside(workdir)  # an earlier process was killed during the move
        yield workdir


def _lock(stack: contextlib.ExitStack, file: TextIO, workdir: Path) -> None:
    try:
        stack.enter_context(lock_folder(workdir))
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.seek(0)
        holder = file.read().strip() or "another process"
        raise ConfigError(
            f"workdir: {str(workdir)!r} is in use by {holder}; wait for that run or stop it, "
            "or set another --config.workdir"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"workdir: {str(workdir)!r} is on a file system that cannot lock files: "
            f"{error.strerror}; set another --config.workdir"
        ) from error
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()


def find_checkpoint(
    workdir: Path, checkpoints: Checkpoints, config: dict[str, Any], display: Display
) -> CheckpointMetadata | None:
    """Returns the metadata of the last readable checkpoint; None for a new run.

    Args:
      workdir: The folder, from `open_workdir`.
      checkpoints: The checkpoints in it.
      config: The config of the run, from `config.to_dict`.
      display: Warns about damaged checkpoints.

    Raises:
      ConfigError: There is none and `resume` is "must", or it belongs to another run. A new run
        would overwrite files that no run has written, or move its own initial weights aside.
      CheckpointError: There are checkpoints, and all are damaged.
      UserError: The run could not replace its earlier export.
    """
    steps = [] if config["resume"] == "never" else checkpoints.steps()
    if steps:
        metadata = _last_readable(steps, checkpoints, config, display)
        with os_errors_are_the_users():  # now, and not only after the training
            models.check_save_path(workdir / run_files.EXPORT)
        return metadata
    if config["resume"] == "must":
        raise ConfigError(
            f"resume: 'must', but {config['workdir']!r} has no checkpoint; set "
            "--config.workdir to that of the run, or --config.resume=auto to start one"
        )
    _check_new(workdir, config["model"]["path"])
    return None


def _last_readable(
    steps: list[int], checkpoints: Checkpoints, config: dict[str, Any], display: Display
) -> CheckpointMetadata:
    """Returns the metadata of the first of `steps` that is readable."""
    for step in steps:
        try:
            metadata = checkpoints.metadata(step)
        except CheckpointError as error:
            display.warn(f"{error}; trying the previous one")
            continue
        check_same_run(metadata.config, config)
        return metadata
    raise CheckpointError(
        f"{config['workdir']!r} has no readable checkpoint among the steps "
        f"{', '.join(map(str, checkpoints.steps()))}; start anew with --config.resume=never, which "
        "moves them aside, or in another --config.workdir"
    )


def check_same_run(saved: dict[str, Any], config: dict[str, Any]) -> None:
    """Raises ConfigError, with both values, if one of `IDENTITY_FIELDS` differs.

    Args:
      saved: The config in the checkpoint.
      config: The config of the run.
    """
    for name, (before, now) in _differences(saved, config).items():
        if any(name == own or name.startswith(f"{own}.") for own in IDENTITY_FIELDS):
            raise ConfigError(
                f"{name}: {now!r}, but the checkpoint in {config['workdir']!r} is of a run with "
                f"{before!r}; set it back, or use another --config.workdir"
            )


def check_steps(metadata: CheckpointMetadata, config: dict[str, Any]) -> None:
    """Raises ConfigError if the checkpoint is of a later step than the last one of the run."""
    step = metadata.progress.step
    if step > config["steps"]:
        raise ConfigError(
            f"steps: {config['steps']}, but the checkpoint in {config['workdir']!r} is of step "
            f"{step}; raise it, or export that step with lomo-jax export"
        )


def check_same_dataset(
    metadata: CheckpointMetadata, config: dict[str, Any], fingerprint: str
) -> None:
    """Raises ConfigError if the dataset is not the one of the checkpoint."""
    if fingerprint == metadata.dataset:
        return
    # A checkpoint has lists where a config has tuples.
    before, now = json.loads(json.dumps([metadata.config["data"], config["data"]]))
    name = next((key for key in before if before[key] != now.get(key)), None)
    if name is None:
        what = f"data.path: the dataset at {now['path']!r} has changed since the checkpoint"
    else:
        what = (
            f"data.{name}: {now[name]!r} is another dataset than {before[name]!r} of the checkpoint"
        )
    workdir = config["workdir"]
    raise ConfigError(
        f"{what} in {workdir!r}, and the position of the run in it is lost; restore the dataset, "
        f"or start another run in another --config.workdir with --config.model.path={workdir} "
        "--config.model.init=checkpoint"
    )


def check_same_base(metadata: CheckpointMetadata, base: list[int] | None, model: str) -> None:
    """Raises ConfigError if the frozen weights are not those that the adapters were trained on.

    Args:
      metadata: The metadata of the checkpoint.
      base: The checksums of the frozen weights.
      model: Where they are from.
    """
    if metadata.base != base:
        raise ConfigError(
            f"model.path: the weights of {model} are not those that the run started from; restore "
            "them, or use another --config.workdir"
        )


def restore(
    checkpoints: Checkpoints,
    metadata: CheckpointMetadata,
    config: dict[str, Any],
    params: nnx.State,
    step: CompiledStep,
    display: Display,
    base: nnx.State | None = None,
) -> tuple[Progress, nnx.State, lomo_jax.StepState]:
    """Reads a checkpoint, or the last intact one before it, and logs changes of the config.

    Args:
      checkpoints: The checkpoints of the workdir.
      metadata: The metadata from `find_checkpoint`.
      config: The config of the run, from `config.to_dict`.
      params: The parameters in the checkpoint as `jax.ShapeDtypeStruct` with shardings.
      step: The step, which initialises the parts of its state that the checkpoint lacks.
      display: Logs the changes and warns about damaged checkpoints.
      base: The parameters that the checkpoint lacks, if it holds adapters alone.

    Returns:
      The progress, the parameters and the state of the step.

    Raises:
      CheckpointError: All checkpoints are damaged.
    """
    while True:
        try:
            restored, state = checkpoints.restore(metadata, params, step.state)
            if base is not None:
                restored = nnx.merge_state(restored, base)
            break
        except CheckpointError as error:
            display.warn(f"{error}; trying the previous one")
            earlier = [step for step in checkpoints.steps() if step < metadata.progress.step]
            metadata = _last_readable(earlier, checkpoints, config, display)
    if metadata.config["dynamic_loss_scale"] != config["dynamic_loss_scale"]:
        state = state._replace(loss_scale=None)  # skip_nonfinite's is always 1
    progress = metadata.progress
    compared = ("eval_batches", "eval_tasks", "eval_examples", "keep_best")
    saved, now = json.loads(json.dumps([metadata.config, config]))
    if any(saved.get(name, now[name]) != now[name] for name in compared):
        progress.best = progress.best_step = None  # other metrics cannot be compared
    damaged = [step for step in checkpoints.steps() if step > progress.step]
    if damaged:
        checkpoints.set_aside(damaged)
    for change in changes(metadata, config):
        display.line("changed", change)
    display.line("resumed", f"after step {progress.step} of {config['steps']}")
    return progress, restored, step.init_missing(state, restored)


def changes(metadata: CheckpointMetadata, config: dict[str, Any]) -> list[str]:
    """Returns a line for each field that has changed since the checkpoint."""
    return [
        f"{name}: {before!r} until step {metadata.progress.step}, now {now!r}"
        for name, (before, now) in _differences(metadata.config, config).items()
        if name not in SILENT_FIELDS
    ]


def _differences(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns name -> (saved, now) for each field of both configs that differs."""

    def compare(before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[Any]:
        for key in before.keys() & now.keys():
            name, old, new = prefix + key, before[key], now[key]
            if (
                isinstance(old, dict)
                and isinstance(new, dict)
                and key not in ("optimizer_kwargs", "base_kwargs", "path")
            ):
                yield from compare(old, new, f"{name}.")
            elif _absolute(name, old) != _absolute(name, new):
                yield name, (old, new)

    # A checkpoint has lists where a config has tuples.
    saved, config = (json.loads(json.dumps(each)) for each in (saved, config))
    found = dict(compare(saved, config, ""))
    return {name: found[name] for name in sorted(found)}


def _absolute(name: str, value: Any) -> Any:
    """Returns a path as an absolute one, and any other value as it is."""
    is_path = name.endswith("path") and isinstance(value, str)
    return os.path.abspath(os.path.expanduser(value)) if is_path else value


def _check_new(workdir: Path, model_path: str | None) -> None:
    found = [name for name in run_files.ALL if not _is_empty(workdir / name)]
    is_of_a_run = run_files.RUN in found or run_files.CHECKPOINTS in found
    if not is_of_a_run and set(found) - {run_files.EXPORT}:
        raise ConfigError(
            f"workdir: {str(workdir)!r} is not that of a run, and a run would overwrite "
            f"{', '.join(found)} there; set another --config.workdir"
        )
    if model_path is not None and run_files.contains(workdir, model_path):
        raise ConfigError(
            f"model.path: {model_path!r} is in the workdir of this run, which starts anew and "
            "moves the earlier files aside; set another --config.workdir"
        )


def set_aside(workdir: Path) -> Path | None:
    """Moves the files of an earlier run to a new folder, `earlier-1` and so on.

    A run with neither a checkpoint nor an export stays; the new run starts over in its place.

    Returns:
      The new folder; None if nothing was moved.
    """
    moving = workdir / _MOVING
    is_new = all(_is_empty(workdir / name) for name in (run_files.CHECKPOINTS, run_files.EXPORT))
    if is_new and not moving.exists():
        return None
    # Renamed to `earlier-1` last, so that `earlier-1` is always complete.
    moving.mkdir(exist_ok=True)
    for name in run_files.ALL:
        if not _is_empty(workdir / name):
            (workdir / name).rename(moving / name)
    numbered = (workdir / f"earlier-{number}" for number in itertools.count(1))
    aside = next(folder for folder in numbered if not folder.exists())
    moving.rename(aside)
    return aside


def _is_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
