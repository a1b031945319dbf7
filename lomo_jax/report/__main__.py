"""Writes one HTML page about a run, or one that compares several.

    lomo-jax report runs/quickstart
    lomo-jax report runs/lomo runs/adalomo --out compared.html

The page needs no other file and no network. The default place is report.html, in the folder of the
run or, of several runs, in the current folder. The run may still be training.
"""

import argparse
import contextlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

from lomo_jax.errors import UserError
from lomo_jax.report import read, render
from lomo_jax.run_files import REPORT


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; {self.prog} --help shows the options")


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    layout = argparse.RawDescriptionHelpFormatter
    parser = _Parser(argv[0], description=__doc__, formatter_class=layout, allow_abbrev=False)
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write")
    try:
        options = parser.parse_args(argv[1:])
        folder = Path(options.runs[0] if len(options.runs) == 1 else "")
        out = options.out or folder.expanduser() / REPORT
        _write(out, render(read(options.runs)))
    except (UserError, OSError) as error:  # an OSError names the file
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


def _write(path: Path, page: str) -> None:
    """Writes the page atomically: an earlier one stays if this fails."""
    if os.path.lexists(path) and not path.is_file():
        raise UserError(f"--out {path} is not a regular file: choose another name")
    partial = path.with_name(f".{path.name}.partial")
    try:
        # File names, and so configs, need not be UTF-8.
        partial.write_text(page, encoding="utf-8", errors="backslashreplace")
        partial.replace(path)
    except OSError:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


if __name__ == "__main__":
    sys.exit(main(["lomo-jax report", *sys.argv[1:]]))
