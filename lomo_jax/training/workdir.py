"""The folder of a run: its lock, and moving the files of an earlier run aside."""

import contextlib
import fcntl
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax

from lomo_jax.errors import ConfigError, os_errors_are_the_users
from lomo_jax.run_files import (
    CHECKPOINTS,
    CONFIG,
    EXPORT,
    LOG,
    METRICS,
    MODEL,
    REPORT,
    RUN,
    TENSORBOARD,
    WANDB,
)

_RUN_FILES = (CHECKPOINTS, EXPORT, MODEL, CONFIG, METRICS, LOG, TENSORBOARD, WANDB, REPORT, RUN)
_LOCK = ".lock"
_MOVING = ".earlier"  # files being moved to `earlier-1`


def make(workdir: str) -> Path:
    """Creates the folder.

    Raises:
      ConfigError: It cannot be written.
    """
    path = Path(workdir).expanduser().absolute()
    try:
        path.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir: {workdir!r} cannot be written: {error.strerror}; set --config.workdir"
        ) from error
    return path


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Locks the folder against other runs, and completes a move that was interrupted.

    The first process holds the lock for all. The lock is on the open file, so the kernel releases
    it however the process ends. Written by hand so that the error can name the holder.

    Raises:
      ConfigError: Another run holds the lock.
    """
    if jax.process_index() > 0:
        yield
        return
    with os_errors_are_the_users():
        file = (workdir / _LOCK).open("a+")
    with file:
        try:
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
        if (workdir / _MOVING).exists():
            set_aside(workdir)  # an earlier process was killed during the move
        yield


def check_is_of_a_run(workdir: Path) -> None:
    """Raises ConfigError if a run would overwrite files that no run has written."""
    found = [name for name in _RUN_FILES if not _is_empty(workdir / name)]
    if set(found).isdisjoint((RUN, CHECKPOINTS)) and set(found) - {EXPORT}:
        raise ConfigError(
            f"workdir: {str(workdir)!r} is not that of a run, and a run would overwrite "
            f"{', '.join(found)} there; set another --config.workdir"
        )


def set_aside(workdir: Path) -> Path | None:
    """Moves the files of an earlier run to a new folder, `earlier-1` and so on.

    A run with neither a checkpoint nor an export stays; the new run starts over in its place.

    Returns:
      The new folder; None if nothing was moved.
    """
    moving = workdir / _MOVING
    is_new = all(_is_empty(workdir / name) for name in (CHECKPOINTS, EXPORT))
    if is_new and not moving.exists():
        return None
    # Renamed to `earlier-1` last, so that `earlier-1` is always complete.
    moving.mkdir(exist_ok=True)
    for name in _RUN_FILES:
        if not _is_empty(workdir / name):
            (workdir / name).rename(moving / name)
    numbered = (workdir / f"earlier-{number}" for number in itertools.count(1))
    aside = next(folder for folder in numbered if not folder.exists())
    moving.rename(aside)
    return aside


def is_inside(path: str, workdir: Path) -> bool:
    """Whether `set_aside` would move a path."""
    workdir, place = workdir.resolve(), Path(path).expanduser().resolve()
    moved = [workdir / name for name in _RUN_FILES]
    return place == workdir or any(folder in (place, *place.parents) for folder in moved)


def locate(path: str) -> tuple[Path, int | None] | None:
    """Returns (workdir, step) if a path is the workdir of a run (step None) or a checkpoint."""
    place = Path(path).expanduser()
    if (place / CHECKPOINTS).is_dir() and (place / MODEL).is_dir():
        return place, None
    if place.is_dir() and place.parent.name == CHECKPOINTS and place.name.isdigit():
        return place.parent.parent, int(place.name)
    return None


def _is_empty(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
