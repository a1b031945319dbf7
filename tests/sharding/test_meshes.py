"""Results do not depend on the mesh: steps on eight devices equal steps on one."""

import itertools
import warnings

import jax
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import quick_jit, tiny_llama
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

import lomo_jax
from lomo_jax import losses, models, sharding

SHAPES = [s for s in itertools.product((1, 2, 4, 8), repeat=3) if np.prod(s) == 8]  # of the meshes
B, T, V = 16, 6, 48
OPTIMIZERS = {
    "lomo": lambda: lomo_jax.lomo(0.3),
    "adalomo": lambda: lomo_jax.adalomo(1e-2),
    "adamw": lambda: optax.adamw(1e-3, eps=1e-6),
    "muon": lambda: optax.contrib.muon(1e-3),
    "muon_every_second_step": lambda: optax.MultiSteps(
        optax.contrib.muon(1e-3), 2
    ).gradient_transformation(),
}


def make_loss(tied):
    config = tiny_llama(num_heads=8, num_kv_heads=8, head_dim=4, tie_embeddings=tied)
    graphdef, params = models.init(config, seed=0)

    def loss(params, batch):
        model = nnx.merge(graphdef, params)
        x_BxTxD = model.hidden(batch["tokens"], batch["positions"], batch["segments"])
        mean, metrics = losses.next_token_loss(
            x_BxTxD, model.head(), batch["targets"], batch["weights"], chunk=5
        )
        return lomo_jax.WeightedLoss(mean, metrics.weight), metrics

    return loss, params, config


def make_batches(steps):
    rng = np.random.default_rng(0)
    for _ in range(steps):
        tokens = rng.integers(V, size=(B, T + 1), dtype=np.int32)
        yield {
            "tokens": tokens[:, :-1],
            "targets": tokens[:, 1:],
            "positions": np.tile(np.array([0, 1, 2, 3, 0, 1], np.int32), (B, 1)),
            "segments": np.tile(np.array([1, 1, 1, 1, 2, 2], np.int32), (B, 1)),
            "weights": rng.random((B, T), np.float32).round(),
        }


def run(mesh, make, optimizer, tied, steps=10, **options):
    loss, params, config = make_loss(tied)
    step = make(loss, OPTIMIZERS[optimizer](), has_aux=True, **options)
    batches = make_batches(steps)
    if mesh is not None:
        params = jax.device_put(params, models.shardings(config, params, mesh))
        if options.get("offload", lomo_jax.Offload()).params:
            params = jax.device_put(params, jax.memory.Space.Host)
        batches = (jax.device_put(b, NamedSharding(mesh, P(sharding.BATCH))) for b in batches)
    first = jax.tree.map(lambda x: x.sharding, params)
    update, state, outs = quick_jit(step), None, []
    for batch in batches:
        state = step.init(params, batch) if state is None else state
        params, state, out = update(params, state, batch)
        outs.append((out.loss, out.grad_norm, out.aux))
    same = jax.tree.map(lambda x, s: s.is_equivalent_to(x.sharding, x.ndim), params, first)
    assert all(jax.tree.leaves(same))
    return jax.device_get((params, state, outs))


@pytest.fixture(scope="module")
def on_one_device():
    results = {}

    def get(optimizer, tied, **options):
        key = (optimizer, tied, *options.items())
        if key not in results:
            results[key] = run(None, lomo_jax.fused_step, optimizer, tied, **options)
        return results[key]

    return get


def _marks(optimizer, shape):
    if optimizer == "adalomo" and shape in ((1, 8, 1), (2, 2, 2)):
        return []
    return [pytest.mark.slow, *([] if shape == (2, 2, 2) else [pytest.mark.exhaustive])]


@pytest.mark.parametrize(
    ("optimizer", "shape"),
    [
        pytest.param(optimizer, shape, marks=_marks(optimizer, shape), id=f"{optimizer}-{shape}")
        for optimizer in ("adalomo", "lomo", "adamw")
        for shape in SHAPES
    ],
)
def test_equals_one_device(optimizer, shape, on_one_device, assert_close, standard_promotion):
    case = {"optimizer": optimizer, "tied": True, "clip_norm": 0.5, "microbatches": 2}
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        actual = run(mesh, lomo_jax.fused_step, **case)
    assert_close(actual, on_one_device(**case))


@pytest.mark.parametrize("optimizer", ["muon", "muon_every_second_step"])
def test_an_optimizer_that_multiplies_sharded_matrices(
    optimizer, on_one_device, assert_close, standard_promotion
):
    case = {"optimizer": optimizer, "tied": True, "steps": 3}
    mesh = sharding.make_mesh(2, 2, 2)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "tx has another rule for .* as a whole")
        with jax.set_mesh(mesh):
            actual = run(mesh, lomo_jax.fused_step, **case)
        expected = on_one_device(**case)
    assert_close(actual, expected)


@pytest.mark.parametrize(
    "offload",
    [
        {"params": True, "activations": True},
        pytest.param({"state": True}, marks=pytest.mark.slow),
    ],
)
def test_offload_does_not_change_results(offload, on_one_device, assert_close):
    """Each device keeps its shard of a weight in host memory."""
    case = {"optimizer": "adalomo", "tied": True, "clip_norm": 0.5, "microbatches": 2}
    mesh = sharding.make_mesh(2, 2, 2)
    with jax.set_mesh(mesh):
        actual = run(mesh, lomo_jax.fused_step, **case, offload=lomo_jax.Offload(**offload))
    assert_close(actual, on_one_device(**case))
