import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
from flax import nnx
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lomo_jax import models
from lomo_jax.errors import UserError
from lomo_jax.models import generation
from lomo_jax.models.sampling import keep_likely

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
    assert models.generate(*model, PROMPT_BxT, 4) == expected_BxN[:, 5:].tolist()


def test_prompts_of_different_lengths_do_not_affect_each_other(model):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6, 5, 3], [7], [2, 7, 1], [8, 2]]
    together = models.generate(*model, prompts, 6)
    assert together == [models.generate(*model, [prompt], 6)[0] for prompt in prompts]
    assert together == models.generate(*model, prompts, 6, batch_size=3)


def test_a_long_prompt_is_read_in_parts(model, monkeypatch):
    prompts = [[3, 1, 4, 1, 5, 9, 2, 6] * 4, [2, 7, 1]]
    expected = models.generate(*model, prompts, 6)
    monkeypatch.setattr(generation, "_READ_AT_ONCE", 8)
    generation._read_prompts.clear_cache()
    assert models.generate(*model, prompts, 6) == expected


def test_samples_follow_the_distribution_at_the_temperature(model):
    logits_V = nnx.merge(*model)(jnp.array(PROMPT_BxT[:1]))[0, -1]
    expected_V = 4000 * scipy.special.softmax(np.float64(logits_V) / 2.0)
    copies = np.repeat(PROMPT_BxT[:1], 4000, axis=0)
    sampling = models.Sampling(temperature=2.0)
    sampled = models.generate(*model, copies, 1, sampling=sampling, batch_size=1000)
    found_V = np.bincount(np.ravel(sampled), minlength=CONFIG.vocab_size)
    assert expected_V.min() > 5  # what a chi-square test needs
    assert scipy.stats.chisquare(found_V, expected_V).pvalue > 1e-3


@pytest.mark.parametrize(
    "sampling",
    [
        models.Sampling(temperature=1.0, top_k=4),
        models.Sampling(temperature=1.0, top_p=0.8),
        models.Sampling(temperature=1.0, min_p=0.2),
        models.Sampling(temperature=1.0, typical_p=0.8),
    ],
)
def test_samples_are_of_the_tokens_that_stay(model, sampling):
    logits_V = nnx.merge(*model)(jnp.array(PROMPT_BxT[:1]))[0, -1]
    p_V = scipy.special.softmax(np.float64(keep_likely(logits_V[None], sampling)[0]))
    copies = np.repeat(PROMPT_BxT[:1], 4000, axis=0)
    sampled = models.generate(*model, copies, 1, sampling=sampling, batch_size=1000)
    found_V = np.bincount(np.ravel(sampled), minlength=CONFIG.vocab_size)
    stays = p_V > 0
    assert 1 < stays.sum() < CONFIG.vocab_size
    assert found_V[~stays].sum() == 0
    assert scipy.stats.chisquare(found_V[stays], 4000 * p_V[stays]).pvalue > 1e-3


def test_sampling_depends_on_the_seed_alone(model):
    def sample(seed, **options):
        sampling = models.Sampling(temperature=3.0)
        return models.generate(*model, PROMPT_BxT, 12, sampling=sampling, seed=seed, **options)

    assert sample(0) == sample(0) == sample(0, batch_size=1)
    assert sample(0) != sample(1)
    assert sample(0)[0] != sample(0)[1]


def test_samples_at_different_positions_are_independent(model):
    uniform = jax.tree.map(jnp.zeros_like, model[1])  # every token is equally likely
    prompts = np.repeat(PROMPT_BxT[:1], 20_000, axis=0)
    sampling = models.Sampling(temperature=1.0)
    sampled = models.generate(model[0], uniform, prompts, 2, sampling=sampling, batch_size=5000)
    first, second = np.transpose(sampled)
    equal = np.mean(first == second)
    assert equal == pytest.approx(1 / CONFIG.vocab_size, abs=4 * (1 / 13 / 20_000) ** 0.5)


def test_a_text_ends_before_a_stop_token(model):
    whole = models.generate(*model, PROMPT_BxT, 10)
    stop = whole[0][3]
    expected = [row[: row.index(stop)] if stop in row else row for row in whole]
    assert models.generate(*model, PROMPT_BxT, 10, stop_tokens=[stop]) == expected


def test_a_text_ends_when_it_is_finished(model):
    """A look every 16 tokens, and no token after the first one with which the text is enough."""
    prompts = [[3, 1], [2]]
    whole = models.generate(*model, prompts, 36)
    found = models.generate(*model, prompts, 36, is_finished=lambda new: len(new) >= 21)
    assert found == [row[:21] for row in whole]


def test_texts_end_before_a_stop_string(smallest_tokenizer, model):
    whole = models.generate_text(*model, smallest_tokenizer, ["b c", "d"], 12)
    stop = whole[0][6:9]
    found = models.generate_text(*model, smallest_tokenizer, ["b c", "d"], 12, stop_strings=[stop])
    assert found == [text.partition(stop)[0] for text in whole]
    assert found != whole


@pytest.fixture
def smallest_tokenizer():
    words = {letter: number for number, letter in enumerate("abcdefghijklm")}
    backend = Tokenizer(tokenizer_models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a")


@pytest.mark.parametrize(("length", "expected"), [(1, 16), (16, 16), (17, 24), (25, 32), (65, 96)])
def test_few_lengths_are_compiled(length, expected):
    assert generation.bucket(length) == expected


def test_weights_may_be_in_host_memory(model):
    params = jax.device_put(model[1], jax.memory.Space.Host)
    expected = models.generate(*model, PROMPT_BxT, 4)
    assert models.generate(model[0], params, PROMPT_BxT, 4) == expected


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_low_precision_continues_as_without_a_cache(model, dtype):
    params = jax.tree.map(lambda x: x.astype(dtype), model[1])
    found = models.generate(model[0], params, PROMPT_BxT, 4)
    rows = np.concatenate([PROMPT_BxT, found], axis=1)
    logits_BxTxV = nnx.merge(model[0], params)(jnp.array(rows))[:, 4:-1]
    chosen_BxN = np.take_along_axis(np.asarray(logits_BxTxV), np.array(found)[:, :, None], axis=-1)[
        ..., 0
    ]
    # The cache rounds elsewhere: the chosen token is the best but for a rounding.
    best_BxN = np.asarray(logits_BxTxV.max(axis=-1))
    np.testing.assert_allclose(chosen_BxN, best_BxN, atol=0.05 * np.abs(best_BxN).max(), rtol=0)


def test_bad_prompts_and_settings_are_one_line(model):
    generate = functools.partial(models.generate, *model)
    with pytest.raises(UserError, match="are 41 tokens, more than the model's max_length=40"):
        generate(PROMPT_BxT, 36)
    with pytest.raises(UserError, match="a prompt has no tokens"):
        generate([[1], []], 2)
    with pytest.raises(UserError, match="has the token 13, but the model only 13"):
        generate([[13]], 2)
    with pytest.raises(UserError, match="max_new_tokens=0 must be 1 or more"):
        generate(PROMPT_BxT, 0)
    for field, value in (("top_p", 0.0), ("top_k", 0), ("temperature", -1.0), ("min_p", 2.0)):
        with pytest.raises(UserError, match=f"{field}={value} must be"):
            generate(PROMPT_BxT, 2, sampling=models.Sampling(**{field: value}))
