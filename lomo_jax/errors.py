"""Errors. A user can fix a `UserError`; its message is one line that says how."""

import argparse
import contextlib
import difflib
from collections.abc import Iterable, Iterator
from typing import NoReturn


class UserError(ValueError):
    """The base class: a command prints the message alone and exits with status 1.

    Any other exception is a bug or a failure of the machine: its traceback is logged.
    """


class ConfigError(UserError):
    """A config that cannot run; the message names the field, its value and the allowed ones."""


class NonFiniteError(UserError):
    """The loss, a gradient or a parameter is NaN or infinite; the message names the step."""


class CheckpointError(UserError):
    """A checkpoint that cannot be read or written; the message names it."""


class OutOfMemoryError(UserError):
    """The device has too little memory; the message says which options need less."""


class LostProcessError(UserError):
    """Another process of the run ended, and this one cannot continue without it."""


class UnexpectedError(Exception):
    """Any other exception that ended a run; the message names it and the log with its traceback."""


class ArgumentParser(argparse.ArgumentParser):
    """A parser of command lines that raises a `UserError` instead of printing its usage."""

    def error(self, message: str) -> NoReturn:
        """Raises the error."""
        raise UserError(f"{message}; {self.prog} --help shows the options")


@contextlib.contextmanager
def os_errors_are_the_users() -> Iterator[None]:
    """Turns an OSError into a `UserError`, for code that uses the user's paths and disks."""
    try:
        yield
    except OSError as error:
        known = error.filename and error.strerror
        raise UserError(f"{error.filename}: {error.strerror}" if known else str(error)) from error


@contextlib.contextmanager
def library_errors_are_the_users(what: str, remedy: str) -> Iterator[None]:
    """Turns any error into a `UserError`, for a library that reads a file of the user.

    Args:
      what: What cannot be read; it begins the message.
      remedy: It ends the message.
    """
    try:
        yield
    except UserError:
        raise
    except BaseException as error:
        # A panic in Rust is no Exception.
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        lines = str(error).splitlines()
        reason = lines[0][:200] if lines else type(error).__name__
        raise UserError(f"{what} cannot be read ({reason}); {remedy}") from error


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Returns "; did you mean 'a' or 'b'?" with known names similar to `name`, or ""."""
    near = difflib.get_close_matches(name, list(known), n=3)
    return f"; did you mean {' or '.join(map(repr, near))}?" if near else ""
