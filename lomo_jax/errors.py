"""Errors that the person who started a command can fix; each message is one line that says how."""

import difflib
from collections.abc import Iterable


class UserError(ValueError):
    """The base class: a command prints the message alone and exits with status 1.

    Any other exception is a bug or a failure of the machine, and its traceback is kept.
    """


class ConfigError(UserError):
    """A config that cannot run; the message names the field, its value and what is allowed."""


class NonFiniteError(UserError):
    """The loss, a gradient or a parameter is NaN or infinite; the message names the step."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names it."""


class OutOfMemoryError(UserError):
    """The device has too little memory; the message says which options need less."""


class LostProcessError(UserError):
    """Another process of the run ended, and this one cannot continue without it."""


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'a' or 'b'?" with the known names near `name`, "" if none is."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
