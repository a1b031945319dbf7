"""Writes one HTML page about a run, or one that compares several.

    lomo-jax report runs/quickstart
    lomo-jax report runs/lomo runs/adalomo --out compared.html

The page needs no other file and no network. The default place is report.html, in the folder of the
run or, of several runs, in the current folder. The run may still be training.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from lomo_jax._json import write_text
from lomo_jax.errors import ArgumentParser, UserError
from lomo_jax.report import read, render
from lomo_jax.run_files import REPORT


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    parser = ArgumentParser(
        prog="lomo-jax report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run")
    parser.add_argument("--out", type=Path, metavar="FILE", help="the page to write")
    try:
        options = parser.parse_args(argv[1:])
        folder = Path(options.runs[0] if len(options.runs) == 1 else "")
        out = options.out or folder.expanduser() / REPORT
        write_text(out, render(read(options.runs)))
    except (UserError, OSError) as error:  # an OSError names the file
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
