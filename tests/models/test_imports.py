"""Importing a name imports only the packages that it needs."""

import subprocess
import sys
import types

import pytest

from lomo_jax import data, models

HEAVY = {"flax", "safetensors", "transformers", "gguf", "grain", "orbax", "huggingface_hub"}


@pytest.mark.parametrize(
    ("code", "expected"),
    [
        ("import lomo_jax", set()),
        ("import lomo_jax.flops", set()),
        ("from lomo_jax.models import DecoderConfig", set()),
        ("from lomo_jax.models import Decoder", {"flax"}),
        ("from lomo_jax.data import package_path", set()),
    ],
)
def test_heavy_packages_are_imported_only_where_needed(code, expected):
    script = f"import sys\n{code}\nprint(*(name for name in {HEAVY!r} if name in sys.modules))"
    output = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True
    ).stdout
    # Flax imports Orbax itself.
    assert set(output.split()) - ({"orbax", "huggingface_hub"} if expected else set()) == expected


@pytest.mark.parametrize("package", [models, data])
def test_every_public_name_resolves(package):
    assert dir(package)
    for name in dir(package):
        assert not isinstance(getattr(package, name), types.ModuleType)
    with pytest.raises(AttributeError, match="has no attribute 'nothing'"):
        package.nothing  # noqa: B018
