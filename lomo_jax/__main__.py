"""lomo_jax: full fine-tuning of language models, one layer's gradient at a time.

    lomo-jax train --config quickstart                             fine-tune a model
    lomo-jax data --config quickstart                              show what it trains on
    lomo-jax plan --config llama7b --gpu rtx3090                   plan memory and time of a run
    lomo-jax eval RUN --tasks boolq,mmlu                           evaluate a run or a model
    lomo-jax report RUN                                            show a run as a page
    lomo-jax export RUN DIR                                        export a checkpoint

`lomo-jax COMMAND --help` prints the usage of a command.
"""

import importlib
import sys
from collections.abc import Sequence

from lomo_jax.errors import did_you_mean

# Each module has `main(argv) -> int`, and is imported only when its command is run.
COMMANDS = {
    "train": "lomo_jax.training.__main__",
    "data": "lomo_jax.data.__main__",
    "plan": "lomo_jax.plan.__main__",
    "eval": "lomo_jax.evaluation.__main__",
    "report": "lomo_jax.report.__main__",
    "export": "lomo_jax.training.export",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line `argv`, by default `sys.argv`; returns the exit status."""
    program, *arguments = sys.argv if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help", "-help", "help"):
        print(__doc__)
        return 0
    name, *rest = arguments
    if name not in COMMANDS:
        hint = did_you_mean(name, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        print(f"error: {name!r} is not a command{hint}", file=sys.stderr)
        return 1
    return importlib.import_module(COMMANDS[name]).main([f"{program} {name}", *rest])


if __name__ == "__main__":
    sys.exit(main())
