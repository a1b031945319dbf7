"""Feeds damaged and hostile files to every reader of files that others made.

    python tests/fuzz.py --seconds 60 [--seed 0] [--first 0] [READER ...]

A reader must return, or raise an error of one line, within `LIMIT` seconds of computing. Input
number n of a reader depends on the seed and n alone: a failure prints the command that repeats it.
"""

import argparse
import json
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).parent
sys.path[:0] = [str(ROOT), str(ROOT / "models"), str(ROOT / "report")]

from lomo_jax import models, run_files  # noqa: E402
from lomo_jax.errors import UserError  # noqa: E402

LIMIT = 20  # seconds of computing for one input
MEMORY = 2**30  # bytes that all inputs of a reader may add to the process

# Values that have broken parsers: other types, ends of ranges, deep and long ones.
VALUES: list[Any] = [
    *(None, True, False, 0, -1, 1, 2, 7, 2**31, 2**63, 10**400, -(10**40), 1e-320, 1e308, 0.5),
    *(float("inf"), float("-inf"), float("nan"), "", "a", "0", "\0", "\n", "../x", "x" * 10_000),
    *("\ud800", "null", [], {}, [[]], [None], [1, "a"], {"a": 1}, {"": {}}, [0] * 1000),
]


def mutate_json(rng: random.Random, value: Any) -> Any:
    """Changes one part of a JSON value."""
    if isinstance(value, dict | list) and value and rng.random() < 0.85:
        keys = list(value) if isinstance(value, dict) else range(len(value))
        key = rng.choice(keys)
        copy: Any = dict(value) if isinstance(value, dict) else list(value)
        if rng.random() < 0.1:
            del copy[key]
        elif rng.random() < 0.1 and isinstance(copy, dict):
            copy[rng.choice(["x", "", "a\nb", "../y", "\0"])] = rng.choice(VALUES)
        else:
            copy[key] = mutate_json(rng, copy[key])
        return copy
    if rng.random() < 0.2:
        return wrap(rng.choice(VALUES), rng.choice([1, 10, 40]))
    return rng.choice(VALUES)


def wrap(value: Any, depth: int) -> Any:
    for _ in range(depth):
        value = [value]
    return value


def mutate_bytes(rng: random.Random, content: bytes) -> bytes:
    """Flips, cuts, inserts and overwrites some bytes."""
    data = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 5, 20])):
        place = rng.randrange(len(data) + 1)
        match rng.randrange(6):
            case 0 if place < len(data):
                data[place] ^= 1 << rng.randrange(8)
            case 1:
                del data[place:]
            case 2:
                del data[place : place + rng.randrange(64)]
            case 3:
                data[place:place] = rng.randbytes(rng.randrange(16))
            case 4:
                size = rng.choice([1, 2, 4, 8])
                number = rng.choice([0, 1, -1, 2 ** (8 * size - 1) - 1, rng.getrandbits(8 * size)])
                data[place : place + size] = (number % 256**size).to_bytes(size, "little")
            case 5:
                data[place:place] = rng.choice([b"[" * 5000, b"{", b'"', b"1e999", b"\xff", b"NaN"])
    return bytes(data)


def change(rng: random.Random, file: Path) -> None:
    """Damages a file."""
    content = file.read_bytes()
    if file.suffix in (".json", "") and rng.random() < 0.75:
        value = json.loads(content)
        for _ in range(rng.choice([1, 1, 1, 2, 4])):
            value = mutate_json(rng, value)
        file.write_text(json.dumps(value))
    elif file.suffix == ".jsonl" and rng.random() < 0.75:
        lines = [json.loads(line) for line in content.splitlines()]
        lines = [mutate_json(rng, x) if rng.random() < 0.3 else x for x in lines]
        file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    else:
        file.write_bytes(mutate_bytes(rng, content))


class Reader(NamedTuple):
    """A reader, and the valid files that inputs are made of."""

    make: Callable[[Path], None]  # fills a folder
    files: str  # glob of those that are damaged
    read: Callable[[Path], Any]  # gets the damaged one


def _make_model(folder: Path) -> None:
    from small_models import CONFIG, graphdef_of, random_params, word_tokenizer

    shape = {"max_shard_bytes": 4096, "tokenizer": word_tokenizer()}
    models.save(folder / "model", graphdef_of(CONFIG), random_params(CONFIG), **shape)


def _make_configs(folder: Path) -> None:
    from released_configs import RELEASED

    for name, _, hf in RELEASED:
        (folder / f"{name.replace('/', '_')}.json").write_text(json.dumps(hf))


def _read_config(file: Path) -> None:
    from lomo_jax._json import read_json
    from lomo_jax.models.hf_config import read_config

    models.abstract(read_config(read_json(file)))


def _make_gguf(folder: Path) -> None:
    import test_gguf
    from small_models import random_params

    test_gguf.write(folder / "model.gguf", test_gguf.CONFIG, random_params(test_gguf.CONFIG))
    test_gguf.write_vocabulary(folder / "vocabulary.gguf", "gpt2")


def _read_gguf(file: Path) -> None:
    if file.name == "model.gguf":
        models.load(file)
    else:
        models.tokenizer(file)("the cat")


def _make_run(folder: Path) -> None:
    from workdirs import evaluation, resumed, sample, step, write

    records = [evaluation(0, 4.0), sample(0, "a"), *(step(n, 3.5) for n in range(1, 6))]
    write(folder, [*records, resumed(3), step(4, 3.0), evaluation(4, 3.1)])
    for number in (3, 4):
        found = {"step": number, "time": 1.8e9, "metrics": {"boolq_acc": 0.5}}
        run_files.append_evaluation(folder, found | {"limit": None, "examples": 20})


def _read_run(file: Path) -> None:
    from lomo_jax import report

    report.render(report.read([file.parent]))


def _make_checkpoint(folder: Path) -> None:
    from lomo_jax.training import Config, to_dict

    progress = {"step": 3, "data": {"next_index": 12}, "evaluated": 2, "best": 1.25}
    progress |= {"best_step": 2, "skipped": 5, "skipped_in_a_row": 4}
    metadata = {"progress": progress, "config": to_dict(Config()), "dataset": "fingerprint"}
    metadata["checksums"] = {"params": [1], "optimizer": [2, 3], "rounding": [4]}
    (folder / "metadata.json").write_text(json.dumps(metadata))


def _read_checkpoint(file: Path) -> None:
    from lomo_jax._json import read_json
    from lomo_jax._schema import CHECKPOINT
    from lomo_jax.training.checkpoint import CheckpointMetadata, Progress
    from lomo_jax.training.export import model_card

    found = read_json(file, CHECKPOINT)
    values = {name: found[name] for name in CheckpointMetadata.__annotations__ if name in found}
    progress = {name: found["progress"][name] for name in Progress.__annotations__}
    model_card(CheckpointMetadata(**values | {"progress": Progress(**progress)}), file.parent)


def _make_adapters(folder: Path) -> None:
    from flax import nnx
    from small_models import CONFIG

    from lomo_jax import lora, peft_files

    model = models.Decoder(CONFIG, rngs=nnx.Rngs(0))
    lora.add(model, lora.LoRA(2, 16), rngs=nnx.Rngs(1))
    peft_files.save(folder / "adapters", CONFIG, lora.LoRA(2, 16), nnx.state(model))


def _read_adapters(file: Path) -> None:
    from small_models import CONFIG

    from lomo_jax import peft_files

    peft_files.load(file.parent, CONFIG)


def _make_questions(folder: Path) -> None:
    from lomo_jax.evaluation import superglue

    rows = [{"passage": "Sky.", "question": f"is it {n}", "label": n % 2} for n in range(3)]
    for split in ("train", "validation"):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "boolq").mkdir(exist_ok=True)
        (folder / "boolq" / f"{split}.jsonl").write_text(lines)
    superglue.write("boolq", folder / "questions", data=[folder])


def _read_questions(file: Path) -> None:
    from lomo_jax.evaluation.tasks import read_questions

    read_questions(file)


READERS = {
    "config": Reader(_make_configs, "*.json", _read_config),
    "index": Reader(_make_model, "model/*index.json", lambda file: models.load(file.parent)),
    "safetensors": Reader(
        _make_model, "model/*.safetensors", lambda file: models.load(file.parent)
    ),
    "tokenizer": Reader(
        _make_model, "model/*token*.json", lambda file: models.tokenizer(file.parent)
    ),
    "gguf": Reader(_make_gguf, "*.gguf", _read_gguf),
    "run": Reader(_make_run, "*.json", _read_run),
    "metrics": Reader(_make_run, "metrics.jsonl", _read_run),
    "evaluations": Reader(_make_run, "evaluations.jsonl", _read_run),
    "questions": Reader(_make_questions, "questions/boolq.jsonl", _read_questions),
    "manifest": Reader(
        _make_model,
        "model/lomo_jax_export.json",
        lambda file: models.check_save_path(file.parent),
    ),
    "adapters": Reader(_make_adapters, "adapters/adapter_*", _read_adapters),
    "checkpoint": Reader(_make_checkpoint, "*.json", _read_checkpoint),
}


class Failure(NamedTuple):
    """An input that a reader did not answer as it must."""

    number: int
    what: str


def inputs(name: str, seed: int, first: int) -> Iterator[tuple[int, str | None]]:
    """Yields the number of each input of a reader, and what went wrong; without end."""
    reader = READERS[name]
    with tempfile.TemporaryDirectory() as temporary:
        valid, folder = Path(temporary) / "valid", Path(temporary) / "input"
        valid.mkdir()
        reader.make(valid)
        files = sorted(file.relative_to(valid) for file in valid.glob(reader.files))
        reader.read(valid / files[0])  # which must not fail
        number = first
        while True:
            rng = random.Random(f"{seed} {name} {number}")
            shutil.copytree(valid, folder)
            file = folder / rng.choice(files)
            change(rng, file)
            yield number, _try(reader.read, file)
            shutil.rmtree(folder)
            number += 1


def _try(read: Callable[[Path], Any], file: Path) -> str | None:
    """Returns what is wrong with the answer of a reader; None if it is as it must be."""
    # Of computing, however busy the machine is; a reader that only waits has ten times as long.
    timers = {signal.SIGPROF: (signal.ITIMER_PROF, LIMIT)}
    timers[signal.SIGALRM] = signal.ITIMER_REAL, 10 * LIMIT
    before = {number: signal.signal(number, _too_slow) for number in timers}
    for timer, seconds in timers.values():
        signal.setitimer(timer, seconds)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            read(file)
    except (UserError, OSError) as error:
        if "\n" in str(error) or len(str(error)) > 1000:
            return f"an error that is not one line: {error!s:.2000}"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        return traceback.format_exc(limit=-6)
    finally:
        for number, (timer, _) in timers.items():
            signal.setitimer(timer, 0)
            signal.signal(number, before[number])
    return None


def _too_slow(*_: object) -> None:
    raise TimeoutError  # an OSError would count as an answer


class TimeoutError(Exception):
    """A reader took longer than `LIMIT` seconds."""


def main() -> int:
    """Runs the command; returns the number of failures, at most 1."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("readers", nargs="*", metavar="READER", help=", ".join(READERS))
    parser.add_argument("--seconds", type=float, default=60.0, help="for each reader")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--first", type=int, default=0, help="number of the first input")
    options = parser.parse_args()
    failed = 0
    for name in options.readers or READERS:
        started, count, failures = time.monotonic(), 0, 0
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        for number, problem in inputs(name, options.seed, options.first):
            count += 1
            if problem is not None:
                failures += 1
                repeat = f"--seed {options.seed} --first {number} --seconds 0 {name}"
                print(f"{name}: python tests/fuzz.py {repeat}\n{problem}", flush=True)
            if time.monotonic() - started > options.seconds:
                break
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory
        print(f"{name}: {count} inputs, {failures} failures, {grown / 1024:.0f} MiB more memory")
        failed += failures + (grown * 1024 > MEMORY)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
