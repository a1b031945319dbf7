"""Transfers run beside matrix products, in the programs that XLA plans for GPUs.

A byte is hidden if a product is scheduled between the start of its transfer and the end.
"""

import collections
import dataclasses

import jax
import pytest

from lomo_jax import Offload, models
from lomo_jax.plan import GPU, Program, find
from lomo_jax.plan.gpus import MEMORY_FRACTION
from lomo_jax.plan.kernels import Reader, is_free
from lomo_jax.training import Config, MeshConfig, ModelConfig
from lomo_jax.training.planning import compile_run

pytestmark = pytest.mark.plan

# LLaMA-7B with 8 of its 32 layers, on 4 x 1024 tokens for each GPU.
WIDE = models.DecoderConfig(32000, 4096, 11008, 8, 32, 32, 128)
WEIGHT = 4096 * 11008 * 2 / 2**30  # GiB
ON_HOST = Offload(params=True, activations=True)


@pytest.fixture(scope="module", autouse=True)
def compiler():
    pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `cuda`")
    with jax.numpy_dtype_promotion("standard"):  # optax's cosine schedule mixes dtypes
        yield


def compiled(gpu="rtx3090", devices=1, layers=8, **fields):
    model = ModelConfig(architecture=dataclasses.replace(WIDE, num_layers=layers))
    config = Config(model=model, sequence_length=1024, param_dtype="bfloat16", **fields)
    return compile_run(config, gpu if isinstance(gpu, GPU) else find(gpu), devices)


def hidden(run):
    """Returns the hidden share of the bytes: sent to other devices, from the host, to the host."""
    program = Program.parse(run.executable.as_text())
    reader, moved, beside = Reader(program), collections.Counter(), collections.Counter()
    for instructions, trips in program.scheduled():
        under_way = {}  # by the start's name: queue, bytes, whether a product has run
        for i in instructions:
            if i.opcode.endswith("-done"):
                queue, size, is_hidden = under_way.pop(i.operands[0], ("", 0, False))
                beside[queue] += size * is_hidden
            elif any(reader.products(i)):
                under_way = {name: (*started[:2], True) for name, started in under_way.items()}
            elif not is_free(i):
                traffic, sent = reader.traffic(i), reader.sent(i)
                bytes_of = {"from host": traffic.from_host, "to host": traffic.to_host}
                for queue, size in (bytes_of if sent is None else {"sent": sent}).items():
                    moved[queue] += size * (trips[0] if trips else 1)
                    if size and i.opcode.endswith("-start"):
                        under_way[i.name] = queue, size * (trips[0] if trips else 1), False
    return {queue: beside[queue] / size for queue, size in moved.items() if size}


def copied(run):
    """Returns the GiB of the largest array that is copied as it is."""
    program = Program.parse(run.executable.as_text())
    instructions = program.instructions().values()
    return max(i.arrays[0].size for i in instructions if i.opcode.startswith("copy")) / 2**30


FULL_DEPTH = pytest.param(32, marks=pytest.mark.exhaustive)


@pytest.mark.parametrize("gpu", ["rtx3090", pytest.param("h100", marks=pytest.mark.exhaustive)])
@pytest.mark.parametrize("layers", [8, FULL_DEPTH])
def test_weights_and_gradients_are_sent_beside_products(gpu, layers):
    run = compiled(gpu, 8, layers, mesh=MeshConfig(1, 8, 1), batch_size=32)
    assert hidden(run)["sent"] >= 0.9
    assert copied(run) <= WEIGHT
    if layers == 8:  # two weights more than without overlap
        assert run.plan.total_gib < 1.29 + 2 * WEIGHT


@pytest.mark.parametrize("mesh", [MeshConfig(8, 1, 1), MeshConfig(2, 4, 1)])
@pytest.mark.exhaustive
def test_gradients_are_summed_beside_products(mesh):
    assert hidden(compiled("rtx3090", 8, mesh=mesh, batch_size=32))["sent"] >= 0.8


@pytest.mark.parametrize("layers", [8, FULL_DEPTH])
@pytest.mark.parametrize(
    "optimizer", ["adalomo", pytest.param("adamw", marks=pytest.mark.exhaustive)]
)
def test_layers_are_copied_to_the_host_and_back_beside_products(layers, optimizer):
    offload = dataclasses.replace(ON_HOST, state=optimizer == "adamw")
    run = compiled(layers=layers, offload=offload, batch_size=4, optimizer=optimizer)
    found = hidden(run)
    assert found["from host"] >= 0.85
    assert found["to host"] >= 0.75
    assert copied(run) <= 32000 * 4096 * 2 / 2**30  # the embedding
    if optimizer == "adalomo" and layers == 8:
        assert run.plan.total_gib < 1.2 + 2 * WEIGHT


def test_saved_products_are_copied_to_the_host_and_back_beside_products():
    offload = Offload(activations=True)
    found = hidden(compiled(offload=offload, remat="products", batch_size=16))
    assert found["from host"] >= 0.85
    assert found["to host"] >= 0.75


def test_near_the_limit_of_memory_nothing_else_is_computed_again():
    """XLA reckons with a smaller limit, and would recompute products to respect it."""
    fields = {"offload": Offload(activations=True), "batch_size": 4}
    run = compiled(**fields)
    small = dataclasses.replace(
        find("rtx3090"), memory_gib=(run.plan.total_gib + 0.01) / MEMORY_FRACTION
    )
    other = compiled(small, **fields)
    assert other.plan.fits
    assert other.time.flops == run.time.flops
