"""Dry runs of the benchmarks: tiny sizes on a CPU find their errors before a GPU run."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

_BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
_SECONDS = 180  # limit of the dry run


def run(*command, **env):
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
        cwd=_BENCHMARKS.parent,
        env=os.environ | env,
    )


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    """Returns the results of the dry run by part."""
    directory = tmp_path_factory.mktemp("gpu")
    start = time.monotonic()
    script = ("bash", "benchmarks/gpu.sh", "--dry-run", str(directory))
    result = run(*script, PYTHON=sys.executable)
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stdout + result.stderr
    assert seconds < _SECONDS
    return {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}


@pytest.mark.slow
@pytest.mark.exhaustive
def test_every_part_writes_its_results(results):
    parts = "correct memory compare-small compare-large planned-small profile"
    assert set(parts.split()) <= set(results)
    for data in results.values():
        assert data["date"]
        assert data["versions"]["jax"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_checks_ran(results):
    fused, offloaded, attention = results["correct"]["checks"]
    assert fused["check"].startswith("fused = reference")
    assert offloaded["check"].startswith("offloaded = plain")
    for check in (fused, offloaded):
        assert check["measured"] <= check["bound"]
    assert attention["check"] == "flash attention = plain"
    assert "no cuDNN" in attention["skipped"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_our_losses_equal_those_of_lomo_optim(results):
    rows = results["compare-small"]["rows"]
    ours, theirs = rows["fused, lomo"], rows["torch lomo-optim, Lomo"]
    for row in (rows["forward + backward, no update"], ours):
        assert len(row["seconds"]) == 1
        assert row["planned_gib"] > 0
        assert row["peak_gib"] > 0
    assert ours["losses"][-1] < ours["losses"][0]
    if all(map(importlib.util.find_spec, ("torch", "lomo_optim"))):
        np.testing.assert_allclose(ours["losses"], theirs["losses"], rtol=1e-4)
    else:
        assert "No module named" in theirs["skipped"]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_the_profile_separates_matmuls_attention_and_update(results):
    shares = results["profile"]["shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["products"] > 0
    assert shares["update"] > 0
    assert shares["attention"] > 0


@pytest.mark.slow
@pytest.mark.exhaustive
def test_collect_writes_the_results_as_a_table(results, tmp_path):
    directory = tmp_path / "gpu"
    directory.mkdir()
    for name, data in results.items():
        (directory / f"{name}.json").write_text(json.dumps(data))
    page = tmp_path / "README.md"
    page.write_text("before\n<!-- gpu: written by collect.py -->\nold\n<!-- gpu: end -->\nafter\n")
    result = run(sys.executable, "benchmarks/collect.py", str(directory), "--into", str(tmp_path))
    assert result.returncode == 0, result.stderr
    text = page.read_text()
    assert text.startswith("before\n")
    assert text.endswith("after\n")
    assert "old" not in text
    assert "fused, adalomo" in text
    assert len(list((tmp_path / "results").glob("*.json"))) == 1


def test_the_error_for_an_unknown_row_lists_the_rows():
    result = run(sys.executable, "benchmarks/compare.py", "--rows", "sophia")
    assert result.returncode == 1
    assert result.stderr.startswith("error: --rows: 'sophia' matches none of: ")
    assert "fused, adalomo" in result.stderr
    assert result.stderr.count("\n") == 1


_IMPORTS = """
import importlib.abc
import sys

class Block(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in BLOCKED:
            raise ModuleNotFoundError(f"blocked: {name}", name=name)

BLOCKED = set(sys.argv[1:])
sys.meta_path.insert(0, Block())
sys.path[:0] = [".", "benchmarks"]

import collect, compare, correct, jax_step, profile_step, rows, worker
import jax

row = next(row for row in rows.ROWS if row.kind == "fused")
step = jax_step.Step(row, rows.SIZES["tiny"], on_gpu=False)
jax.eval_shape(step.init, step.shapes, correct.batches(0)[0]["tokens"])
jax.eval_shape(lambda: correct.models.init(correct.CONFIG, 0)[1])
compare.print_report({"rows": {}, "size": "tiny", "versions": {}, "commit": None})
"""


def test_the_gpu_script_needs_only_jax_flax_and_optax():
    blocked = [
        *("gguf", "grain", "huggingface_hub", "jinja2", "matplotlib"),
        *("safetensors", "tensorboardX", "tokenizers", "torch", "transformers"),
    ]
    result = run(sys.executable, "-c", _IMPORTS, *blocked)
    assert result.returncode == 0, result.stderr


def test_results_of_the_gpu_script_are_ignored_by_git():
    result = run("git", "check-ignore", "-q", "benchmarks/results/gpu/correct.json")
    if result.returncode == 128:
        pytest.skip("not a git checkout")
    assert result.returncode == 0
