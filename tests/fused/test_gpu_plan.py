"""Memory of the fused step as XLA plans it for an RTX 3090, without one."""

import functools
import re

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import lomo_jax
from lomo_jax import models
from lomo_jax.losses import next_token_loss
from lomo_jax.plan import gpus, make_mesh

pytestmark = pytest.mark.plan

B, T, D, F, V = 4, 512, 2048, 5504, 32000
LAYER_INPUT = B * T * D * 2
LAYER = 2 * (4 * D * D + 3 * D * F)

RULES = {
    "lomo": lambda: lomo_jax.lomo(1e-2),
    "adalomo": lambda: lomo_jax.adalomo(1e-3, weight_decay=0.1),
    "adamw": lambda: optax.adamw(1e-3),
}


@pytest.fixture(scope="module")
def sharding():
    pytest.importorskip("jax_cuda13_plugin", reason="needs the extra `cuda`")
    return jax.sharding.SingleDeviceSharding(make_mesh(gpus.find("rtx3090")).devices.item())


def compiled(make_step, tx, num_layers, sharding):
    config = models.DecoderConfig(
        vocab_size=V,
        width=D,
        mlp_width=F,
        num_layers=num_layers,
        num_heads=16,
        num_kv_heads=16,
        head_dim=128,
        rope_theta=1e4,
        norm_eps=1e-5,
        max_length=2048,
        tie_embeddings=False,
    )
    graphdef, params = models.abstract(config, jnp.bfloat16)

    def loss(params, tokens):
        llama = nnx.merge(graphdef, params)
        weights = jnp.ones(tokens.shape, jnp.float32)
        return next_token_loss(llama.hidden(tokens), llama.head(), tokens, weights)[0]

    step = make_step(loss, tx)
    tokens = jax.ShapeDtypeStruct((B, T), jnp.int32)
    state = jax.eval_shape(step.init, params, tokens)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), (params, state, tokens)
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


def copies_of_stacks(executable, num_layers):
    pattern = rf"= \w+\[{num_layers},\d{{4,}},\d{{4,}}\]\S* copy(?:-start)?\("
    return [line for line in executable.as_text().splitlines() if re.search(pattern, line)]


@pytest.mark.parametrize(
    "rule", [n if n == "adalomo" else pytest.param(n, marks=pytest.mark.exhaustive) for n in RULES]
)
def test_no_copy_of_a_stack_and_one_layer_of_gradient(rule, sharding, standard_promotion):
    few, many = (compiled(lomo_jax.fused_step, RULES[rule](), n, sharding) for n in (6, 12))
    assert copies_of_stacks(few, 6) == []
    assert copies_of_stacks(many, 12) == []
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    # XLA packs buffers into one heap, and how well depends on their sizes.
    assert growth < 6 * LAYER_INPUT + 0.25 * LAYER


OPTIONS = {
    "microbatches": {"microbatches": 4},
    "clip_norm": {"clip_norm": 1.0},
    "all": {
        "microbatches": 4,
        "clip_norm": 1.0,
        "loss_scale": lomo_jax.DynamicLossScale(),
        "rounding": "stochastic",
    },
}


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n == "all" else pytest.mark.exhaustive) for n in OPTIONS]
)
def test_options_hold_one_layer_of_gradient_too(name, sharding, standard_promotion):
    step = functools.partial(lomo_jax.fused_step, **OPTIONS[name])
    few, many = (compiled(step, lomo_jax.adalomo(1e-3), n, sharding) for n in (6, 12))
    assert copies_of_stacks(few, 6) == []
    assert copies_of_stacks(many, 12) == []
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert growth < 6 * LAYER_INPUT + 0.25 * LAYER
    # The gradient of the head, in float32 if it is summed up, and as much again while it is made.
    head = V * D * (4 if "microbatches" in OPTIONS[name] else 2)
    assert few.memory_analysis().temp_size_in_bytes < 6 * LAYER_INPUT + 2 * head + 3 * LAYER


@pytest.mark.exhaustive
def test_the_reference_grows_with_the_parameters(sharding, standard_promotion):
    few, many = (
        compiled(lomo_jax.reference_step, lomo_jax.lomo(1e-2), n, sharding) for n in (6, 12)
    )
    growth = many.memory_analysis().temp_size_in_bytes - few.memory_analysis().temp_size_in_bytes
    assert growth > 6 * LAYER
