"""The initial model and the tokenizer of a run."""

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from lomo_jax import models
from lomo_jax.errors import ConfigError, UserError
from lomo_jax.training import ModelConfig
from lomo_jax.training import model as model_lib

_TINY = models.DecoderConfig(257, 8, 8, 1, 1, 1, 8)


def test_without_a_path_each_byte_is_a_token():
    tokenizer = model_lib.load_tokenizer(None, _TINY)
    text = "To be,\r\n  or\tnot — “to be”? 🤔<s>"
    tokens = tokenizer(text)["input_ids"]
    assert len(tokens) == len(text.encode())
    assert tokenizer.decode(tokens) == text
    assert tokenizer("a<|endoftext|>")["input_ids"][-1] == tokenizer.eos_token_id


def test_a_path_inside_a_package():
    import rich

    expected = Path(rich.__file__).with_name("py.typed")
    assert model_lib.resolve("package://rich/py.typed") == str(expected)


def test_any_other_path_is_a_file():
    assert model_lib.resolve("x/*.txt") == "x/*.txt"
    assert model_lib.resolve("~/x/*.txt") == str(Path.home() / "x" / "*.txt")


def test_a_file_missing_in_a_package_raises_an_error():
    with pytest.raises(UserError, match="'rich' has no 'nothing/here'"):
        model_lib.resolve("package://rich/nothing/here")


def test_without_a_checkpoint_the_config_gives_the_architecture():
    model = model_lib.abstract(ModelConfig(architecture=_TINY), "bfloat16", 512)
    assert model.config == _TINY
    assert {leaf.dtype for leaf in jax.tree.leaves(model.shapes)} == {jnp.dtype("bfloat16")}


def test_abstract_reads_the_architecture_of_a_checkpoint_but_no_weights(tmp_path):
    shape = models.DecoderConfig(40, 8, 8, 2, 1, 1, 8)
    models.save(tmp_path / "export", *models.init(shape, 0))
    (tmp_path / "export" / "model.safetensors").unlink()
    source = ModelConfig(str(tmp_path / "export"), architecture=_TINY)
    assert model_lib.abstract(source, "float32", 512).config == shape


def _attention(
    capability, *, param_dtype="bfloat16", head_dim=8, sequence_length=32, attention="auto"
) -> str:
    shape = models.DecoderConfig(257, 8, 8, 1, 1, 1, head_dim, max_length=32)
    model = model_lib.abstract(
        ModelConfig(architecture=shape),
        param_dtype,
        sequence_length,
        attention,
        capability=capability,
    )
    return "cudnn" if "'cudnn'" in repr(model.graphdef) else "xla"


@pytest.mark.parametrize(
    ("capability", "changes", "why_not"),
    [
        ((8, 0), {}, None),
        ((12, 0), {"param_dtype": "float16"}, None),
        (None, {}, "there is no NVIDIA GPU"),
        ((7, 5), {"param_dtype": "float16"}, "the GPU is older than Ampere"),
        ((9, 0), {"param_dtype": "float32"}, "param_dtype=float32"),
        ((9, 0), {"head_dim": 12}, "the model has head_dim=12"),
        ((9, 0), {"head_dim": 136}, "the model has head_dim=136"),
        ((9, 0), {"sequence_length": 31}, "sequence_length=31 is odd"),
    ],
)
def test_auto_selects_cudnn_where_it_is_supported(capability, changes, why_not):
    assert _attention(capability, attention="xla", **changes) == "xla"
    if why_not is None:
        assert _attention(capability, **changes) == "cudnn"
        assert _attention(capability, attention="cudnn", **changes) == "cudnn"
    else:
        assert _attention(capability, **changes) == "xla"
        with pytest.raises(
            ConfigError, match=f"^attention: 'cudnn' is not possible, {why_not}; .*$"
        ):
            _attention(capability, attention="cudnn", **changes)


def test_bfloat16_needs_ampere():
    with pytest.raises(
        ConfigError, match=r"^param_dtype: 'bfloat16' needs an Ampere GPU or newer; "
    ):
        _attention((7, 5))


def test_a_cpu_has_no_compute_capability():
    assert model_lib.compute_capability() is None


def test_a_tokenizer_without_an_end_of_text_gets_that_of_the_config(tmp_path):
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(WordLevel({"<unk>": 0, "a": 1, "</s>": 2}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="<unk>")
    shape = models.DecoderConfig(3, 8, 8, 1, 1, 1, 8, eos_id=(2, 1))
    models.save(tmp_path / "export", *models.init(shape, 0), tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "export").eos_token_id is None
    found = model_lib.load_tokenizer(
        str(tmp_path / "export"), models.load_config(tmp_path / "export")
    )
    assert found.eos_token_id == 2
