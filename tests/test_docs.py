"""The programs and links of README.md work, and so do the examples in docstrings."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PUBLIC_MODULES = [
    "lomo_jax.adalomo",
    "lomo_jax.data.text",
    "lomo_jax.fused.loss_scale",
    "lomo_jax.fused.step",
    "lomo_jax.lomo",
    "lomo_jax.losses",
    "lomo_jax.models.generate",
    "lomo_jax.models.load",
    "lomo_jax.plan.compiling",
    "lomo_jax.sharding",
]


@pytest.mark.usefixtures("standard_promotion")
def test_program_in_readme(capsys):
    (program,) = re.findall(r"^```python\n(.*?)^```$", README, flags=re.DOTALL | re.MULTILINE)
    exec(compile(program, "README.md", "exec"), {"__name__": "readme"})
    losses = [float(line.split()[1]) for line in capsys.readouterr().out.splitlines()]
    assert losses[-1] < losses[0] / 2


def anchors(page):
    """The targets that GitHub makes for the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", ["README.md", "CONTRIBUTING.md", "CHANGELOG.md"])
def test_links_within_the_repository(page):
    targets = re.findall(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)", (ROOT / page).read_text())
    for path, anchor in targets:
        assert (ROOT / path).exists(), f"{page} links to {path}"
        if anchor:
            assert anchor in anchors(ROOT / path), f"{page} links to {path}#{anchor}"


@pytest.mark.usefixtures("standard_promotion")
@pytest.mark.parametrize("name", PUBLIC_MODULES)
def test_examples_in_docstrings(name):
    failed, _ = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS)
    assert not failed
