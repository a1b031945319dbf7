"""Exports a checkpoint of a run of `train.py` as a Hugging Face directory.

    python -m lomo_jax.export WORKDIR OUT [--step N]

OUT gets the weights as safetensors, config, tokenizer and a model card, and is written as a whole.
The run may be going on: nothing in WORKDIR is changed, and no GPU is used. An error is one line.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import jax


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m lomo_jax.export", description="Exports a checkpoint for Hugging Face."
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="of the run")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument("--step", help="of the checkpoint, or best: of the lowest held-out loss")
    arguments = parser.parse_args(argv[1:])
    # A checkpoint needs no GPU to be read, and one that is there may be busy.
    jax.config.update("jax_platforms", "cpu")
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lomo_jax.training.export import export  # slow to import: a typo is told before

    try:
        step = export(Path(arguments.workdir), Path(arguments.out), _step(arguments.step))
    except (ValueError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported  step {step} of {arguments.workdir} to {arguments.out}")
    return 0


def _step(text: str | None) -> int | str | None:
    if text is None or text == "best":
        return text
    if not text.isdecimal():
        raise ValueError(f"--step: {text!r} is neither a number nor best")
    return int(text)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
