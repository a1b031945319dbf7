import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from lomo_jax import models

CONFIG = models.DecoderConfig(
    vocab_size=13,
    width=16,
    mlp_width=24,
    num_layers=2,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
    max_length=40,
)
PROMPT_BxT = np.array([[3, 1, 4, 1, 5], [2, 7, 1, 8, 2]])


@pytest.fixture(scope="module")
def model():
    graphdef, params = models.abstract(CONFIG)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.4, x.shape)), params)


def test_greedy_chooses_the_most_likely_tokens(model):
    expected_BxN = jnp.array(PROMPT_BxT)
    logits_of = jax.jit(nnx.merge(*model).__call__)
    for _ in range(4):
        next_B = logits_of(expected_BxN)[:, -1].argmax(axis=-1)
        expected_BxN = jnp.concatenate([expected_BxN, next_B[:, None]], axis=1)
    chex.assert_trees_all_equal(
        models.generate(model[0], model[1], PROMPT_BxT, 4), np.array(expected_BxN)
    )


def test_samples_follow_the_distribution_at_the_temperature(model):
    logits_V = nnx.merge(*model)(jnp.array(PROMPT_BxT[:1]))[0, -1]
    probability_V = jax.nn.softmax(logits_V / 2.0)
    copies = np.repeat(PROMPT_BxT[:1], 20_000, axis=0)
    sampled = models.generate(model[0], model[1], copies, 1, temperature=2.0)[:, -1]
    frequency_V = np.bincount(sampled, minlength=CONFIG.vocab_size) / len(sampled)
    # Four standard deviations of a frequency near 1 / 2.
    chex.assert_trees_all_close(frequency_V, np.array(probability_V), atol=4 * 0.5 / 20_000**0.5)


def test_sampling_depends_on_the_seed_alone(model):
    def sample(seed):
        return models.generate(
            model[0], model[1], PROMPT_BxT, 12, temperature=3.0, seed=seed
        ).tolist()

    assert sample(0) == sample(0)
    assert sample(0) != sample(1)


def test_samples_at_different_positions_are_independent(model):
    uniform = jax.tree.map(jnp.zeros_like, model[1])  # every token is equally likely
    prompts = np.repeat(PROMPT_BxT[:1], 20_000, axis=0)
    sampled = models.generate(model[0], uniform, prompts, 2, temperature=1.0)
    equal = np.mean(sampled[:, -1] == sampled[:, -2])
    assert equal == pytest.approx(1 / CONFIG.vocab_size, abs=4 * (1 / 13 / 20_000) ** 0.5)


def test_bad_prompts_are_reported(model):
    with pytest.raises(ValueError, match="are 41 tokens, more than the model's max_length=40"):
        models.generate(model[0], model[1], PROMPT_BxT, 36)
    with pytest.raises(ValueError, match=r"shape \(3,\) must be \[batch, prompt length > 0\]"):
        models.generate(model[0], model[1], np.array([1, 2, 3]), 2)
