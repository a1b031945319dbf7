"""A tokenizer small enough to read: the words w0, w1, ... are tokens 0, 1, ..."""

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

END = 5000
BEGIN = 5001
UNKNOWN = 5002


def _vocabulary() -> dict[str, int]:
    return {f"w{i}": i for i in range(END)} | {"</s>": END, "<s>": BEGIN, "<unk>": UNKNOWN}


def _backend() -> Tokenizer:
    backend = Tokenizer(models.WordLevel(_vocabulary(), unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()  # pyright: ignore
    return backend


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    """Adds nothing itself; its end-of-text token is `END`."""
    return PreTrainedTokenizerFast(tokenizer_object=_backend(), eos_token="</s>")


@pytest.fixture(scope="session")
def bracketing_tokenizer() -> PreTrainedTokenizerFast:
    """Puts `BEGIN` before and `END` after every text itself."""
    backend = _backend()
    backend.post_processor = processors.TemplateProcessing(  # pyright: ignore
        single="<s> $A </s>", special_tokens=[("<s>", BEGIN), ("</s>", END)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token="<s>", eos_token="</s>")
