"""The step of a run: schedules, optimizers by name, every option of the config, padding."""

import dataclasses
import math
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from helpers import normal, quick_jit

import lomo_jax
from lomo_jax import models
from lomo_jax.fused import arrays
from lomo_jax.training import Config, ModelConfig
from lomo_jax.training import model as model_lib
from lomo_jax.training.step import make_optimizer, make_schedule, make_step
from lomo_jax.training.validation import validate

_SHAPE = models.DecoderConfig(32, 8, 16, 2, 2, 1, 4, max_length=16)
# For each option of a step: a config that sets it, the field of the step and its value.
_OPTIONS = {
    "clip_norm": ({"clip_norm": 0.25}, "clip_norm", 0.25),
    "microbatches": ({"microbatches": 4}, "microbatches", 4),
    "rounding": ({"rounding": "stochastic"}, "rounding", "stochastic"),
    "remat": ({"remat": "attention"}, "remat", "attention"),
    **{
        f"offload.{name}": (
            {"offload": lomo_jax.Offload(**{name: True})},
            "offload",
            lomo_jax.Offload(**{name: True}),
        )
        for name in ("params", "activations", "state")
    },
    "dynamic_loss_scale": (
        {"dynamic_loss_scale": True},
        "loss_scale",
        lomo_jax.DynamicLossScale(),
    ),
}


def _rates(schedule: optax.Schedule, steps: int) -> np.ndarray:
    return np.asarray([schedule(step) for step in range(steps)])


@pytest.mark.parametrize("warmup", [0.2, 2])
def test_warmup_by_fraction_and_by_steps(warmup):
    schedule = make_schedule("constant", 0.3, 10, warmup)
    np.testing.assert_allclose(_rates(schedule, 5), [0.1, 0.2, 0.3, 0.3, 0.3], rtol=1e-6)


@pytest.mark.parametrize(
    ("kind", "decay"),
    [("linear", lambda x: 1 - x), ("cosine", lambda x: (1 + math.cos(math.pi * x)) / 2)],
)
def test_decay_reaches_zero_one_step_after_the_last(kind, decay):
    schedule = make_schedule(kind, 2.0, 10, 2)
    rates = _rates(schedule, 11)
    np.testing.assert_allclose(rates[2:], [2 * decay(i / 8) for i in range(9)], atol=1e-6)
    assert np.all(rates[:10] > 0)


def test_no_warmup_starts_at_the_peak():
    np.testing.assert_allclose(_rates(make_schedule("linear", 2.0, 10, 0), 1), 2.0)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("lomo", lambda rate: lomo_jax.lomo(rate, weight_decay=0.1)),
        ("adalomo", lambda rate: lomo_jax.adalomo(rate, weight_decay=0.1)),
        ("adamw", lambda rate: optax.adamw(rate, weight_decay=0.1)),
        ("lion", lambda rate: optax.lion(rate, weight_decay=0.1)),
    ],
)
@pytest.mark.usefixtures("standard_promotion")
def test_optimizers_by_name_get_their_arguments(name, expected):
    params = {"w": jnp.linspace(-1.0, 1.0, 6).reshape(2, 3)}
    grads = {"w": jnp.cos(params["w"])}

    def update(tx):
        return tx.update(grads, tx.init(params), params)[0]["w"]

    made = make_optimizer(name, 0.1, {"weight_decay": 0.1})
    np.testing.assert_array_equal(update(made), update(expected(0.1)))


def _config(**changes) -> Config:
    fields = {
        "model": ModelConfig(init="random", architecture=_SHAPE),
        "param_dtype": "float32",
        "sequence_length": 16,
        "batch_size": 4,
        "steps": 4,
        "warmup": 0,
        "schedule": "constant",
    }
    return Config(**fields | changes)


def _abstract(config: Config) -> model_lib.Model:
    return model_lib.abstract(config.model, config.param_dtype, config.sequence_length)


def _load(config: Config) -> tuple[model_lib.Model, nnx.State]:
    model = _abstract(config)
    return model, model_lib.load_params(config.model, model)


def _make(**changes) -> lomo_jax.Step:
    config = _config(**changes)
    validate(config, for_plan=True)
    return make_step(_abstract(config).loss, config.make_optimizer(), **config.step_options())


@pytest.mark.parametrize("option", _OPTIONS)
def test_the_step_gets_each_option_of_the_config(option):
    changes, field, value = _OPTIONS[option]
    assert getattr(_make(**changes), field) == value
    assert getattr(_make(), field) != value


def test_all_options_of_a_step_are_tested():
    """Except the options that the trainer sets itself."""
    fields = {field.name for field in dataclasses.fields(lomo_jax.Step)}
    own = {"loss_fn", "tx", "has_aux", "trainable"}
    assert {field for _, field, _ in _OPTIONS.values()} == fields - own


def test_a_config_chooses_the_fused_step_or_the_reference():
    tx = lomo_jax.lomo(0.1)
    makers = {True: lomo_jax.fused_step, False: lomo_jax.reference_step}
    for fused, maker in makers.items():
        assert type(_make(fused=fused)) is type(maker(lambda params, batch: 0.0, tx))
    assert type(_make(fused=True)) is not type(_make(fused=False))


def _batch(weights: np.ndarray) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(32, size=(4, 17), dtype=np.int32)
    positions = np.broadcast_to(np.arange(16, dtype=np.int32), (4, 16))
    return {
        "tokens": tokens[:, :-1],
        "targets": tokens[:, 1:],
        "positions": positions,
        "segments": np.ones_like(positions),
        "weights": weights,
    }


def _update(batch, **changes):
    """Makes a step on `batch`; returns the parameters and the output."""
    config = _config(**changes)
    model, params = _load(config)
    step = make_step(model.loss, config.make_optimizer(), **config.step_options())
    params, _, out = jax.jit(step)(params, step.init(params, batch), batch)
    return params, out


def _padded() -> dict[str, np.ndarray]:
    """A batch with two rows that are nearly all padding."""
    weights = np.ones((4, 16), np.float32)
    weights[1::2, 2:] = 0
    return _batch(weights)


@pytest.mark.usefixtures("standard_promotion")
def test_padding_has_no_weight_for_any_number_of_microbatches(assert_close):
    fields = {"optimizer": "sgd", "learning_rate": 0.5}
    whole, out = _update(_padded(), microbatches=1, **fields)
    split, split_out = _update(_padded(), microbatches=4, **fields)
    assert_close(split, whole)
    assert float(split_out.loss) == pytest.approx(float(out.loss), rel=1e-5)
    unweighted, _ = _update(_batch(np.ones((4, 16), np.float32)), **fields)
    with pytest.raises(AssertionError):
        assert_close(unweighted, whole)


@pytest.fixture(scope="module")
def plain():
    """The parameters after a step of the unchanged config."""
    return _update(_padded())[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("optimizer", "lomo"),
        ("optimizer_kwargs", {"weight_decay": 0.5}),
        ("learning_rate", 0.125),
        ("schedule", "linear"),
        ("warmup", 2),
    ],
)
def test_a_field_of_the_optimizer_changes_the_update(field, value, plain, assert_close):
    changed, _ = _update(_padded(), **{field: value})
    is_first_step_the_same = field == "schedule"  # b1 has an effect from the second step on
    if is_first_step_the_same:
        assert_close(changed, plain, tolerance=0)
    else:
        with pytest.raises(AssertionError):
            assert_close(changed, plain)


def test_clipping_bounds_the_update():
    fields = {"optimizer": "lomo", "learning_rate": 1.0, "clip_norm": 0.01}
    config = _config(**fields)
    _, before = _load(config)
    after, out = _update(_padded(), **fields)
    assert float(out.grad_norm) > 0.01
    squares = jax.tree.map(lambda a, b: jnp.sum((a - b) ** 2), after, before)
    assert float(sum(jax.tree.leaves(squares))) ** 0.5 == pytest.approx(0.01, rel=1e-3)


def test_skip_nonfinite_uses_a_constant_loss_scale_of_one():
    """A step that is not finite changes neither parameters nor scale."""
    config = _config(skip_nonfinite=2, optimizer="lomo")
    model, params = _load(config)
    step = make_step(model.loss, config.make_optimizer(), **config.step_options())
    state = step.init(params, _padded())
    bad = _padded() | {"weights": np.full((4, 16), np.nan, np.float32)}
    for batch, is_finite in ((bad, False), (_padded(), True)):
        new_params, state, out = jax.jit(step)(params, state, batch)
        assert bool(out.finite) == is_finite
        assert float(state.loss_scale.scale) == 1.0
        is_same = jax.tree.map(lambda a, b: bool((a == b).all()), new_params, params)
        assert all(jax.tree.leaves(is_same)) != is_finite


@pytest.mark.parametrize("name", ["adamw", "lomo", "adafactor"])
def test_the_weights_of_norms_biases_and_embeddings_do_not_decay(name, standard_promotion):
    params = {
        "embedding": jnp.ones((4, 4)),
        "layers": {"norm": {"scale": jnp.ones(4)}, "q": {"kernel": jnp.ones((4, 4))}},
        "output": {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)},
    }
    decay = "weight_decay_rate" if name == "adafactor" else "weight_decay"

    def decayed(mask):
        tx = make_optimizer(name, 0.5, {decay: 0.5}, decay_mask=mask)
        zeros = jax.tree.map(jnp.zeros_like, params)
        updates, _ = tx.update(zeros, tx.init(params), params)
        names = arrays.names(params)
        return {n for n, u in zip(names, jax.tree.leaves(updates), strict=True) if u.any()}

    assert decayed("matrices") == {"layers/q/kernel", "output/kernel"}
    assert decayed("layers/.*kernel") == {"layers/q/kernel"}
    assert decayed("all") == set(arrays.names(params))


@pytest.mark.parametrize("name", ["muon", "schedule_free_adamw", "ademamix"])
def test_optimizers_of_optax_contrib_can_be_fused(name, standard_promotion, assert_close):
    def loss(params, x):
        x, _ = jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["layers"])
        return jnp.mean(x**2)

    params, x = {"layers": normal(0, 3, 6, 6)}, normal(1, 4, 6)
    tx = make_optimizer(name, 0.1, {})
    results = []
    for make in (lomo_jax.fused_step, lomo_jax.reference_step):
        step = make(loss, tx)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # muon has a rule by ndim
            state = step.init(params, x)
        new, state, _ = quick_jit(step)(params, state, x)
        results.append(quick_jit(step)(new, state, x)[0])
    assert_close(*results, tolerance=1e-4)
