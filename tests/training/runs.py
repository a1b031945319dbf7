"""Runs of a tiny model, for tests that stop, kill, damage and resume them."""

import contextlib
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from lomo_jax.models import DecoderConfig
from lomo_jax.training import Config, DataConfig, MeshConfig, ModelConfig, to_dict
from lomo_jax.training.__main__ import main

ROOT = Path(__file__).parents[2]
_WORDS = ["the", "cat", "sat", "on", "a", "mat", "and", "dog", "ran", "to", "red", "house", "sea"]


def write_text(path: Path, documents: int = 60) -> Path:
    """Writes documents of words in random order, as JSON lines."""
    rng = np.random.default_rng(0)
    lines = [json.dumps({"text": " ".join(rng.choice(_WORDS, 60))}) for _ in range(documents)]
    path.write_text("\n".join(lines))
    return path


def make_config(text: str | Path, workdir: Path, **changes: Any) -> Config:
    """Returns the config of a run: 12 steps, 35,000 parameters, one device."""
    shape = {
        **{"vocab_size": 257, "width": 32, "mlp_width": 64, "num_layers": 2, "num_heads": 4},
        **{"num_kv_heads": 2, "head_dim": 8, "max_length": 64, "norm_eps": 1e-6},
    }
    fields: dict[str, Any] = {
        "model": ModelConfig(init="random", architecture=DecoderConfig(**shape)),
        "data": DataConfig(str(text), eval_fraction=0.1),
        "learning_rate": 3e-2,
        "batch_size": 4,
        "sequence_length": 32,
        "steps": 12,
        "param_dtype": "float32",
        "eval_every": 5,
        "log_every": 1,
        "checkpoint_every": 4,
        "workdir": str(workdir),
        "mesh": MeshConfig(fsdp=1),
    }
    return Config(**fields | changes)


def records(workdir: Path) -> list[dict[str, Any]]:
    """Returns the records in metrics.jsonl, without a last line that is incomplete."""
    path = workdir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def column(workdir: Path, key: str) -> dict[int, float]:
    """Returns step -> the last value recorded for it."""
    return {record["step"]: record[key] for record in records(workdir) if key in record}


def last_step(workdir: Path) -> int:
    """Returns the last logged step, 0 if there is none."""
    return max(column(workdir, "loss"), default=0)


def weights(workdir: Path) -> dict[str, np.ndarray]:
    """Returns the exported weights, of a model or of adapters."""
    from safetensors.numpy import load_file

    (file,) = (workdir / "export").glob("*.safetensors")
    return load_file(file)


def assert_same_run(workdir: Path, expected: Path) -> None:
    """Asserts that all losses, samples and weights are equal, bit for bit."""
    for key in ("loss", "accuracy", "eval_loss", "learning_rate", "sample"):
        assert column(workdir, key) == column(expected, key)
    found, wanted = weights(workdir), weights(expected)
    assert found.keys() == wanted.keys()
    for name, weight in wanted.items():
        np.testing.assert_array_equal(found[name], weight)


@contextlib.contextmanager
def signal_when(condition: Callable[[], Any], number: signal.Signals) -> Iterator[None]:
    """Sends this process one signal as soon as `condition` holds inside the block."""
    sent, ended = threading.Event(), threading.Event()

    def watch():
        while not ended.is_set():
            if condition():
                sent.set()
                os.kill(os.getpid(), number)
                return
            time.sleep(0.0005)

    thread = threading.Thread(target=watch)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()
    assert sent.is_set(), "the moment for the signal never came"


def write_config(config: Config, path: Path) -> Path:
    """Writes a config file for the command line."""
    path.write_text(json.dumps(to_dict(config)))
    return path


def start(config: Config, *flags: str, **environment: str) -> subprocess.Popen[bytes]:
    """Starts `train.py` with this config."""
    folder = Path(config.workdir).parent
    folder.mkdir(parents=True, exist_ok=True)
    path = write_config(config, folder / f"{Path(config.workdir).name}.json")
    with output_of(config).open("w") as file:
        return subprocess.Popen(
            [sys.executable, str(ROOT / "train.py"), "--config", str(path), *flags],
            stdout=file,
            stderr=subprocess.STDOUT,
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu", **environment},
        )


# Imports take most of the time of a short run. This server has imported everything, and forks.
_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    ["lomo_jax.training.loop", "transformers.models.auto.tokenization_auto"]
)


def start_without_imports(config: Config) -> multiprocessing.process.BaseProcess:
    """Starts a run like `start`, in a fork of a process that has imported everything.

    It lacks the imports before the run and Python's exit handlers after it.
    """
    path = write_config(config, Path(config.workdir).with_suffix(".json"))
    arguments = str(path), str(output_of(config))
    process = _FORKS.Process(target=_main, args=arguments, daemon=True)
    process.start()
    return process


def _main(config: str, output: str) -> None:
    with open(output, "w") as file:
        os.dup2(file.fileno(), sys.stdout.fileno())
        os.dup2(file.fileno(), sys.stderr.fileno())
    sys.exit(main(["train.py", "--config", config]))


def wait_for_step(process: subprocess.Popen[bytes], config: Config, step: int) -> None:
    """Waits until the run in `process` has logged a step."""
    while last_step(Path(config.workdir)) < step:
        assert process.poll() is None, output_of(config).read_text()
        time.sleep(0.02)


def output_of(config: Config) -> Path:
    """Returns the file with the output of the last `start` of this config."""
    return Path(config.workdir).with_suffix(".out")
