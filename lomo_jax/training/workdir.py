"""The folder of a run: who may write to it, and what an earlier run has left there."""

import contextlib
import fcntl
import itertools
import os
import socket
import tempfile
from collections.abc import Iterator
from pathlib import Path

from lomo_jax.errors import ConfigError
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

_OF_A_RUN = (CHECKPOINTS, EXPORT, MODEL, CONFIG, METRICS, LOG, TENSORBOARD, WANDB, REPORT, RUN)
_LOCK = ".lock"
_LEAVING = ".earlier"  # what is being moved aside


def make(workdir: str) -> Path:
    """Makes the folder.

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
    """Keeps other processes out of the folder while this one lives, and tidies it up.

    The lock belongs to the open file: the kernel drops it with the process, however that ends.

    Raises:
      ConfigError: Another run has the folder.
    """
    with (workdir / _LOCK).open("a+") as file:
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
                f"workdir: {str(workdir)!r} is on a file system that cannot lock a file: "
                f"{error.strerror}; set --config.workdir to another one"
            ) from error
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
        file.flush()
        if (workdir / _LEAVING).exists():
            set_aside(workdir)  # a process was killed while it did
        yield


def check_is_of_a_run(workdir: Path) -> None:
    """Raises ConfigError if a run would write over files that no run has left there."""
    found = [name for name in _OF_A_RUN if not _is_nothing(workdir / name)]
    if set(found).isdisjoint((RUN, CHECKPOINTS)) and set(found) - {EXPORT}:
        raise ConfigError(
            f"workdir: {str(workdir)!r} is not that of a run, and has {', '.join(found)}, which a "
            "run would write over; set another --config.workdir"
        )


def set_aside(workdir: Path) -> Path | None:
    """Moves the files of an earlier run into a folder of their own, `earlier-1` and so on.

    One that has come to neither a checkpoint nor an export stays: the new run goes on from its
    beginning.

    Returns:
      That folder; None if nothing was moved.
    """
    leaving = workdir / _LEAVING
    is_new = all(_is_nothing(workdir / name) for name in (CHECKPOINTS, EXPORT))
    if is_new and not leaving.exists():
        return None
    # Nothing but the last renaming makes an `earlier-1` of it: it is never there in part.
    leaving.mkdir(exist_ok=True)
    for name in _OF_A_RUN:
        if not _is_nothing(workdir / name):
            (workdir / name).rename(leaving / name)
    numbered = (workdir / f"earlier-{number}" for number in itertools.count(1))
    aside = next(folder for folder in numbered if not folder.exists())
    leaving.rename(aside)
    return aside


def is_inside(path: str, workdir: Path) -> bool:
    """Whether a path is, or lies in, what `set_aside` would move."""
    workdir, place = workdir.resolve(), Path(path).expanduser().resolve()
    moved = [workdir / name for name in _OF_A_RUN]
    return place == workdir or any(folder in (place, *place.parents) for folder in moved)


def locate(path: str) -> tuple[Path, int | None] | None:
    """Returns workdir and step if a path is the workdir of a run or one of its checkpoints.

    The step of a workdir is None.
    """
    place = Path(path).expanduser()
    if (place / CHECKPOINTS).is_dir() and (place / MODEL).is_dir():
        return place, None
    if place.is_dir() and place.parent.name == CHECKPOINTS and place.name.isdigit():
        return place.parent.parent, int(place.name)
    return None


def _is_nothing(path: Path) -> bool:
    return not path.exists() or (path.is_dir() and not any(path.iterdir()))
