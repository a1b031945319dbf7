"""The planned memory traffic of an update."""

import subprocess
import sys
from pathlib import Path

import pytest

_ROOT = Path(__file__).parents[2]


@pytest.mark.plan
def test_an_update_takes_less_than_8_percent_of_a_step_on_an_h100():
    pytest.importorskip("jax_cuda13_plugin")
    result = subprocess.run(
        [sys.executable, "benchmarks/traffic.py", "h100"],
        capture_output=True,
        text=True,
        check=True,
        cwd=_ROOT,
    )
    rows = [line.strip("| ").split(" | ") for line in result.stdout.splitlines()[3:]]
    moved = {rule: float(each) for rule, each, *_ in rows}
    shares = {rule: float(share.rstrip(" %")) for rule, *_, share in rows}
    # In bfloat16 LOMO reads the gradient and the weight and writes the weight: 6 bytes. AdaLomo
    # reads the gradient three times (columns, rows, update) and the weight twice, through a copy.
    assert moved["lomo"] <= 6.5
    assert moved["adalomo"] <= 14.5
    assert shares["lomo"] < 8.0
    assert shares["adalomo"] < 8.0
