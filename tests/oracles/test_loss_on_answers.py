"""The loss of a batch of answers, and its gradient, against transformers on each example alone."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from lomo_jax import models
from lomo_jax.data import text_dataset
from lomo_jax.models.hf_config import write_config
from lomo_jax.training import ModelConfig
from lomo_jax.training import model as model_lib
from lomo_jax.training.step import make_step

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

pytestmark = pytest.mark.oracle
T = 48


@pytest.fixture(scope="module")
def conversations(tmp_path_factory):
    """Thirty, of 2 to 4 turns, with answers of 1 to 20 letters."""
    rng = np.random.default_rng(0)

    def turns(n: int) -> list[dict]:
        letters = [
            "".join(rng.choice(list("abcdef "), rng.integers(1, 20))) + "." for _ in range(n)
        ]
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": text} for i, text in enumerate(letters)]

    path = tmp_path_factory.mktemp("data") / "chat.jsonl"
    records = [{"messages": turns(int(rng.choice([2, 4])))} for _ in range(30)]
    path.write_text("\n".join(map(json.dumps, records)))
    return path


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """The same model: ours, its parameters, and transformers' in float64."""
    config = models.DecoderConfig(257, 32, 64, 2, 4, 2, 8, max_length=64)
    theirs = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**write_config(config, "float32"))
    )
    folder = tmp_path_factory.mktemp("model")
    theirs.save_pretrained(folder)
    model = model_lib.abstract(ModelConfig(str(folder)), "float32", T)
    return model, model_lib.load_params(ModelConfig(str(folder)), model), theirs.double()


TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


def _batches(path, packing: bool, batch_size: int):
    tokenizer = model_lib.load_tokenizer(None, models.DecoderConfig(257, 8, 8, 1, 1, 1, 8))
    splits = text_dataset(
        path,
        tokenizer,
        sequence_length=T,
        batch_size=batch_size,
        template=TEMPLATE,
        packing=packing,
        eval_fraction=0,
    )
    return [next(splits.train) for _ in range(4)]


def _theirs(model, batch) -> tuple[float, int]:
    """Returns the mean loss over all answers, from one example at a time, unpacked."""
    total, count = 0.0, 0
    for row in range(len(batch["tokens"])):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            tokens, targets = batch["tokens"][row][here], batch["targets"][row][here]
            ids = torch.tensor([[*tokens, targets[-1]]], dtype=torch.long)
            labels = torch.full_like(ids, -100)
            mask = torch.tensor(batch["weights"][row][here] == 1)
            labels[0, 1:][mask] = ids[0, 1:][mask]
            number = int(mask.sum())
            if number:
                total += number * float(model(input_ids=ids, labels=labels).loss.detach())
            count += number
    return total / count, count


@pytest.mark.parametrize("microbatches", [1, 2, 4])
@pytest.mark.parametrize("packing", [True, False])
def test_loss_equals_that_of_each_example_alone(conversations, both, packing, microbatches):
    model, params, theirs = both
    step = make_step(model.loss, optax.sgd(0.0), microbatches=microbatches)
    for batch in _batches(conversations, packing, 4):
        part_weights = batch["weights"].sum(1)
        assert len(set(part_weights)) > 1  # answers are uneven
        state = step.init(params, batch)
        _, _, out = jax.jit(step)(params, state, batch)
        expected, count = _theirs(theirs, batch)
        assert count == batch["weights"].sum()
        np.testing.assert_allclose(float(out.loss), expected, rtol=1e-6)


def test_the_gradient_too(conversations, both):
    model, params, theirs = both
    [batch, *_] = _batches(conversations, packing=True, batch_size=4)
    step = make_step(model.loss, optax.sgd(1.0), microbatches=2)
    updated, _, _ = jax.jit(step)(params, step.init(params, batch), batch)

    total = 0.0
    theirs.zero_grad()
    for row in range(4):
        for segment in range(1, batch["segments"][row].max() + 1):
            here = batch["segments"][row] == segment
            ids = torch.tensor(batch["tokens"][row][here][None], dtype=torch.long)
            logits = theirs(input_ids=ids).logits[0]
            mask = torch.tensor(batch["weights"][row][here] == 1)
            targets = torch.tensor(batch["targets"][row][here], dtype=torch.long)
            if mask.any():
                losses = torch.nn.functional.cross_entropy(logits, targets, reduction="none")
                total = total + (losses * mask).sum() / float(batch["weights"].sum())
    total.backward()
    gradient = theirs.model.embed_tokens.weight.grad.numpy()
    moved = jax.tree.map(lambda old, new: old - new, params, updated)
    embedding = next(
        np.asarray(leaf)
        for path, leaf in jax.tree_util.tree_leaves_with_path(nnx.to_pure_dict(moved))
        if "embed" in jax.tree_util.keystr(path)
    )
    assert np.abs(gradient).max() > 1e-3
    np.testing.assert_allclose(embedding, gradient, atol=2e-6 * np.abs(gradient).max())
    assert jnp.isfinite(embedding).all()
