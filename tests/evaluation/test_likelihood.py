"""Log-likelihoods of continuations, and the choices that they rank."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import tiny_llama
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import PreTrainedTokenizerFast

from lomo_jax import evaluation, models, sharding
from lomo_jax.errors import UserError
from lomo_jax.evaluation import Question, encode_pair
from lomo_jax.models import generation

CONFIG = tiny_llama(max_length=40)
PROMPTS = [
    ([3, 1, 4, 1, 5], [[9, 2], [6], [5, 3, 5, 8]]),
    ([2], [[7, 1, 8], [2]]),
    ([8, 2, 8, 4, 5, 9, 0, 4, 5], [[2]]),
]


@pytest.fixture(scope="module")
def model():
    graphdef, params = models.abstract(CONFIG)
    rng = np.random.default_rng(0)
    return graphdef, jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.4, x.shape)), params)


def each_alone(model, prompts):
    """Returns log-likelihoods from one whole row for each prompt and continuation."""
    log_probs = jax.jit(lambda params, row: jax.nn.log_softmax(nnx.merge(model[0], params)(row)))
    found = []
    for prompt, continuations in prompts:
        found.append([])
        for continuation in continuations:
            row_TxV = np.asarray(log_probs(model[1], np.array([[*prompt, *continuation]])))[0]
            start = len(prompt) - 1
            scored = row_TxV[start : start + len(continuation)]
            total = sum(line[token] for line, token in zip(scored, continuation, strict=True))
            greedy = (scored.argmax(axis=1) == continuation).all()
            found[-1].append((total, greedy, len(continuation)))
    return found


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        for one, other in zip(a, b, strict=True):
            assert one[0] == pytest.approx(other[0], abs=1e-4)
            assert one[1:] == tuple(other[1:])


@pytest.mark.parametrize("batch_size", [1, 2, 8])
def test_continuations_do_not_see_each_other(model, batch_size):
    found = evaluation.log_likelihoods(*model, PROMPTS, batch_size=batch_size)
    assert_same(found, each_alone(model, PROMPTS))


def test_windows_count_from_the_text_and_not_from_the_row():
    config = dataclasses.replace(CONFIG, window=3)
    graphdef, params = models.abstract(config)
    rng = np.random.default_rng(1)
    params = jax.tree.map(lambda x: jnp.float32(rng.normal(0, 0.4, x.shape)), params)
    found = evaluation.log_likelihoods(graphdef, params, PROMPTS)
    assert_same(found, each_alone((graphdef, params), PROMPTS))


def test_a_greedy_continuation_is_called_greedy(model):
    new = models.generate(*model, [PROMPTS[0][0]], 4)[0]
    other = [new[0], (new[1] + 1) % CONFIG.vocab_size, *new[2:]]
    found = evaluation.log_likelihoods(*model, [(PROMPTS[0][0], [new, other, new[:1]])])[0]
    assert [each.is_greedy for each in found] == [True, False, True]


def test_a_long_row_is_read_in_parts(model, monkeypatch):
    expected = evaluation.log_likelihoods(*model, PROMPTS)
    monkeypatch.setattr(generation, "_READ_AT_ONCE", 4)
    jax.clear_caches()
    assert_same(evaluation.log_likelihoods(*model, PROMPTS), expected)


@pytest.mark.parametrize("shape", [(1, 8, 1), (2, 2, 2)])
def test_all_devices_find_the_same(model, shape):
    expected = evaluation.log_likelihoods(*model, PROMPTS)
    mesh = sharding.make_mesh(*shape)
    with jax.set_mesh(mesh):
        params = jax.device_put(model[1], models.shardings(CONFIG, model[1], mesh))
        assert_same(evaluation.log_likelihoods(model[0], params, PROMPTS), expected)


def test_bad_texts_are_one_line(model):
    for prompts, message in (
        ([([], [[1]])], "has no tokens"),
        ([([1], [[]])], "has no tokens"),
        ([([1] * 40, [[1, 2]])], "are 42 tokens, more than the model's max_length=40"),
        ([([1], [[48]])], "has the token 48, but the model only 48"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.log_likelihoods(*model, prompts)


@pytest.fixture(scope="module")
def tokenizer():
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3, "c": 4, "d": 5, "é": 6}
    backend = Tokenizer(tokenizer_models.WordLevel(words, unk_token="a"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")


def test_choices_are_ranked_in_four_ways(model, tokenizer):
    question = Question("a b", (" c", " c d", " é a b"), (1,))
    tokens = [[4], [4, 5], [6, 2, 3]]
    found = evaluation.log_likelihoods(*model, [([2, 3], tokens), ([0], tokens)])
    sums, without = ([each.log_likelihood for each in row] for row in found)
    values = {
        "sum": sums,
        "token": np.divide(sums, [1, 2, 3]),
        "byte": np.divide(sums, [2, 4, 7]),
        "unconditional": np.subtract(sums, without),
    }
    for rank, expected in values.items():
        answers = evaluation.answer(*model, tokenizer, [question], rank=rank)
        assert answers.chosen == [int(np.argmax(expected))]
        assert answers.accuracy == float(np.argmax(expected) == 1)
    assert len({int(np.argmax(each)) for each in values.values()}) > 1  # the ranking matters


def test_an_end_of_text_may_belong_to_each_choice(model, tokenizer):
    question = Question("a b", (" c", " d"), (0,), with_end=True)
    found = evaluation.answer(*model, tokenizer, [question]).likelihoods[0]
    expected = evaluation.log_likelihoods(*model, [([2, 3], [[4, 1], [5, 1]])])[0]
    assert found == expected


def test_the_last_batch_counts_its_questions_alone(model, tokenizer):
    questions = [Question("a b", (" c", " d"), (n % 2,)) for n in range(5)]
    chosen = evaluation.answer(*model, tokenizer, questions, batch_size=4)
    assert chosen.accuracy == pytest.approx((3 if chosen.chosen[0] == 0 else 2) / 5)


def test_spaces_at_the_end_of_a_prompt_belong_to_the_answer(tokenizer):
    assert encode_pair(tokenizer, "a b ", "c") == ([2, 3], [4])
    assert encode_pair(tokenizer, "", "c d") == ([0], [4, 5])


def test_an_unknown_ranking_is_one_line(model, tokenizer):
    with pytest.raises(UserError, match=r"rank='tokens' is not one of .* did you mean 'token'"):
        evaluation.answer(*model, tokenizer, [Question("a", ("b",), (0,))], rank="tokens")
