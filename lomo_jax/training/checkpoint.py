"""Checkpoints: orbax writes them in the background, atomically, with checksums of the arrays."""

import contextlib
import dataclasses
import functools
import gc
import itertools
import logging
import math
import shutil
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self, TypeVar, cast

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
from flax import nnx

import lomo_jax
from lomo_jax import run_files
from lomo_jax._json import write_json
from lomo_jax._schema import CHECKPOINT
from lomo_jax.errors import CheckpointError, UserError
from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import is_on_host
from lomo_jax.lora import is_adapter
from lomo_jax.training import devices

_REMOVAL = 1.0  # seconds that removing a checkpoint may take
_METADATA = Path("metadata", "metadata")  # in a checkpoint's folder; orbax writes the JSON there
_PARTIAL = ".orbax-checkpoint-tmp"  # suffix of a folder that orbax is still writing

T = TypeVar("T")


@dataclasses.dataclass
class Progress:
    """The state of a run without its arrays."""

    step: int = 0  # finished steps
    data: dict[str, Any] = dataclasses.field(default_factory=dict)  # grain's position
    evaluated: int = -1  # the step of the last evaluation; -1 before the first one
    best: float | None = None  # after step 0 the lowest held-out loss, or see Config.keep_best
    best_step: int | None = None  # its step
    skipped: int = 0  # updates skipped because loss or gradient was not finite
    skipped_in_a_row: int = 0  # until now; without overflows that a lower loss scale may fix


@dataclasses.dataclass
class CheckpointMetadata:
    """The metadata of a checkpoint, saved as JSON."""

    progress: Progress
    config: dict[str, Any]  # from `config.to_dict`
    dataset: str  # fingerprint of the documents and tokens; `progress.data` is a position in them
    checksums: dict[str, list[int]]  # item -> checksum of each leaf
    # Checksum of each frozen parameter, if the checkpoint holds the adapters alone.
    base: list[int] | None = None


class Checkpoints:
    """The checkpoints in a folder; a context manager whose exit waits for the background save.

    A checkpoint has the items `params`, `optimizer`, `metadata` and, if the step uses them,
    `loss_scale` and `rounding`. With several processes all must call every method; each process
    writes and reads its own shards.
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
          folder: Created if it does not exist.
          keep: Number of latest checkpoints to keep.
          keep_best: Whether to keep the checkpoint with the lowest held-out loss as well.
          warn: Called with a one-line message if a checkpoint cannot be written.
          read_only: Whether to change nothing in the folder: neither save nor clean up.
        """
        self._folder, self._warn, self._read_only = folder, warn, read_only
        self._preserve = _LastAndBest(keep)
        self._keep_best = keep_best
        self._saving: int | None = None  # step of the checkpoint being written
        self._failure: str | None = None  # why that checkpoint failed
        self.last: int | None = None  # step of the last checkpoint known to be complete
        self._owner: tuple[int, int] | None = None  # the folder of the run
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            stack.enter_context(silence_orbax())
            self._manager = ocp.CheckpointManager(
                self._folder,
                options=ocp.CheckpointManagerOptions(
                    preservation_policy=self._preserve,
                    cleanup_tmp_directories=not self._read_only,
                    read_only=self._read_only,
                    lightweight_initialize=True,  # reads no files, which may be damaged
                ),
            )
            if not self._read_only:
                self._owner = _inode(self._folder.parent)
            # Drop orbax's objects while it is silenced: failed coroutines warn when they are
            # collected, and the traceback of an error may keep this object alive for longer.
            stack.callback(delattr, self, "_manager")
            # Each process reads on its own: orbax would wait forever for a process whose shards
            # are damaged.
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
                return  # the user does not want to wait for the save
            # After an error in this process alone, the others do not take part in `agree`.
            self._wait(agreed=kind is None)
            self._manager.close()

    def start_anew(self) -> None:
        """Creates the folder, after the checkpoints of an earlier run were moved aside."""
        if jax.process_index() == 0:
            self._folder.mkdir(exist_ok=True)
        devices.wait_for_all("checkpoint folder")
        self.reload()

    def reload(self) -> None:
        """Lists the folder again."""
        self._manager.reload()

    def steps(self) -> list[int]:
        """Returns the steps of the checkpoints, the latest first."""
        return sorted(self._manager.all_steps(), reverse=True)

    def save(
        self, params: nnx.State, state: lomo_jax.StepState, metadata: CheckpointMetadata
    ) -> bool:
        """Starts to write a checkpoint in the background; the caller may then donate the arrays.

        If writing fails, `warn` is called, and the earlier checkpoints stay.

        Args:
          params: The parameters after `metadata.progress.step` steps, without a frozen base.
          state: The state of the step.
          metadata: The metadata; `save` sets its checksums.

        Returns:
          Whether all numbers are finite; if not, nothing is written.

        Raises:
          CheckpointError: The folder of the run was deleted or moved.
        """
        self._require_folder(metadata.progress.step)
        items = _items(params, state)
        sums = {name: checksums(tree) for name, tree in items.items()}
        if not all(each.finite for each in sums.values()):
            return False
        metadata.checksums = {name: each.sums for name, each in sums.items()}
        self.wait()
        step = metadata.progress.step
        if self._keep_best:
            self._preserve.best(metadata.progress.best_step)
        if step in self.steps():  # resumed from it, and evaluated since
            self._update(step, metadata.progress)
            return True
        self._saving = step
        args: dict[str, Any] = {name: ocp.args.StandardSave(tree) for name, tree in items.items()}
        args["metadata"] = ocp.args.JsonSave(dataclasses.asdict(metadata))
        try:
            self._manager.save(step, args=ocp.args.Composite(**args), force=True)
        except Exception as error:  # the disk, orbax or TensorStore may raise anything
            self._failure = reason(error)
        # Orbax does not copy arrays in host memory before it writes in the background.
        if any(map(is_on_host, jax.tree.leaves(items))):
            self.wait()
        return True

    def _require_folder(self, step: int) -> None:
        """Makes the folder of the checkpoints again if somebody deleted it."""
        run = self._folder.parent
        # Another run may have made its folder in the same place.
        if not devices.agree(_inode(run) == self._owner):
            raise CheckpointError(
                f"{run} was deleted or moved while the run went on: it stopped after step {step} "
                "and saved nothing there; if the folder was moved, set --config.workdir to its new "
                "place to resume from the last checkpoint in it"
            )
        if not devices.agree(self._folder.is_dir()):
            self._warn(f"{self._folder} was deleted while the run went on, with its checkpoints")
            self.last = None
            if jax.process_index() == 0:
                self._folder.mkdir(exist_ok=True)
            devices.wait_for_all("checkpoint folder again")
            self.reload()

    def _update(self, step: int, progress: Progress) -> None:
        """Updates the progress in an existing checkpoint."""
        metadata = self.metadata(step)
        if metadata.progress != progress and jax.process_index() == 0:
            metadata.progress = progress
            try:
                write_json(self._folder / str(step) / _METADATA, dataclasses.asdict(metadata))
            except OSError as error:  # a full disk
                self._warn(f"the checkpoint of step {step} lacks its evaluation, {reason(error)}")

    def poll(self) -> None:
        """Warns if the background save failed (single process only)."""
        if self._saving is None or jax.process_count() > 1:
            return
        if self._failure is not None or not self._manager.is_saving_in_progress():
            self.wait()

    def wait(self) -> None:
        """Waits for the background save; warns if it failed."""
        self._wait(agreed=True)

    def _wait(self, *, agreed: bool) -> None:
        """Waits; `agreed`: whether all processes call this, and must agree on the result."""
        if self._saving is None:
            return
        step, failure, self._saving, self._failure = self._saving, self._failure, None, None
        try:
            self._manager.wait_until_finished()
        except Exception as error:  # as in `save`
            failure = failure or reason(error)
        whole = failure is None
        if devices.agree(whole) if agreed else whole:
            self.last = step
            return
        settle()
        if jax.process_index() == 0:
            shutil.rmtree(self._folder / f"{step}{_PARTIAL}", ignore_errors=True)
        self._manager.reload()
        failure = failure or "another process failed"
        last = f"the last good one is of step {self.last}" if self.last else "there is none yet"
        self._warn(f"the checkpoint of step {step} was not written, {failure}; {last}")

    def metadata(self, step: int) -> CheckpointMetadata:
        """Reads the metadata of a checkpoint.

        Raises:
          CheckpointError: The checkpoint is damaged.
        """
        folder = self._folder / str(step)

        def read() -> CheckpointMetadata:
            args = ocp.args.Composite(metadata=ocp.args.JsonRestore())
            found: Any = self._reader.restore(folder, args=args)
            metadata = found["metadata"]
            CHECKPOINT.check(metadata)
            if metadata["progress"]["step"] != step:
                raise ValueError(f"it says that it is of step {metadata['progress']['step']}")
            return CheckpointMetadata(**metadata | {"progress": Progress(**metadata["progress"])})

        return _intact(folder, read)

    def restore(
        self, metadata: CheckpointMetadata, params: nnx.State, state: lomo_jax.StepState
    ) -> tuple[nnx.State, lomo_jax.StepState]:
        """Reads the arrays of a checkpoint.

        Args:
          metadata: The metadata of the checkpoint.
          params: The parameters as `jax.ShapeDtypeStruct` with shardings.
          state: The state of the step as `jax.ShapeDtypeStruct` with shardings.

        Returns:
          The parameters and the state. Parts of the state that the checkpoint lacks are None.

        Raises:
          CheckpointError: The checkpoint is damaged.
        """
        found = self._read(metadata, _items(params, state))
        if self._keep_best:
            for step in reversed(self.steps()):
                with contextlib.suppress(CheckpointError):
                    self._preserve.best(self.metadata(step).progress.best_step)
        rounding = found.get("rounding", {"key": None})["key"]
        state = lomo_jax.StepState(found["optimizer"], found.get("loss_scale"), rounding)
        return found["params"], state

    def restore_params(self, metadata: CheckpointMetadata, params: nnx.State) -> nnx.State:
        """Reads the parameters alone; see `restore`."""
        return self._read(metadata, {"params": params})["params"]

    def _read(self, metadata: CheckpointMetadata, wanted: dict[str, Any]) -> dict[str, Any]:
        step = metadata.progress.step
        wanted = {name: tree for name, tree in wanted.items() if name in metadata.checksums}
        args = {name: ocp.args.StandardRestore(tree) for name, tree in wanted.items()}
        folder = self._folder / str(step)

        def read() -> Any:
            return self._reader.restore(folder, args=ocp.args.Composite(**args))

        def compare() -> None:
            # Adapters are always float32.
            dtypes = {
                leaf.dtype
                for name, leaf in zip(
                    arrays.names(wanted["params"]), jax.tree.leaves(wanted["params"]), strict=True
                )
                if not is_adapter(name)
            }
            as_saved = all(dtype == metadata.config["param_dtype"] for dtype in dtypes)
            for name in wanted:
                if name == "params" and not as_saved:
                    continue  # converted to another dtype: other bits
                if checksums(found[name]).sums != metadata.checksums[name]:
                    raise ValueError(f"the bits of {name} are not those that were saved")

        found = _intact(folder, read)
        _intact(folder, compare)  # collective: all processes have read their shards
        self.last = step
        return {name: found[name] for name in wanted}

    def set_aside(self, steps: Sequence[int]) -> None:
        """Renames damaged checkpoints, 40 to 40.damaged, so that they are ignored."""
        if jax.process_index() == 0:
            for step in steps:
                numbered = (f"{step}.damaged{n or ''}" for n in itertools.count())
                names = (self._folder / name for name in numbered)
                aside = next(path for path in names if not path.exists())
                (self._folder / str(step)).rename(aside)
        devices.wait_for_all("damaged checkpoints")
        self.reload()


class _LastAndBest:
    """Preservation policy for orbax: the latest checkpoints, and the best one."""

    def __init__(self, keep: int) -> None:
        self._keep = keep
        self._best: list[int | None] = []  # steps that were the best, in order

    def best(self, step: int | None) -> None:
        """Adds the step of the best evaluation so far."""
        if step not in self._best:
            self._best.append(step)

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        del context
        steps = sorted(info.step for info in checkpoints)
        # The latest of them that exists: writing a better checkpoint may have failed.
        best = next((step for step in reversed(self._best) if step in steps), None)
        return [info.step in steps[-self._keep :] or info.step == best for info in checkpoints]


def parse_step(text: str | None) -> int | str | None:
    """Returns the step of `read_params` that the value of `--step` says.

    Raises:
      UserError: It is neither a number nor "best".
    """
    if text is None or text == "best":
        return text
    if not text.isdecimal():
        raise UserError(f"--step: {text!r} must be a number or best")
    return int(text)


def read_params(
    folder: Path, step: int | str | None, like: Any
) -> tuple[nnx.State, CheckpointMetadata]:
    """Reads the parameters of a run; the run may still be training.

    Args:
      folder: The run's workdir.
      step: The step of the checkpoint, "best" for the lowest held-out loss, None for the latest.
      like: The parameters as `jax.ShapeDtypeStruct`; without a sharding, for the default device.

    Raises:
      CheckpointError: There is no such checkpoint, or it is damaged.
    """
    # Without a sharding, Orbax would put an array on the mesh that the run had.
    default = jnp.zeros(()).sharding
    like = jax.tree.map(lambda x: x if x.sharding else x.update(sharding=default), like)
    with Checkpoints((folder / run_files.CHECKPOINTS).absolute(), read_only=True) as checkpoints:
        while True:
            steps = checkpoints.steps()
            try:
                metadata = checkpoints.metadata(_find(checkpoints, folder, step))
                return checkpoints.restore_params(metadata, like), metadata
            except CheckpointError:
                time.sleep(_REMOVAL)
                checkpoints.reload()
                if checkpoints.steps() == steps:
                    raise
                # The run has replaced the checkpoint while we read it.


def _inode(folder: Path) -> tuple[int, int] | None:
    """Returns what identifies a folder, whatever its name; None if there is none."""
    try:
        status = folder.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino


def _find(checkpoints: Checkpoints, folder: Path, step: int | str | None) -> int:
    """Returns the step of the checkpoint that `read_params` reads."""
    steps = checkpoints.steps()
    if not steps:
        raise CheckpointError(f"{folder} has no checkpoint")
    if step is None:
        return steps[0]
    found = checkpoints.metadata(steps[0]).progress.best_step if step == "best" else step
    if found not in steps:
        there = ", ".join(map(str, steps))
        what = "the best step" if found is None else f"step {found}"
        raise CheckpointError(f"{folder} has no checkpoint of {what}: there is {there}")
    return int(found)


def _items(params: Any, state: lomo_jax.StepState) -> dict[str, Any]:
    rounding = None if state.rounding is None else {"key": state.rounding}  # orbax needs a tree
    items = {"params": params, **state._replace(rounding=rounding)._asdict()}
    return {name: tree for name, tree in items.items() if tree is not None}


def _intact(folder: Path, read: Callable[[], T]) -> T:
    """Returns the result of `read`; a failure in any process becomes a CheckpointError.

    The error is raised outside the `except` block: as its context, the failure would keep orbax's
    coroutines alive; see `silence_orbax`.
    """
    found, failure = None, None
    try:
        found = read()
    except (jax.errors.JaxRuntimeError, MemoryError):
        raise  # out of memory: the checkpoint may be intact
    except Exception as error:  # json, orbax or TensorStore may raise anything
        failure = reason(error)
        settle()
    if not devices.agree(failure is None):
        failure = failure or "another process cannot read its shards"
        raise CheckpointError(f"{folder} is damaged: {failure}")
    return cast(T, found)


class Checksums(NamedTuple):
    """Checksums of the arrays of a tree."""

    sums: list[int]  # per array: the sum of its words as unsigned integers, modulo 2**32
    finite: bool  # whether all numbers are finite


def checksums(tree: Any) -> Checksums:
    """Computes checksums, reading every array once, in the memory where it is.

    Written by hand: integer sums do not depend on the order of summation, so that they are the same
    on every mesh. Checksums of orbax or of files are not. A flipped bit changes the sum.

    Args:
      tree: Pytree of arrays, in device or host memory, sharded or not.
    """
    # One array at a time: on a CPU each needs temporary memory; see `_of_array`.
    each = [jax.device_get(_of_array(x)) for x in jax.tree.leaves(tree)]
    return Checksums([int(total) for total, _ in each], all(finite for _, finite in each))


@jax.jit
def _of_array(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    infinity = _bits(jnp.array(jnp.inf, x.dtype)) if jnp.issubdtype(x.dtype, jnp.inexact) else None
    on_host = is_on_host(x)
    if not on_host:
        # Before the loop: inside, XLA for CPUs would convert a whole bfloat16 stack to float32.
        x = _bits(x)

    def of_part(part: jax.Array) -> tuple[jax.Array, jax.Array]:
        if on_host:
            part = _bits(jax.device_put(part, jax.memory.Space.Device))
        total = jnp.sum(part, dtype=jnp.uint32)
        if infinity is None:
            return total, jnp.array(True)
        not_finite = (part & infinity) == infinity
        # A float64 has two words.
        return total, ~(not_finite.all(-1) if infinity.ndim else not_finite).any()

    def add(carry, layer):
        (total, finite), (more, is_finite) = carry, of_part(layer)
        return (total + more, finite & is_finite), None

    if x.ndim < 3 or arrays.partition_spec(x)[0] is not None:
        return of_part(x)
    # One layer of a stack at a time: a whole array in host memory may not fit on the device, and
    # XLA for CPUs converts each number to uint32 before it sums.
    return jax.lax.scan(add, (jnp.uint32(0), jnp.array(True)), x)[0]


def _bits(x: jax.Array) -> jax.Array:
    """Returns the bits as unsigned integers. NaN and infinity have all bits of the exponent set."""
    if x.dtype == jnp.bool_:
        return x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(math.gcd(x.dtype.itemsize, 4), jnp.uint32)
    return jax.lax.bitcast_convert_type(x, word)


_failed = threading.Event()  # whether orbax failed since the last collection of garbage


@contextlib.contextmanager
def silence_orbax() -> Iterator[None]:
    """Silences orbax's logs and warnings; we report the failure in one line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    _drop_late_errors()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
            try:
                yield
            except BaseException:
                _failed.set()
                raise
            finally:
                if _failed.is_set():
                    gc.collect()  # failed coroutines warn when they are collected
                    _failed.clear()
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@functools.cache
def _drop_late_errors() -> None:
    """Drops, from now on, the errors of orbax's reads that end after one of them failed.

    They may end at any time, on a busy machine long after the checkpoint was given up.
    """
    hook = sys.unraisablehook

    def drop(unraisable: Any) -> None:
        files = [frame.filename for frame in traceback.extract_tb(unraisable.exc_traceback)]
        if not any(part in file for file in files for part in ("orbax", "asyncio")):
            hook(unraisable)

    sys.unraisablehook = drop


def settle(seconds: float = 5.0) -> None:
    """Waits until orbax's threads have finished the tasks that were running at a failure.

    Orbax closes its event loop earlier, and asyncio warns about each unfinished task when it is
    collected.
    """
    _failed.set()
    until = time.monotonic() + seconds
    # A thread ends after its event loop is closed. Not `join`, which raises for one that starts.
    while any(thread.name.startswith("asyncio_") for thread in threading.enumerate()):
        time.sleep(0.01)
        if time.monotonic() > until:
            return


def reason(error: BaseException) -> str:
    """Returns the cause of an error of TensorStore or Python in one line."""
    text = " ".join(str(error).split()).partition(" See full")[0] or type(error).__name__
    known = {
        "No space left on device": "the disk is full",
        "Disk quota exceeded": "the quota of the disk is used up",
        "File too large": "a file may not become so large",
    }
    found = next((words for mark, words in known.items() if mark in text), None)
    return found or (text if len(text) <= 200 else f"{text[:200]}...")
