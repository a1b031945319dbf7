"""The models of `configs/`."""

import importlib.util
from pathlib import Path

import jax
import pytest

from lomo_jax.training import model as model_lib
from lomo_jax.training.config import validate

_CONFIGS = Path(__file__).parents[2] / "configs"


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama7b", 6_738_415_616),
        ("llama13b", 13_015_864_320),
        ("llama30b", 32_528_943_616),
        ("llama65b", 65_285_660_672),
        ("llama3_8b", 8_030_261_248),
    ],
)
def test_without_a_checkpoint_a_config_is_the_model_of_its_name(name, parameters):
    spec = importlib.util.spec_from_file_location(name, _CONFIGS / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config()
    validate(config, for_plan=True)
    _, params = model_lib.abstract(config, (8, 6))
    # Touvron et al., arXiv 2302.13971, table 2, and Llama Team, arXiv 2407.21783, table 3.
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == parameters
