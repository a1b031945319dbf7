"""Shows a dataset as the model will see it, before it is trained on.

    lomo-jax data --config quickstart --config.data.path=DATA

It takes the config and flags of `lomo-jax train`, and neither reads nor needs the weights. It
prints the first examples, the part that the loss is on in colour (or between >> and << where there
is none), the counts and how long the examples are. --json prints one object instead: `kind`,
`files_read`, `files_left_out`, `examples`, `tokens`, `loss_tokens`, `cut`, `left_out`, `repeated`,
and `first`, the first example's `tokens` and `loss`, 0 or 1 for each.
"""

import io
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from absl import flags

from lomo_jax.errors import UserError, os_errors_are_the_users
from lomo_jax.training.config import Config
from lomo_jax.training.config_reader import parse

if TYPE_CHECKING:
    from rich.text import Text
    from transformers import PreTrainedTokenizerBase

    from lomo_jax.data import Summary

_SHOWN = 2000  # tokens of an example
_BAR = 40  # characters
_COUNTS = ("examples", "tokens", "loss_tokens", "cut", "left_out", "repeated")


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`, program name first; returns the exit status."""
    try:
        values = flags.FlagValues()
        as_json = flags.DEFINE_bool("json", False, "print one JSON object", flag_values=values)
        config = parse(argv, values, usage=__doc__)
        with os_errors_are_the_users():
            tokenizer, summary = _read(config)
    except UserError as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal may not show all characters
    if as_json.value:
        print(json.dumps(to_dict(summary)))
    else:
        _print(summary, tokenizer, config.sequence_length)
    return 0


def _read(config: Config) -> tuple["PreTrainedTokenizerBase", "Summary"]:
    from lomo_jax import data, models  # slow to import: report typos first
    from lomo_jax.training import model as model_lib

    source = config.model
    shape = source.architecture
    if source.init == "checkpoint" and source.path is not None:
        shape = models.load_config(model_lib.hf_path(source.path))
    tokenizer = model_lib.load_tokenizer(source.path, shape)
    rows = data.read_rows(
        tokenizer=tokenizer,
        sequence_length=config.sequence_length,
        vocab_size=shape.vocab_size,
        **vars(config.data),
    )
    return tokenizer, rows.summary


def to_dict(summary: "Summary") -> dict[str, Any]:
    """Returns a summary as plain values, for JSON."""
    tokens, loss = summary.first[0]
    return {
        "kind": summary.kind,
        "files_read": summary.files_read,
        "files_left_out": summary.files_left_out,
        **{name: getattr(summary, name) for name in _COUNTS},
        "first": {"tokens": tokens.tolist(), "loss": loss.tolist()},
    }


def _print(summary: "Summary", tokenizer: "PreTrainedTokenizerBase", sequence_length: int) -> None:
    from rich.console import Console
    from rich.rule import Rule

    console = Console(highlight=False, soft_wrap=True)
    for number, (tokens, loss) in enumerate(summary.first, 1):
        console.print(Rule(f"example {number}, {len(tokens)} tokens, {loss.sum()} with loss"))
        console.print(_coloured(tokenizer, tokens, loss, console.is_terminal))
    console.print(Rule("dataset"))
    _print_files(console, "read", summary.files_read)
    _print_files(console, "left out", summary.files_left_out)
    console.print(f"{'kind':<12} {summary.kind}")
    for name in _COUNTS:
        console.print(f"{name.replace('_', ' '):<12} {getattr(summary, name):,}")
    console.print(Rule(f"tokens of an example (sequence_length={sequence_length})"))
    for line in histogram(summary.lengths):
        console.print(line)


def _print_files(console: Any, label: str, files: list[str]) -> None:
    for name in files[:10]:
        console.print(f"{label:<12} {name}")
    if len(files) > 10:
        console.print(f"{label:<12} {len(files) - 10:,} more")


def _coloured(
    tokenizer: "PreTrainedTokenizerBase", tokens: np.ndarray, loss: np.ndarray, has_colour: bool
) -> "Text":
    from rich.text import Text

    from lomo_jax.training.log import printable

    text = Text()
    pairs = zip(tokens[:_SHOWN].tolist(), loss[:_SHOWN].tolist(), strict=True)
    for has_loss, part in itertools.groupby(pairs, lambda pair: pair[1]):
        words = printable(str(tokenizer.decode([token for token, _ in part])))
        if has_loss and not has_colour:
            words = f">>{words}<<"
        text.append(words, "bold green" if has_loss else "dim")
    return text.append(" ..." if len(tokens) > _SHOWN else "")


def histogram(lengths: np.ndarray) -> Iterator[str]:
    """Yields a line for each range of lengths, which end at powers of two."""
    ends = 2 ** np.ceil(np.log2(np.maximum(lengths, 1))).astype(np.int64)
    counts = dict(zip(*(x.tolist() for x in np.unique(ends, return_counts=True)), strict=True))
    for end in itertools.takewhile(max(counts).__ge__, (2**n for n in itertools.count())):
        if end >= min(counts):
            count = counts.get(end, 0)
            bar = "#" * round(_BAR * count / max(counts.values()))
            yield f"{f'to {end:,}':<12} {count:>11,} {bar}".rstrip()


if __name__ == "__main__":
    sys.exit(main(sys.argv))
