"""Resuming a run: finds the checkpoint, checks that it fits the config, and reads it.

A run starts from the first of these that exists:

1. the last intact checkpoint in `workdir`, unless `resume` is "never";
2. the weights at `model.path`: a Hugging Face directory, a .gguf file, or another run's checkpoint;
3. random weights, if `model.init` is "random".
"""

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flax import nnx

import lomo_jax
from lomo_jax.errors import CheckpointError, ConfigError
from lomo_jax.training import workdir as workdir_lib
from lomo_jax.training.checkpoint import CheckpointMetadata, Checkpoints
from lomo_jax.training.log import Display

# Fields that must not change: weights, optimizer state or position in the dataset would no longer
# fit. The dataset itself is compared by its fingerprint.
IDENTITY_FIELDS = (
    *("model", "optimizer", "optimizer_kwargs", "param_dtype", "seed"),
    *("batch_size", "sequence_length", "data.eval_fraction"),
)
# Changes of these are not logged: they do not affect the result.
SILENT_FIELDS = ("workdir", "resume", "data.path", "data.text_key", "wandb")


def find_checkpoint(
    checkpoints: Checkpoints, config: dict[str, Any], display: Display, before: int | None = None
) -> CheckpointMetadata | None:
    """Returns the metadata of the last readable checkpoint; None for a new run.

    Args:
      checkpoints: The checkpoints of the workdir.
      config: The config of the run, from `config.to_dict`.
      display: Warns about damaged checkpoints.
      before: Ignore checkpoints from this step on.

    Raises:
      ConfigError: There is none and `resume` is "must", or it belongs to another run.
      CheckpointError: There are checkpoints, and all are damaged.
    """
    steps = [] if config["resume"] == "never" else checkpoints.steps()
    if not steps:
        if config["resume"] == "must":
            raise ConfigError(
                f"resume: 'must', but {config['workdir']!r} has no checkpoint; set "
                "--config.workdir to that of the run, or --config.resume=auto to start one"
            )
        return None
    for step in steps:
        if before is not None and step >= before:
            continue
        try:
            metadata = checkpoints.metadata(step)
        except CheckpointError as error:
            display.warn(f"{error}; trying the previous one")
            continue
        check_same_run(metadata.config, config)
        if step > config["steps"]:
            raise ConfigError(
                f"steps: {config['steps']}, but the checkpoint in {config['workdir']!r} is of step "
                f"{step}; raise it, or export that step with lomo-jax export"
            )
        return metadata
    raise CheckpointError(
        f"{config['workdir']!r} has no readable checkpoint among the steps "
        f"{', '.join(map(str, steps))}; start anew with --config.resume=never, which moves "
        "them aside, or in another --config.workdir"
    )


def restore(
    checkpoints: Checkpoints,
    metadata: CheckpointMetadata,
    config: dict[str, Any],
    params: nnx.State,
    state: lomo_jax.StepState,
    display: Display,
) -> tuple[CheckpointMetadata, nnx.State, lomo_jax.StepState]:
    """Reads a checkpoint, or the last intact one before it, and logs changes of the config.

    Args:
      checkpoints: The checkpoints of the workdir.
      metadata: The metadata from `find_checkpoint`.
      config: The config of the run, from `config.to_dict`.
      params: The parameters as `jax.ShapeDtypeStruct` with shardings.
      state: The state of the step as `jax.ShapeDtypeStruct` with shardings.
      display: Logs the changes and warns about damaged checkpoints.

    Returns:
      The metadata of the checkpoint that was read, the parameters, and the state. Parts of the
      state that the caller must initialise are None.

    Raises:
      CheckpointError: All checkpoints are damaged.
    """
    while True:
        try:
            restored, restored_state = checkpoints.restore(metadata, params, state)
            break
        except CheckpointError as error:
            display.warn(f"{error}; trying the previous one")
            previous = find_checkpoint(checkpoints, config, display, metadata.progress.step)
            assert previous is not None, "there are checkpoints"
            metadata = previous
    if metadata.config["dynamic_loss_scale"] != config["dynamic_loss_scale"]:
        restored_state = restored_state._replace(loss_scale=None)  # skip_nonfinite's is always 1
    progress = metadata.progress
    if metadata.config["eval_batches"] != config["eval_batches"]:
        progress.best = progress.best_step = None  # losses on other batches cannot be compared
    damaged = [step for step in checkpoints.steps() if step > progress.step]
    if damaged:
        checkpoints.set_aside(damaged)
    for change in changes(metadata, config):
        display.line("changed", change)
    display.line("resumed", f"after step {progress.step} of {config['steps']}")
    return metadata, restored, restored_state


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


def check_same_dataset(
    metadata: CheckpointMetadata, config: dict[str, Any], fingerprint: str
) -> None:
    """Raises ConfigError if the dataset is not the one of the checkpoint."""
    if fingerprint == metadata.dataset:
        return
    before, now = metadata.config["data"], config["data"]
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


def changes(metadata: CheckpointMetadata, config: dict[str, Any]) -> list[str]:
    """Returns a line for each field that has changed since the checkpoint."""
    return [
        f"{name}: {before!r} until step {metadata.progress.step}, now {now!r}"
        for name, (before, now) in _differences(metadata.config, config).items()
        if name not in SILENT_FIELDS
    ]


def check_start(model_path: str | None, workdir: Path) -> None:
    """Raises ConfigError if a new run would move its own initial weights aside."""
    if model_path is not None and workdir_lib.is_inside(model_path, workdir):
        raise ConfigError(
            f"model.path: {model_path!r} is in the workdir of this run, which starts anew and "
            "moves the earlier files aside; set another --config.workdir"
        )


def _differences(saved: dict[str, Any], config: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Returns name -> (saved, now) for each field of both configs that differs."""

    def compare(before: dict[str, Any], now: dict[str, Any], prefix: str) -> Iterator[Any]:
        for key in before.keys() & now.keys():
            name, old, new = prefix + key, before[key], now[key]
            if isinstance(old, dict) and isinstance(new, dict) and key != "optimizer_kwargs":
                yield from compare(old, new, f"{name}.")
            elif _absolute(name, old) != _absolute(name, new):
                yield name, (old, new)

    found = dict(compare(saved, json.loads(json.dumps(config)), ""))  # tuples become lists
    return {name: found[name] for name in sorted(found)}


def _absolute(name: str, value: Any) -> Any:
    """Returns a path as an absolute one, and any other value as it is."""
    return os.path.abspath(os.path.expanduser(value)) if name.endswith("path") and value else value
