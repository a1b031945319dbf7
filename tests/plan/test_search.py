"""The search for the fastest setting that fits, on GPUs with less and less memory."""

import dataclasses

import jax
import pytest

from lomo_jax import Offload
from lomo_jax.models import DecoderConfig
from lomo_jax.plan import find
from lomo_jax.plan.gpus import MEMORY_FRACTION
from lomo_jax.training import Config, ModelConfig
from lomo_jax.training.planning import compile_run
from lomo_jax.training.search import fastest, search

pytestmark = pytest.mark.plan

CONFIG = Config(
    model=ModelConfig(architecture=DecoderConfig(4096, 512, 1408, 12, 8, 8, 64)),
    batch_size=16,
    sequence_length=512,
)


@pytest.fixture(autouse=True)
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `cuda`")
    with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule mixes dtypes
        yield


def gpu_with(gib):
    """Returns a GPU on which JAX may allocate so much."""
    return dataclasses.replace(find("rtx3090"), memory_gib=gib / MEMORY_FRACTION)


def found(config, gib, devices=None):
    """Returns the settings that were compiled, and the fastest that fits."""
    settings = list(search(config, gpu_with(gib), devices))
    for setting in settings:
        assert setting.config.batch_size == config.batch_size
        assert setting.memory.fits == (setting.memory.total_gib <= gib)
    return settings, fastest(settings)


def planned(**changes):
    return compile_run(dataclasses.replace(CONFIG, **changes), find("rtx3090")).plan


@pytest.mark.exhaustive
def test_with_enough_memory_nothing_is_offloaded():
    settings, best = found(dataclasses.replace(CONFIG, offload=Offload(params=True)), 20)
    assert [setting.config.remat for setting in settings] == ["full", "attention", "products"]
    assert {setting.config.offload for setting in settings} == {Offload()}
    assert [s.flags(CONFIG) for s in settings] == [
        "",
        "--config.remat=attention",
        "--config.remat=products",
    ]
    assert best.time.step_seconds == min(s.time.step_seconds for s in settings)


@pytest.mark.exhaustive
def test_with_less_memory_layers_are_recomputed():
    full, products = planned(), planned(remat="products")
    settings, best = found(CONFIG, full.total_gib + 0.01)
    assert best.memory.fits
    assert best.memory.total_gib < products.total_gib
    assert not best.config.offload.params  # they fit
    assert len(settings) <= 5


@pytest.mark.exhaustive
def test_weights_move_to_host_memory_if_nothing_else_fits():
    # Deep, so that the weights are large beside what computing one layer takes.
    shape = dataclasses.replace(CONFIG.model.architecture, num_layers=24)
    config = dataclasses.replace(CONFIG, model=ModelConfig(architecture=shape))
    plain = compile_run(config, find("rtx3090")).plan
    weights = plain.weights_gib + plain.state_gib
    settings, best = found(config, 0.98 * weights)
    assert best.config.offload == Offload(params=True, activations=True)
    # That inputs in host memory are not enough is known without compiling.
    assert Offload(activations=True) not in [setting.config.offload for setting in settings]


@pytest.mark.exhaustive
def test_a_batch_is_split_where_its_temporaries_are_too_large():
    config = dataclasses.replace(CONFIG, batch_size=64, sequence_length=1024)
    first = compile_run(config, find("rtx3090")).plan
    room = first.total_gib - first.layer_inputs_gib - 0.5 * first.temporaries_gib
    settings, best = found(config, room)
    assert best.config.microbatches > 1
    assert {setting.config.microbatches for setting in settings} <= {1, 2, 4, 8}


@pytest.mark.parametrize("remat", ["full", "attention"])
@pytest.mark.exhaustive
def test_remat_auto_is_the_least_recomputation_that_fits(remat):
    gpu = gpu_with(planned(remat=remat).total_gib + 0.001)
    run = compile_run(dataclasses.replace(CONFIG, remat="auto"), gpu)
    assert run.config.remat == remat
    assert run.plan.fits


def test_none_fits():
    settings, best = found(CONFIG, 0.01)
    assert best is None
    assert settings
