"""Checkpoints of a run, by orbax: written beside the training, as a whole or not at all."""

import contextlib
import dataclasses
import gc
import itertools
import logging
import shutil
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

import lomo_jax
from lomo_jax.training import workdir
from lomo_jax.training.checksums import checksums
from lomo_jax.training.errors import CheckpointError

_PARTIAL = ".orbax-checkpoint-tmp"  # what orbax appends to the name of a folder until it is whole
_EVAL_LOSS = "eval_loss"


@dataclasses.dataclass
class Progress:
    """Where a run is, apart from its arrays."""

    step: int = 0  # steps made
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # position in the text, of grain
    evaluated: int = -1  # the step of the last evaluation; -1 before the first
    best: float | None = None  # the lowest held-out loss so far
    skipped: int = 0  # updates skipped because loss or gradient was not finite
    skipped_in_a_row: int = 0  # the last of them that had no other cause than that


@dataclasses.dataclass
class Facts:
    """What a checkpoint says beside its arrays, as JSON."""

    progress: Progress
    config: dict[str, Any]  # as of `config.to_dict`
    text: str  # fingerprint of the documents and tokens that the position counts
    checksums: dict[str, list[int]]  # of the leaves of each item


class Checkpoints:
    """The checkpoints in a folder; use as a context, which waits for the one being written.

    Each has the items `params`, `optimizer`, where there are such `loss_scale` and `rounding`, and
    `facts`. Of several processes, which must all call everything here, each writes and reads its
    part of the arrays.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep: int = 1,
        keep_best: bool = True,
        warn: Callable[[str], None] = lambda text: None,
        read_only: bool = False,
    ) -> None:
        """Opens the folder.

        Args:
          folder: Made with the first checkpoint.
          keep: The number of checkpoints, of the last ones, that are kept.
          keep_best: Whether the one of the lowest held-out loss is kept beside them.
          warn: Takes a line on a checkpoint that could not be written.
          read_only: Whether nothing will be saved, nor what is half-written be removed.
        """
        self._folder, self._warn = folder, warn
        self._saving: int | None = None
        self.last: int | None = None  # step of the last one that is known to be whole
        policies: list[Any] = [LatestN(keep)]
        if keep_best:
            policies.append(
                BestN(
                    get_metric_fn=lambda metrics: metrics[_EVAL_LOSS],
                    reverse=True,  # the best is the lowest
                    n=1,
                    keep_checkpoints_without_metrics=False,
                )
            )
        self._quiet = contextlib.ExitStack()
        self._quiet.enter_context(_quiet())
        self._manager = ocp.CheckpointManager(
            folder,
            options=ocp.CheckpointManagerOptions(
                best_fn=lambda metrics: metrics[_EVAL_LOSS],
                best_mode="min",
                preservation_policy=AnyPreservationPolicy(policies),
                cleanup_tmp_directories=not read_only,
                read_only=read_only,
            ),
        )

    def __enter__(self) -> "Checkpoints":
        return self

    def __exit__(self, *exception: object) -> None:
        self.wait()
        with self._quiet, contextlib.suppress(Exception):  # what failed has been told
            self._manager.close()

    def begin(self) -> None:
        """Forgets the checkpoints of an earlier run, which have been moved away."""
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("folder of checkpoints")
        self._manager.reload()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the last one first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def best(self) -> int | None:
        """Returns the step of the lowest held-out loss, of the checkpoints that know theirs."""
        return self._manager.best_step()

    def save(
        self,
        params: nnx.State,
        state: lomo_jax.StepState,
        facts: Facts,
        *,
        eval_loss: float | None = None,
        in_place: bool = False,
    ) -> bool:
        """Starts to write a checkpoint, and returns when the arrays may be donated.

        A checkpoint that cannot be written is told to `warn`; those before it stay.

        Args:
          params: The parameters after `facts.progress.step` steps.
          state: That of the step.
          facts: Their checksums are filled in.
          eval_loss: The held-out loss of these parameters, if it is known.
          in_place: Whether the arrays are written from where they are, which takes as long as the
            disk does, and not copied to host memory first.

        Returns:
          False if a number is not finite: then nothing is written.
        """
        items = _items(params, state)
        sums = {name: checksums(tree) for name, tree in items.items()}
        if not all(each.finite for each in sums.values()):
            return False
        facts.checksums = {name: each.sums for name, each in sums.items()}
        self.wait()
        step = facts.progress.step
        if step in self.steps():  # the one that the run has gone on from
            return True
        self._saving = step
        args = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        metrics = None if eval_loss is None else {_EVAL_LOSS: eval_loss}
        with self._telling():
            self._manager.save(
                step,
                args=ocp.args.Composite(**args, facts=ocp.args.JsonSave(dataclasses.asdict(facts))),
                metrics=metrics,
                force=True,
            )
        if in_place:
            self.wait()
        return True

    def poll(self) -> None:
        """Tells of a checkpoint that has failed by now."""
        if self._saving is not None and not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written."""
        if self._saving is not None:
            with self._telling():
                self._manager.wait_until_finished()
                self.last = self._saving
            self._saving = None

    def facts(self, step: int) -> Facts:
        """Reads what a checkpoint says beside its arrays.

        Raises:
          CheckpointError: It is damaged.
        """
        with _damaged(self._folder / str(step)):
            args = ocp.args.Composite(facts=ocp.args.JsonRestore())
            found: Any = self._manager.restore(step, args=args)
            facts = found["facts"]
            return Facts(**facts | {"progress": Progress(**facts["progress"])})

    def restore(
        self, facts: Facts, params: nnx.State, state: lomo_jax.StepState
    ) -> tuple[nnx.State, lomo_jax.StepState]:
        """Reads the arrays of a checkpoint, to wherever these are.

        Args:
          facts: Of the checkpoint.
          params: The parameters as `jax.ShapeDtypeStruct` with their shardings.
          state: Likewise, that of the step. A part that the checkpoint has none of comes back as
            None.

        Raises:
          CheckpointError: It is damaged.
        """
        found = self._read(facts, _items(params, state))
        rounding = found.get("rounding", {"key": None})["key"]
        state = lomo_jax.StepState(found["optimizer"], found.get("loss_scale"), rounding)
        return found["params"], state

    def restore_params(self, facts: Facts, params: nnx.State) -> nnx.State:
        """Reads the parameters alone; see `restore`."""
        return self._read(facts, {"params": params})["params"]

    def _read(self, facts: Facts, wanted: dict[str, Any]) -> dict[str, Any]:
        step = facts.progress.step
        wanted = {name: tree for name, tree in wanted.items() if name in facts.checksums}
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        with _damaged(self._folder / str(step)):
            found: Any = self._manager.restore(step, args=ocp.args.Composite(**args))
            as_saved = jax.tree.leaves(wanted["params"])[0].dtype == facts.config["param_dtype"]
            for name in wanted:
                if name == "params" and not as_saved:
                    continue  # they are converted, and their bits are others
                if checksums(found[name]).sums != facts.checksums[name]:
                    raise ValueError(f"the bits of {name} are not those that were saved")
        self.last = step
        return {name: found[name] for name in wanted}

    def set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints, so that they count no more: 40 to 40.damaged."""
        if jax.process_index() == 0:
            for step in steps:
                numbered = (f"{step}.damaged{n or ''}" for n in itertools.count())
                names = (self._folder / name for name in numbered)
                aside = next(path for path in names if not path.exists())
                (self._folder / str(step)).rename(aside)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices("damaged checkpoints")
        self._manager.reload()

    @contextlib.contextmanager
    def _telling(self) -> Iterator[None]:
        """Turns the failure of a save into a line for the person."""
        try:
            yield
        except Exception as error:  # of the disk, of orbax, of TensorStore
            step, self._saving = self._saving, None
            if jax.process_index() == 0:
                shutil.rmtree(self._folder / f"{step}{_PARTIAL}", ignore_errors=True)
            self._manager.reload()
            last = f"the last good one is of step {self.last}" if self.last else "there is none yet"
            self._warn(f"the checkpoint of step {step} was not written, {_reason(error)}; {last}")


def read_params(folder: Path, step: int | str | None, like: Any) -> tuple[nnx.State, Facts]:
    """Reads the parameters of a run, which may be going on.

    Args:
      folder: The run's workdir.
      step: Of the checkpoint; "best" for that of the lowest held-out loss, None for the last one.
      like: The parameters as `jax.ShapeDtypeStruct` with their shardings.

    Raises:
      CheckpointError: There is no such checkpoint, or it is damaged.
    """
    with Checkpoints((folder / workdir.CHECKPOINTS).absolute(), read_only=True) as checkpoints:
        steps = checkpoints.steps()
        if step is None:
            step = steps[0] if steps else None
        elif step == "best":
            step = checkpoints.best()
        if step not in steps:
            there = ", ".join(map(str, steps)) or "none"
            raise CheckpointError(f"{folder} has no checkpoint of step {step}: there is {there}")
        facts = checkpoints.facts(step)
        return checkpoints.restore_params(facts, like), facts


def _items(params: Any, state: lomo_jax.StepState) -> dict[str, Any]:
    rounding = None if state.rounding is None else {"key": state.rounding}  # orbax takes trees only
    items = {"params": params, **state._replace(rounding=rounding)._asdict()}
    return {name: tree for name, tree in items.items() if tree is not None}


@contextlib.contextmanager
def _damaged(folder: Path) -> Iterator[None]:
    """Turns the failure to read a checkpoint, by any of the processes, into CheckpointError."""
    failure = None
    try:
        yield
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # there is no room for it, which is no fault of the checkpoint
    except Exception as error:  # of json, of orbax, of TensorStore
        failure = _reason(error)
    if jax.process_count() > 1:
        every = multihost_utils.process_allgather(np.array(failure is None))
        if not every.all():
            failure = failure or "another process cannot read its part"
    if failure is not None:
        raise CheckpointError(f"{folder} is damaged: {failure}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps orbax from telling at length of a failure that this module tells in a line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels, hook = [logger.level for logger in loggers], sys.unraisablehook

    def pass_on(unraisable: Any) -> None:
        # Of what was still under way when the first file could not be read or written.
        files = [frame.filename for frame in traceback.extract_tb(unraisable.exc_traceback)]
        if not any(part in file for file in files for part in ("orbax", "asyncio")):
            hook(unraisable)

    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    sys.unraisablehook = pass_on
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            yield
            gc.collect()  # of what failed, while nobody hears it
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook


def _reason(error: BaseException) -> str:
    """What went wrong, from the first line of what TensorStore or Python say."""
    text = " ".join(str(error).split()).partition(" See full")[0] or type(error).__name__
    known = {
        "No space left on device": "the disk is full",
        "Disk quota exceeded": "the quota of the disk is used up",
        "File too large": "a file may not become so large",
    }
    found = next((words for mark, words in known.items() if mark in text), None)
    return found or (text if len(text) <= 200 else f"{text[:200]}...")
