"""The files in a run's folder, which `train` writes, and resume, report and export read."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from lomo_jax._json import read_json, write_json
from lomo_jax._schema import EVALUATION_RECORD, METRICS_RECORD, RUN_INFO, check_regular
from lomo_jax.plan import MemoryPlan

CHECKPOINTS = "checkpoints"  # one folder per saved step, by orbax
MODEL = "model"  # config.json and tokenizer in Hugging Face form: a model without weights
EXPORT = "export"  # the trained model in Hugging Face form
CONFIG = "config.json"  # every field of the config
RUN = "run.json"  # a `RunInfo`
METRICS = "metrics.jsonl"  # one `Record` per line
LOG = "log.txt"  # the lines of the terminal, and the traceback of an error
TENSORBOARD = "tensorboard"
WANDB = "wandb"
EVALUATIONS = "evaluations.jsonl"  # a line for each `lomo-jax eval`
REPORT = "report.html"
ALL = (
    *(CHECKPOINTS, EXPORT, MODEL, CONFIG, METRICS, LOG, TENSORBOARD, WANDB, EVALUATIONS),
    *(REPORT, RUN),
)

# A line of metrics.jsonl: "step" (steps made), "time" (Unix seconds), and one of
# * a logged step: "loss", "learning_rate", "accuracy", "tokens_per_second", and where there is one
#   "flop_utilisation", "device_memory_gib", "grad_norm", "loss_scale", "skipped";
# * an evaluation: "eval_loss", "eval_accuracy", "eval_perplexity", and each metric of the tasks,
#   such as "eval_boolq_acc";
# * a sample: "prompt", "sample";
# * a resumed run: "resumed". Earlier lines with a higher step are superseded.
Record = dict[str, Any]
_MAX_LINE = 2**24  # characters


@dataclasses.dataclass(frozen=True)
class RunInfo:
    """Facts about a run that its config does not contain; run.json."""

    source: str  # of the weights at the start
    parameters: int
    device: str  # its kind, as JAX names it
    devices: int
    processes: int
    versions: dict[str, str]  # of python, jax and lomo_jax
    memory: MemoryPlan  # planned for the step

    def write(self, folder: Path) -> None:
        """Writes the file."""
        write_json(folder / RUN, dataclasses.asdict(self))

    @classmethod
    def read(cls, folder: Path) -> Self | None:
        """Reads the file, None if there is none.

        Raises:
          UserError: The file is damaged.
        """
        if not (folder / RUN).exists():
            return None
        found = read_json(folder / RUN, RUN_INFO)
        found["memory"] = _pick(MemoryPlan, found["memory"])
        return _pick(cls, found)


def _pick(kind: Any, values: dict[str, Any]) -> Any:
    """Returns a dataclass of the values that it has fields for."""
    return kind(**{field.name: values[field.name] for field in dataclasses.fields(kind)})


def contains(workdir: Path, path: str) -> bool:
    """Whether a path is the folder of a run or among its files."""
    workdir, place = workdir.resolve(), Path(path).expanduser().resolve()
    return place == workdir or any(place.is_relative_to(workdir / name) for name in ALL)


class MetricsWriter:
    """Appends records to metrics.jsonl; a record is on disk as soon as it is written."""

    def __init__(self, folder: Path) -> None:
        """Opens the file, and cuts off a last line that a killed process left unfinished."""
        path = folder / METRICS
        if path.exists():
            with path.open("r+b") as file:
                file.truncate(file.read().rfind(b"\n") + 1)
        self._file = path.open("a", buffering=1, encoding="utf-8")

    def write(self, record: Record) -> None:
        """Appends a record."""
        self._file.write(json.dumps(_finite(record)) + "\n")

    def close(self) -> None:
        """Closes the file."""
        self._file.close()


def read_metrics(folder: Path) -> Iterator[Record | None]:
    """Yields the record of each line of metrics.jsonl, None for a line that holds none.

    Superseded records are included.

    Raises:
      UserError: It is not a regular file.
      OSError: The file cannot be read.
    """
    check_regular(folder / METRICS)
    with (folder / METRICS).open(encoding="utf-8", errors="replace") as file:
        lines = iter(lambda: file.readline(_MAX_LINE), "")
        yield from (_parse(line) for line in lines if line.strip())


def append_evaluation(folder: Path, record: Record) -> None:
    """Appends a record to evaluations.jsonl: "step", "time", "metrics" by name, and how."""
    record = {**record, "metrics": _finite(record["metrics"])}
    with (folder / EVALUATIONS).open("a+b") as file:
        is_cut = file.tell() > 0 and (file.seek(-1, os.SEEK_END), file.read(1))[1] != b"\n"
        file.write(b"\n" * is_cut + json.dumps(record).encode() + b"\n")


def _finite(record: Record) -> Record:
    """Returns a record with null for NaN, which JSON has not, so that every parser can read it."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in record.items()
    }


def read_evaluations(folder: Path) -> list[Record]:
    """Returns the records of evaluations.jsonl, without lines that hold none.

    Raises:
      UserError: It is not a regular file.
      OSError: The file cannot be read.
    """
    path = folder / EVALUATIONS
    check_regular(path)
    if not path.exists():
        return []
    found = []
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in iter(lambda: file.readline(_MAX_LINE), ""):
            with contextlib.suppress(ValueError, RecursionError):
                record = json.loads(line)
                if EVALUATION_RECORD.problem("", record) is None:
                    found.append(record)
    return found


def _parse(line: str) -> Record | None:
    # A killed process leaves an unfinished line, and the next one may have continued it: then a
    # whole record ends that line.
    for start in (0, line.rfind('{"step"')):
        try:
            record = json.loads(line[max(start, 0) :], parse_constant=lambda name: None)
        except (ValueError, RecursionError):
            continue
        return record if METRICS_RECORD.problem("", record) is None else None
    return None
