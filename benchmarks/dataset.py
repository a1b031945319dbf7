"""Time and memory to tokenise a dataset, first and again, in a process of its own.

    python benchmarks/dataset.py --config quickstart lines
    python benchmarks/dataset.py --config quickstart line text --megabytes 1000

`lines` are a million short records, `line` is 9 MB in one line, `text` is prose without repeats in
files of 50 MB. The tokenizer is that of the config's model. "peak" is the largest resident memory
of the process, and "before" what it takes without data: imports and tokenizer.
"""

import argparse
import json
import multiprocessing
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np

_FILE = 50 * 10**6  # bytes
_WORDS = 50_000


def write(kind: str, folder: Path, megabytes: int) -> None:
    """Writes the files of one kind."""
    rng = np.random.default_rng(0)
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    shares = 1 / np.arange(1, 27)
    words = [
        "".join(rng.choice(letters, n, p=shares / shares.sum()))
        for n in rng.integers(1, 10, _WORDS)
    ]
    frequency = 1 / np.arange(1, _WORDS + 1)
    frequency /= frequency.sum()

    def prose(size: int) -> str:
        chosen = rng.choice(_WORDS, size // 4, p=frequency)
        sentences = (
            " ".join(words[i] for i in part) for part in np.array_split(chosen, size // 400)
        )
        return (".\n\n".join(sentences))[:size]

    if kind == "lines":
        with (folder / "a.jsonl").open("w") as file:
            file.writelines(f'{{"text": "line {i} of text"}}\n' for i in range(10**6))
    elif kind == "line":
        (folder / "a.jsonl").write_text(json.dumps({"text": prose(9 * 10**6)}))
    else:
        for number in range(max(1, megabytes * 10**6 // _FILE)):
            (folder / f"{number}.txt").write_text(prose(_FILE))


def measure(config_name: str, folder: Path) -> dict[str, float]:
    """Reads the dataset twice; returns seconds and GB."""
    from lomo_jax import data
    from lomo_jax.training import model as model_lib
    from lomo_jax.training.config_reader import read_config

    config = read_config(config_name)
    tokenizer = model_lib.load_tokenizer(config.model.path, config.model.architecture)
    before, seconds, tokens = _resident(), [], 0
    for _ in range(2):
        start = time.perf_counter()
        dataset = data.text_dataset(
            folder, tokenizer, sequence_length=2048, batch_size=8, eval_fraction=0.01
        )
        next(dataset.train)
        seconds.append(time.perf_counter() - start)
        tokens = dataset.summary.tokens
    first, again = seconds
    return {"first": first, "again": again, "before": before, "peak": _resident(), "tokens": tokens}


def _resident() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def _report(kind: str, config: str, folder: Path) -> None:
    found = measure(config, folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 1e6
    print(
        f"{kind:<6} {size:7.1f} MB  {found['tokens']:>13,.0f} tokens  first {found['first']:6.1f} s"
        f"  again {found['again']:5.2f} s  before {found['before']:.2f} GiB  peak"
        f" {found['peak']:.2f} GiB"
    )


def main() -> None:
    """Measures each kind in a process of its own, with an empty cache."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config", default="quickstart")
    parser.add_argument("--megabytes", type=int, default=1000)
    parser.add_argument("kinds", nargs="*", default=["lines", "line", "text"])
    arguments = parser.parse_args()
    spawn = multiprocessing.get_context("spawn")
    for kind in arguments.kinds:
        with tempfile.TemporaryDirectory() as folder:
            os.environ["LOMO_JAX_CACHE"] = f"{folder}/cache"
            dataset = Path(folder, "data")
            dataset.mkdir()
            write(kind, dataset, arguments.megabytes)
            process = spawn.Process(target=_report, args=(kind, arguments.config, dataset))
            process.start()
            process.join()


if __name__ == "__main__":
    main()
