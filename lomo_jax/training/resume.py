"""Where a run starts.

There are three places, tried in this order:

1. the last whole checkpoint in `workdir`, unless `resume` is "never";
2. the weights at `model.path`: a Hugging Face directory, a .gguf file, or another run's checkpoint;
3. random weights, if `model.init` is "random".
"""

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from lomo_jax.errors import CheckpointError, ConfigError
from lomo_jax.training import workdir as workdir_lib
from lomo_jax.training.checkpoint import Checkpoints, Facts
from lomo_jax.training.config import Config, to_dict

# With another value of these a run would not be the same: its weights, state or position in the
# text would mean something else. The text itself is compared by its fingerprint.
_OF_THE_RUN = (
    *("model", "optimizer", "optimizer_kwargs", "param_dtype", "seed"),
    *("batch_size", "sequence_length", "data.eval_fraction"),
)
# Where things lie, and how often a person is told: nothing that comes of it.
_UNTOLD = ("workdir", "resume", "data.path", "data.text_key", "wandb")


def candidates(
    config: Config, checkpoints: Checkpoints, warn: Callable[[str], None]
) -> Iterator[Facts]:
    """Yields the checkpoints to go on from, the last one first.

    A damaged one is told to `warn` and passed over.

    Raises:
      ConfigError: There is none and has to be, or the config is of another run.
      CheckpointError: There are some, and the caller could use none.
    """
    steps = [] if config.resume == "never" else checkpoints.steps()
    if not steps and config.resume == "must":
        raise ConfigError(
            f"resume: 'must', but {config.workdir!r} has no checkpoint; set --config.workdir to "
            "that of the run, or --config.resume=auto to start one"
        )
    for step in steps:
        try:
            facts = checkpoints.facts(step)
        except CheckpointError as error:
            warn(f"{error}; trying the one before")
            continue
        check_same_run(facts.config, config)
        if step > config.steps:
            raise ConfigError(
                f"steps: {config.steps}, but the checkpoint in {config.workdir!r} is of step "
                f"{step}; raise it, or export that step with lomo-jax export"
            )
        yield facts
    if steps:
        raise CheckpointError(
            f"{config.workdir!r} has no checkpoint that can be read, of steps "
            f"{', '.join(map(str, steps))}; start anew with --config.resume=never, which moves "
            "them aside, or in another --config.workdir"
        )


def check_same_run(saved: dict[str, Any], config: Config) -> None:
    """Raises ConfigError, with both values, if a checkpoint is of another model, optimizer or data.

    Args:
      saved: The config of the checkpoint.
      config: That of the run.
    """
    for name, (before, now) in _differences(saved, config).items():
        if any(name == own or name.startswith(f"{own}.") for own in _OF_THE_RUN):
            raise ConfigError(
                f"{name}: {now!r}, but the checkpoint in {config.workdir!r} is of a run with "
                f"{before!r}; set it back, or another --config.workdir for another run"
            )


def check_same_text(facts: Facts, config: Config, fingerprint: str) -> None:
    """Raises ConfigError if the text is not what the checkpoint was trained on."""
    if fingerprint == facts.text:
        return
    before, now = facts.config["data"], to_dict(config)["data"]
    name = next((f"data.{key}" for key in before if before[key] != now.get(key)), None)
    if name is None:
        what = f"data.path: the text at {now['path']!r} has changed since the checkpoint"
    else:
        key = name.removeprefix("data.")
        what = f"{name}: {now[key]!r} is other text than {before[key]!r}, that of the checkpoint"
    raise ConfigError(
        f"{what} in {config.workdir!r}: the place of the run in it is lost; bring it back, or "
        "start another run, in another --config.workdir, with "
        f"--config.model.path={config.workdir} --config.model.init=checkpoint"
    )


def changes(facts: Facts, config: Config) -> list[str]:
    """Says what else is set to other values than in the checkpoint, one line each."""
    return [
        f"{name}: {before!r} until step {facts.progress.step}, now {now!r}"
        for name, (before, now) in _differences(facts.config, config).items()
        if name not in _UNTOLD
    ]


def check_start(config: Config, workdir: Path) -> None:
    """Raises ConfigError if a new run would move aside the weights that it starts from."""
    path = config.model.path
    if path is not None and workdir_lib.is_inside(path, workdir):
        raise ConfigError(
            f"model.path: {path!r} lies in the workdir of this run, which starts anew and moves "
            "aside what is there; set another --config.workdir"
        )


def _differences(saved: dict[str, Any], config: Config) -> dict[str, tuple[Any, Any]]:
    """Returns (saved, now) of each field that both have and that differs, by name."""
    as_saved = json.loads(json.dumps(to_dict(config)))  # which turns a tuple into a list
    before, now = _flat(saved), _flat(as_saved)
    return {
        name: (before[name], now[name])
        for name in before
        if name in now and _absolute(name, before[name]) != _absolute(name, now[name])
    }


def _absolute(name: str, value: Any) -> Any:
    """Returns a path in the one way to write it, and every other value as it is."""
    return os.path.abspath(os.path.expanduser(value)) if name.endswith("path") and value else value


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat = {}
    for key, value in tree.items():
        if isinstance(value, dict) and key != "optimizer_kwargs":
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[prefix + key] = value
    return flat
