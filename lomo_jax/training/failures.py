"""What orbax and TensorStore say when they fail, in a line."""

import contextlib
import gc
import logging
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Iterator
from typing import Any


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from telling at length of a failure that is told in a line."""
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
            try:
                yield
            finally:
                gc.collect()  # of what failed, while nobody hears it
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        sys.unraisablehook = hook


def settle(seconds: float = 5.0) -> None:
    """Waits until orbax's threads are done with what had been begun when something failed.

    It closes its event loop over them, and so asyncio tells of each of their tasks, whenever that
    is collected.
    """
    until = time.monotonic() + seconds
    for thread in threading.enumerate():
        if thread.name.startswith("asyncio_"):  # of an event loop, which when closed ends them
            thread.join(max(0.0, until - time.monotonic()))


def reason(error: BaseException) -> str:
    """What went wrong, from the first line of what TensorStore or Python say."""
    text = " ".join(str(error).split()).partition(" See full")[0] or type(error).__name__
    known = {
        "No space left on device": "the disk is full",
        "Disk quota exceeded": "the quota of the disk is used up",
        "File too large": "a file may not become so large",
    }
    found = next((words for mark, words in known.items() if mark in text), None)
    return found or (text if len(text) <= 200 else f"{text[:200]}...")
