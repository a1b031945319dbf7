"""The errors that a person running `train.py` can put right; each says how in one line."""

import difflib
from collections.abc import Iterable


class ConfigError(ValueError):
    """A config that cannot be run; the message names the field, its value and what is allowed."""


class NonFiniteError(ValueError):
    """The loss is NaN or infinite; the message names the step."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be read or written; the message names it."""


class OutOfMemoryError(ValueError):
    """The device's memory is too small; the message says what lowers the need of it."""


class LostProcessError(ValueError):
    """Another process of the run ended; this one cannot go on without it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'a' or 'b'?" with the known names near `name`, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
