"""Every program of examples/ runs, and its fused step needs less memory for the same loss."""

import re
import runpy
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parents[1] / "examples").glob("*.py"))


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example(path, capsys):
    if path.stem == "equinox_model":
        pytest.importorskip("equinox")
    runpy.run_path(str(path), run_name="__main__")
    line = r"(\w+) +loss (\S+)  temporaries (\S+) MiB"
    (fused, fused_loss, fused_mib), (plain, plain_loss, plain_mib) = re.findall(
        line, capsys.readouterr().out
    )
    assert (fused, plain) == ("fused_step", "reference_step")
    assert float(fused_loss) == pytest.approx(float(plain_loss), rel=1e-3)
    assert float(fused_mib) < float(plain_mib) / 2


def test_there_is_an_example_for_each_library():
    assert [path.stem for path in EXAMPLES] == ["equinox_model", "linen_model", "nnx_model"]
