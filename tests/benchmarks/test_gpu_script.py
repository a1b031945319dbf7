"""The benchmarks run, on a CPU and at tiny sizes: so they will the day a GPU is there."""

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
_SECONDS = 180  # what the dry run may take


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
    """What the dry run wrote, by part."""
    directory = tmp_path_factory.mktemp("gpu")
    start = time.monotonic()
    result = run(
        "bash",
        "benchmarks/gpu.sh",
        "--dry-run",
        str(directory),
        PYTHON=sys.executable,
        XLA_FLAGS="",
    )
    seconds = time.monotonic() - start
    assert result.returncode == 0, result.stdout + result.stderr
    assert seconds < _SECONDS
    return {path.stem: json.loads(path.read_text()) for path in directory.glob("*.json")}


@pytest.mark.slow
def test_every_part_leaves_its_results(results):
    parts = "correct memory compare-small compare-large planned-small profile"
    assert set(parts.split()) <= set(results)
    for data in results.values():
        assert data["date"]
        assert data["versions"]["jax"]


@pytest.mark.slow
def test_the_checks_ran(results):
    checks = {check["check"]: check for check in results["correct"]["checks"]}
    skipped = [name for name, check in checks.items() if "skipped" in check]
    assert skipped == ["flash attention = plain"]
    assert len(checks) > 8
    for check in checks.values():
        assert "skipped" in check or check["measured"] <= check["bound"]


@pytest.mark.slow
def test_rows_learn_alike_whoever_runs_them(results):
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
def test_the_profile_tells_products_from_the_update(results):
    shares = results["profile"]["shares"]
    assert sum(shares.values()) == pytest.approx(1.0)
    assert shares["products"] > 0
    assert shares["update"] > 0
    assert shares["attention"] > 0


@pytest.mark.slow
def test_results_become_a_table(results, tmp_path):
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


def test_an_unknown_row_is_told_with_those_that_there_are():
    result = run(sys.executable, "benchmarks/compare.py", "--rows", "sophia")
    assert result.returncode == 1
    assert result.stderr.startswith("error: --rows: 'sophia' is in none of: ")
    assert "fused, adalomo" in result.stderr
    assert result.stderr.count("\n") == 1
