"""What orbax and TensorStore say when they fail, in a line."""

import contextlib
import functools
import gc
import logging
import re
import sys
import traceback
import warnings
from collections.abc import Iterator
from types import CoroutineType
from typing import Any

_ORBAX = re.compile("orbax|ocdbt", re.IGNORECASE)
_PARTS = "coroutine '.*(serialize|save|write_|_read_)"  # as orbax names those of a checkpoint


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Keeps orbax from telling at length of a failure that is told in a line."""
    loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
    levels = [logger.level for logger in loggers]
    _hush_what_is_late()
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
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


def _hush_what_is_late() -> None:
    """For good, as what has failed may be collected, and told of, long after: an error holds it."""
    logging.getLogger("asyncio").addFilter(_is_of_another)
    warnings.filterwarnings("ignore", f"{_PARTS}.* was never awaited", RuntimeWarning)
    _pass_on_what_is_of_others()


@functools.cache
def _pass_on_what_is_of_others() -> None:
    hook = sys.unraisablehook

    def pass_on(unraisable: Any) -> None:
        # Of what was still under way when the first file could not be read or written.
        files = [frame.filename for frame in traceback.extract_tb(unraisable.exc_traceback)]
        if isinstance(unraisable.object, CoroutineType):
            files.append(unraisable.object.cr_code.co_filename)
        if not any(part in file for file in files for part in ("orbax", "asyncio")):
            hook(unraisable)

    sys.unraisablehook = pass_on


def _is_of_another(record: logging.LogRecord) -> bool:
    return _ORBAX.search(record.getMessage()) is None


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
