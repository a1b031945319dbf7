"""The configs that ship with the package."""

import jax
import pytest

from lomo_jax import lora
from lomo_jax.training import model as model_lib
from lomo_jax.training.config_reader import read_config
from lomo_jax.training.validation import validate


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
def test_without_a_checkpoint_a_config_has_the_architecture_of_its_name(name, parameters):
    config = read_config(name)
    validate(config, for_plan=True)
    model = model_lib.abstract(
        config.model, config.param_dtype, config.sequence_length, capability=(8, 6)
    )
    # Touvron et al., arXiv 2302.13971, table 2, and Llama Team, arXiv 2407.21783, table 3.
    assert sum(leaf.size for leaf in jax.tree.leaves(model.shapes)) == parameters


@pytest.mark.parametrize(
    ("name", "rank", "trained"),
    # Seven linear maps of 32 layers: four of 4096 x 4096, three of 4096 x 11008.
    [
        ("lora", 16, 32 * 16 * (4 * 8192 + 3 * 15104)),
        ("qlora", 16, 32 * 16 * (4 * 8192 + 3 * 15104)),
        ("lora_lomo", 2, 32 * 2 * 2 * 8192),
    ],
)
def test_configs_with_adapters(name, rank, trained):
    config = read_config(name)
    validate(config, for_plan=True)
    assert config.lora.rank == rank
    model = model_lib.abstract(
        config.model, config.param_dtype, 512, capability=(8, 6), adapters=config.lora
    )
    adapters, _ = lora.split(model.shapes)
    assert sum(leaf.size for leaf in jax.tree.leaves(adapters)) == trained
