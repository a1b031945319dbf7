"""Every option, and every pair of options, against the reference."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import before_release, normal, quick_jit
from jax.ad_checkpoint import checkpoint_name

import lomo_jax

L, B, T, D, F, V, STEPS = 3, 8, 4, 6, 8, 11, 10


def make_params():
    return {
        "embedding": normal(0, V, D),
        "layers": {"up": normal(1, L, D, F), "down": normal(2, L, F, D), "gain": normal(3, L, D)},
        "mix": normal(4, D, D),
        "bias": normal(5, D),
    }


def make_batches():
    """Of uneven lengths, and with another dropout key each."""
    rng = np.random.default_rng(9)
    return [
        {
            "tokens": rng.integers(0, V, (B, T), np.int32),
            "length": rng.integers(1, T, B, np.int32),
            "dropout": jax.random.key(step),
        }
        for step in range(STEPS)
    ]


def loss_fn(params, batch):
    """Tied embeddings, a matrix that all layers share, dropout, a mean over uneven sequences."""
    tokens = batch["tokens"]

    def layer(x, scanned):
        w, key = scanned
        h = checkpoint_name(jnp.tanh(x @ w["up"]), "attention") @ w["down"] * w["gain"]
        h = jnp.where(jax.random.bernoulli(key, 0.8, h.shape), h / 0.8, 0.0)
        return x + h @ params["mix"], jnp.mean(h * h)

    keys = jax.random.split(batch["dropout"], L)
    x, sizes = jax.lax.scan(layer, params["embedding"][tokens], (params["layers"], keys))
    logits = jax.nn.log_softmax((x + params["bias"]) @ params["embedding"].T)
    losses = -jnp.take_along_axis(logits[:, :-1], tokens[:, 1:, None], -1)[..., 0]
    weights = (jnp.arange(1, T) <= batch["length"][:, None]).astype(jnp.float32)
    loss = 100 * jnp.sum(losses * weights) / weights.sum()
    return lomo_jax.WeightedLoss(loss, weights.sum()), {"sizes": sizes, "tokens": tokens[0]}


OPTIONS = {
    "microbatches": {"microbatches": 4},
    "clip_norm": {"clip_norm": 10.0},
    "loss_scale": {"loss_scale": 1000.0},
    # The first steps overflow float32, and some later ones again.
    "dynamic": {"loss_scale": lomo_jax.DynamicLossScale(2.0**126, 3, 2.0**4)},
    "dynamic_layers": {"loss_scale": lomo_jax.DynamicLossScale(2.0**126, 3, 2.0**4, skip="layers")},
    "stochastic": {"rounding": "stochastic"},
    "trainable": {"trainable": lambda name: name not in ("layers/up", "bias")},
    "offload": {"offload": lomo_jax.Offload(params=True, activations=True, state=True)},
    "attention": {"remat": "attention"},
    "products": {"remat": "products"},
    "none": {"remat": "none"},
}
PAIRS = [
    (a, b)
    for a, b in itertools.combinations(OPTIONS, 2)
    if OPTIONS[a].keys().isdisjoint(OPTIONS[b]) and {a, b} != {"clip_norm", "dynamic_layers"}
]
NAMES = [(name,) for name in OPTIONS] + [
    before_release(pair) if n % 18 else pytest.param(pair, marks=pytest.mark.slow)
    for n, pair in enumerate(PAIRS)
]


@pytest.mark.parametrize("names", NAMES, ids="-".join)
def test_options(names, assert_steps_agree):
    options = {key: value for name in names for key, value in OPTIONS[name].items()}
    tx = lomo_jax.adalomo(0.05, weight_decay=0.1)
    key = (
        "test_options",
        *(name for name in names if name not in ("offload", "attention", "products", "none")),
    )
    batches = make_batches()
    assert_steps_agree(loss_fn, tx, make_params(), batches, has_aux=True, key=key, **options)


@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_the_first_steps_overflow_and_some_later_ones(make_step):
    """Otherwise the comparisons with "dynamic" would compare little."""
    step = make_step(loss_fn, lomo_jax.adalomo(0.05), has_aux=True, **OPTIONS["dynamic"])
    params, batches = make_params(), make_batches()
    state = step.init(params, batches[0])
    run, finite = quick_jit(step), []
    for batch in batches:
        params, state, out = run(params, state, batch)
        finite.append(bool(out.finite))
    assert not finite[0]
    assert False in finite[finite.index(True) :]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"clip_norm": 0.0}, "clip_norm must be a number above 0, .* got 0.0"),
        ({"clip_norm": float("nan")}, "clip_norm must be a number above 0, .* got nan"),
        ({"clip_norm": True}, "clip_norm must be a number above 0, .* got True"),
        ({"clip_norm": "1"}, "clip_norm must be a number above 0, .* got '1'"),
        ({"microbatches": 0}, "microbatches must be a whole number, 1 or more, got 0"),
        ({"microbatches": 2.0}, "microbatches must be a whole number, 1 or more, got 2.0"),
        ({"loss_scale": 0.0}, "loss_scale must be a number in .*Dynamic.* got 0.0"),
        ({"loss_scale": 1e39}, r"loss_scale must be a number in .* got 1e\+39"),
        ({"loss_scale": float("inf")}, "loss_scale must be a number in .* got inf"),
        (
            {"loss_scale": "dynamic"},
            "loss_scale must be a number .*DynamicLossScale, got 'dynamic'",
        ),
        (
            {"remat": "some"},
            "remat must be one of 'full', 'attention', 'products', 'none', got 'some'",
        ),
        ({"rounding": "up"}, "rounding must be one of 'nearest', 'stochastic', got 'up'"),
        (
            OPTIONS["clip_norm"] | OPTIONS["dynamic_layers"],
            r"DynamicLossScale\(skip='layers'\) saves a .* that clip_norm needs .* skip='step'",
        ),
    ],
)
@pytest.mark.parametrize("make_step", [lomo_jax.fused_step, lomo_jax.reference_step])
def test_option_that_makes_no_sense(make_step, options, message):
    with pytest.raises(ValueError, match=message) as error:
        make_step(loss_fn, lomo_jax.lomo(0.1), **options)
    assert "\n" not in str(error.value)


def test_tx_that_was_not_made():
    with pytest.raises(TypeError, match=r"tx must be an optax transformation, such as .* got <fun"):
        lomo_jax.fused_step(loss_fn, lomo_jax.lomo)


def test_state_of_other_options():
    params, batch = make_params(), make_batches()[0]
    plain = lomo_jax.fused_step(loss_fn, lomo_jax.lomo(0.1), has_aux=True)
    state = plain.init(params, batch)
    for name in ("dynamic", "stochastic", "trainable"):
        step = lomo_jax.fused_step(loss_fn, lomo_jax.lomo(0.1), has_aux=True, **OPTIONS[name])
        with pytest.raises(ValueError, match=r"state is not the state of this .* step.init"):
            step(params, state, batch)
