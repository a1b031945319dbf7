"""Checkpoints of a run, by orbax: written beside the training, as a whole or not at all."""

import contextlib
import dataclasses
import itertools
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar, cast

import jax
import numpy as np
import orbax.checkpoint as ocp
from flax import nnx
from jax.experimental import multihost_utils

import lomo_jax
from lomo_jax import run_files
from lomo_jax.errors import CheckpointError
from lomo_jax.training import devices, failures
from lomo_jax.training.checksums import checksums

_REMOVAL = 1.0  # seconds that the removal of a checkpoint may take
_FACTS = Path("facts", "metadata")  # in a checkpoint, where orbax writes the item's JSON
_PARTIAL = ".orbax-checkpoint-tmp"  # what orbax appends to the name of a folder until it is whole

T = TypeVar("T")


@dataclasses.dataclass
class Progress:
    """Where a run is, apart from its arrays."""

    step: int = 0  # steps made
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # position in the text, of grain
    evaluated: int = -1  # the step of the last evaluation; -1 before the first
    best: float | None = None  # the lowest held-out loss after a step
    best_step: int | None = None  # that step
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
          folder: Made if it is not there.
          keep: The number of checkpoints, of the last ones, that are kept.
          keep_best: Whether the one of the lowest held-out loss is kept beside them.
          warn: Takes a line on a checkpoint that could not be written.
          read_only: Whether nothing will be saved, nor what is half-written be removed.
        """
        self._folder, self._warn, self._read_only = folder, warn, read_only
        self._preserve = _LastAndBest(keep)
        self._keep_best = keep_best
        self._saving: int | None = None
        self._failure: str | None = None  # why the one being written will not be whole
        self.last: int | None = None  # step of the last one that is known to be whole
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(failures.quiet())
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._preserve,
                    cleanup_tmp_directories=not self._read_only,
                    read_only=self._read_only,
                    lightweight_initialize=True,  # nothing is read that might be damaged
                ),
            )
            # What failed in orbax must go while it is quiet, and an error may hold this object.
            stack.callback(delattr, self, "_manager")
            # For itself alone: a process that waits in orbax for one that has found its part to be
            # damaged would wait for ever.
            here = jax.process_index()
            alone = ocp.options.MultiprocessingOptions(here, {here}, f"reader{here}")
            handler = ocp.CompositeCheckpointHandler(
                composite_options=ocp.CompositeOptions(multiprocessing_options=alone)
            )
            self._reader = ocp.Checkpointer(handler, multiprocessing_options=alone)
            stack.callback(delattr, self, "_reader")
            stack.enter_context(self._reader)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, *exception: object) -> None:
        with self._stack:
            if kind is KeyboardInterrupt and self._manager.is_saving_in_progress():
                return  # of a person who does not want to wait for it
            # An error may be of this process alone: then the others do not come to agree on this.
            self._wait(agreed=kind is None)
            self._manager.close()

    def begin(self) -> None:
        """Forgets the checkpoints of an earlier run, which have been moved away."""
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
        devices.wait_for_all("folder of checkpoints")
        self.reload()

    def reload(self) -> None:
        """Looks again which checkpoints there are."""
        self._manager.reload()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the last one first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self,
        params: nnx.State,
        state: lomo_jax.StepState,
        facts: Facts,
        *,
        in_place: bool = False,
    ) -> bool:
        """Starts to write a checkpoint, and returns when the arrays may be donated.

        A checkpoint that cannot be written is told to `warn`; those before it stay.

        Args:
          params: The parameters after `facts.progress.step` steps.
          state: That of the step.
          facts: Their checksums are filled in.
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
        if self._keep_best:
            self._preserve.best(facts.progress.best_step)
        if step in self.steps():  # the one that the run has gone on from, and evaluated since
            self._update(step, facts.progress)
            return True
        self._saving = step
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["facts"] = ocp.args.JsonSave(dataclasses.asdict(facts))
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:  # of the disk, of orbax, of TensorStore
            self._failure = failures.reason(error)
        if in_place:
            self.wait()
        return True

    def _update(self, step: int, progress: Progress) -> None:
        """Writes what is known of the run by now into the checkpoint of a step."""
        facts = self.facts(step)
        if facts.progress != progress and jax.process_index() == 0:
            facts.progress = progress
            try:
                run_files.write_json(self._folder / str(step) / _FACTS, dataclasses.asdict(facts))
            except OSError as error:  # a full disk
                reason = failures.reason(error)
                self._warn(f"the checkpoint of step {step} misses its evaluation, {reason}")

    def poll(self) -> None:
        """Tells of a checkpoint that has failed by now, unless other processes must agree on it."""
        if self._saving is None or jax.process_count() > 1:
            return
        if self._failure is not None or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the checkpoint that is being written, and tells if it was not."""
        self._wait(agreed=True)

    def _wait(self, *, agreed: bool) -> None:
        """As `wait`; `agreed` is whether all processes do this and have to agree on it."""
        if self._saving is None:
            return
        step, failure, self._saving, self._failure = self._saving, self._failure, None, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as above
            failure = failure or failures.reason(error)
        whole = failure is None
        if _in_all(whole) if agreed else whole:
            self.last = step
            return
        failures.settle()
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / f"{step}{_PARTIAL}", ignore_errors=True)
        self._manager.reload()
        failure = failure or "another process failed"
        last = f"the last good one is of step {self.last}" if self.last else "there is none yet"
        self._warn(f"the checkpoint of step {step} was not written, {failure}; {last}")

    def facts(self, step: int) -> Facts:
        """Reads what a checkpoint says beside its arrays.

        Raises:
          CheckpointError: It is damaged.
        """
        folder = self._folder / str(step)

        def read() -> Facts:
            args = ocp.args.Composite(facts=ocp.args.JsonRestore())
            found: Any = self._reader.restore(folder, args=args)
            facts = found["facts"]
            return Facts(**facts | {"progress": Progress(**facts["progress"])})

        return _intact(folder, read)

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
        for step in reversed(self.steps()):  # which of them have been the best
            with contextlib.suppress(CheckpointError):
                self._preserve.best(self.facts(step).progress.best_step)
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
        folder = self._folder / str(step)

        def read() -> Any:
            return self._reader.restore(folder, args=ocp.args.Composite(**args))

        def compare() -> None:
            as_saved = jax.tree.leaves(wanted["params"])[0].dtype == facts.config["param_dtype"]
            for name in wanted:
                if name == "params" and not as_saved:
                    continue  # they are converted, and their bits are others
                if checksums(found[name]).sums != facts.checksums[name]:
                    raise ValueError(f"the bits of {name} are not those that were saved")

        found = _intact(folder, read)
        _intact(folder, compare)  # all processes have read their parts, and compute this together
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
        devices.wait_for_all("damaged checkpoints")
        self.reload()


class _LastAndBest:
    """Tells orbax which checkpoints to keep: the last ones, and that of the best evaluation."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._best: list[int | None] = []  # its steps so far

    def best(self, step: int | None) -> None:
        """Takes the step of the best evaluation so far."""
        if step not in self._best:
            self._best.append(step)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = sorted(info.step for info in checkpoints)
        # The last one that is there: what has been best since may not have been written.
        best = next((step for step in reversed(self._best) if step in steps), None)
        return [info.step in steps[-self._keep :] or info.step == best for info in checkpoints]


def read_params(folder: Path, step: int | str | None, like: Any) -> tuple[nnx.State, Facts]:
    """Reads the parameters of a run, which may be going on.

    Args:
      folder: The run's workdir.
      step: Of the checkpoint; "best" for that of the lowest held-out loss, None for the last one.
      like: The parameters as `jax.ShapeDtypeStruct` with their shardings.

    Raises:
      CheckpointError: There is no such checkpoint, or it is damaged.
    """
    with Checkpoints((folder / run_files.CHECKPOINTS).absolute(), read_only=True) as checkpoints:
        while True:
            steps = checkpoints.steps()
            try:
                facts = checkpoints.facts(_find(checkpoints, folder, step))
                return checkpoints.restore_params(facts, like), facts
            except CheckpointError:
                time.sleep(_REMOVAL)
                checkpoints.reload()
                if checkpoints.steps() == steps:
                    raise
                # The run has written another one meanwhile, and removed what was being read.


def _find(checkpoints: Checkpoints, folder: Path, step: int | str | None) -> int:
    """Returns the step of the checkpoint that `read_params` is asked for."""
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint")
    if step is None:
        return steps[0]
    found = checkpoints.facts(steps[0]).progress.best_step if step == "best" else step
    if found not in steps:
        there = ", ".join(map(str, steps))
        what = "the best step" if found is None else f"step {found}"
        raise CheckpointError(f"{folder} has no checkpoint of {what}: there is {there}")
    return int(found)


def _items(params: Any, state: lomo_jax.StepState) -> dict[str, Any]:
    rounding = None if state.rounding is None else {"key": state.rounding}  # orbax takes trees only
    items = {"params": params, **state._replace(rounding=rounding)._asdict()}
    return {name: tree for name, tree in items.items() if tree is not None}


def _intact(folder: Path, read: Callable[[], T]) -> T:
    """Returns what is read; a failure, of any of the processes, is turned into CheckpointError.

    That one holds nothing of the failure, as it would if this were a context: see
    `failures.quiet`.
    """
    found, failure = None, None
    try:
        found = read()
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # there is no room for it, which is no fault of the checkpoint
    except Exception as error:  # of json, of orbax, of TensorStore
        failure = failures.reason(error)
        failures.settle()
    if not _in_all(failure is None):
        failure = failure or "another process cannot read its part"
        raise CheckpointError(f"{folder} is damaged: {failure}")
    return cast(T, found)


def _in_all(condition: bool) -> bool:
    """Whether it holds in all processes, which must all ask."""
    if jax.process_count() == 1:
        return condition
    return bool(multihost_utils.process_allgather(np.array(condition)).all())
