"""Writes one HTML page about a run of `train.py`, or one that compares several.

    python -m lomo_jax.report runs/quickstart
    python -m lomo_jax.report runs/lomo runs/adalomo --out compared.html

The page needs no other file and asks the network for nothing. Of one run it is written to the
run's folder as report.html, of several to the current folder. A run that has not ended yet is
shown as far as it is. An error is one line.
"""

import contextlib
import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from lomo_jax import report


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    try:
        _report(argv)
    except (ValueError, OSError, ImportError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _report(argv: Sequence[str]) -> None:
    values = flags.FlagValues()
    out = flags.DEFINE_string("out", None, "the page to write", flag_values=values)
    wants_help = flags.DEFINE_bool("help", False, "print this", flag_values=values)
    try:
        workdirs = values(list(argv))[1:]
    except flags.Error as error:
        raise ValueError(str(error)) from error
    if wants_help.value:
        print(sys.modules["__main__"].__doc__, values.get_help(), sep="\n")
        return
    if not workdirs:
        raise ValueError("no run: name the workdir of a run of train.py, such as runs/quickstart")
    page = report.make(report.read(workdirs))
    default = Path(workdirs[0] if len(workdirs) == 1 else ".") / "report.html"
    path = default if out.value is None else Path(out.value)
    _write(path, page)
    print(path)


def _write(path: Path, page: str) -> None:
    """Writes the page as a whole: an earlier one stays where this cannot be written."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        # A name on a disk need not be UTF-8.
        partial.write_bytes(page.encode("utf-8", "backslashreplace"))
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main(sys.argv))
