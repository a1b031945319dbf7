"""Losses as people write them with every option of the step, against the reference."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import optax
import pytest
from helpers import before_release
from idioms import IDIOMS, Sizes
from test_idioms import STEPS, batches_of, tolerance_of

import lomo_jax

KINDS = (
    "cast_to_bfloat16",
    "axis_1",
    "fori_loop",
    "lora_merged",
    "two_calls",
    "two_ranges",
    "penalty_and_norm",
    "stages",
    "groups",
)

# The first two steps overflow float32.
SCALE = lomo_jax.DynamicLossScale(initial=2.0**126, factor=2.0**8)
OPTIONS = {
    "microbatches": {"microbatches": 2},
    "clip_norm": {"clip_norm": 0.05},
    "dynamic": {"loss_scale": SCALE},
    "dynamic_layers": {"loss_scale": dataclasses.replace(SCALE, skip="layers")},
    "stochastic": {"rounding": "stochastic"},
    "trainable": {"trainable": lambda name: not name.endswith(("down", "/a"))},
    "offload": {"offload": lomo_jax.Offload(params=True, activations=True, state=True)},
    "attention": {"remat": "attention"},
    "products": {"remat": "products"},
    "none": {"remat": "none"},
    "all": {
        "microbatches": 2,
        "clip_norm": 0.05,
        "loss_scale": lomo_jax.DynamicLossScale(),
        "rounding": "stochastic",
        "offload": lomo_jax.Offload(params=True, activations=True, state=True),
        "remat": "none",
    },
}

# Each kind with one option, and each option with one kind, are quick.
QUICK = set(zip(itertools.cycle(KINDS), OPTIONS))


# The reference does not follow the backward pass into a scan of scans.
LEFT_OUT = {("stages", "dynamic_layers"), ("groups", "dynamic_layers")}


@pytest.mark.parametrize(
    ("name", "option"),
    [
        (n, o) if (n, o) in QUICK else before_release(n, o)
        for n in KINDS
        for o in OPTIONS
        if (n, o) not in LEFT_OUT
    ],
)
def test_options(name, option, assert_steps_agree, standard_promotion):
    loss, params, batch = IDIOMS[name].make(Sizes())
    options = IDIOMS[name].options | OPTIONS[option]
    if name == "lora_merged" and option == "trainable":
        options["trainable"] = lambda name: name == "lora/b"
    tolerance = tolerance_of(loss, params, batch)
    if option in ("stochastic", "all"):
        params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params)
        batch = {k: v.astype(jnp.bfloat16) if v.ndim == 3 else v for k, v in batch.items()}
        # The same random bits round two sums of gradients that may be a rounding apart.
        tolerance = max(tolerance, 2 * float(jnp.finfo(jnp.bfloat16).eps))
    batches = batches_of(batch)
    if "dynamic" in option:
        batches = batches * 2  # the scale comes down to where steps are finite
        plain, loss = loss, lambda p, b: jax.tree.map(lambda x: 2.0**12 * x, plain(p, b))
    tx = optax.chain(optax.scale_by_trust_ratio(), optax.sgd(0.05, momentum=0.9))
    last, out = assert_steps_agree(loss, tx, params, batches, tolerance=tolerance, **options)
    assert bool(out.finite)
    if "dynamic" in option:
        assert float(last[1].loss_scale.scale) < 2.0**126
    assert len(batches) >= STEPS
    if "clip_norm" in options:
        assert float(out.grad_norm) > options["clip_norm"]  # it was clipped
