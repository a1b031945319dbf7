"""The programs and links of README.md work, and so do the examples in docstrings."""

import doctest
import importlib
import re
from pathlib import Path

import pytest

import lomo_jax

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
PACKAGE = Path(lomo_jax.__file__).parent
MODULES_WITH_EXAMPLES = [
    ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    for path in sorted(PACKAGE.rglob("*.py"))
    if ">>> " in path.read_text()
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
@pytest.mark.parametrize("name", MODULES_WITH_EXAMPLES)
def test_examples_in_docstrings(name):
    failed, attempted = doctest.testmod(importlib.import_module(name))
    assert attempted
    assert not failed


def test_fused_step_has_an_example():
    assert lomo_jax.fused_step.__module__ in MODULES_WITH_EXAMPLES
