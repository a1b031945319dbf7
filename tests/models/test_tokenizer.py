"""A tokenizer.model without a tokenizer.json, as older models have."""

from pathlib import Path

import pytest
import sentencepiece
from small_models import CONFIG, graphdef_of, random_params

from lomo_jax import models


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_a_sentencepiece_model_alone_tokenises_as_sentencepiece_does(tmp_path, kind):
    models.save(tmp_path, graphdef_of(CONFIG), random_params(CONFIG, 0))
    readme = Path(__file__).parents[2] / "README.md"
    sentencepiece.SentencePieceTrainer.train(
        input=str(readme),
        model_prefix=str(tmp_path / "tokenizer"),
        vocab_size=600,
        model_type=kind,
        byte_fallback=True,
        minloglevel=2,
    )
    theirs = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / "tokenizer.model"))
    ours = models.tokenizer(tmp_path)
    text = "A layer's gradient is computed, applied and forgotten: naïvely, 記憶."
    assert ours(text, add_special_tokens=False)["input_ids"] == theirs.encode(text)
    assert ours.eos_token_id == theirs.eos_id()
