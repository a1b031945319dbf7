"""Reading GGUF files of llama.cpp: shape, weights and tokenizer.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lomo_jax._schema import gguf_metadata, short
from lomo_jax.errors import UserError, library_errors_are_the_users
from lomo_jax.models import gguf_file
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.families import FAMILIES, Layout
from lomo_jax.models.gguf_file import StoredTensor
from lomo_jax.models.hf_config import read_config
from lomo_jax.models.weights import Tensor, assemble

_BLOCK = "blk.{}."
_NAMES = {
    "embedding": "token_embd",
    "layers/attention_norm": f"{_BLOCK}attn_norm",
    "layers/attention/q": f"{_BLOCK}attn_q",
    "layers/attention/k": f"{_BLOCK}attn_k",
    "layers/attention/v": f"{_BLOCK}attn_v",
    "layers/attention/q_norm": f"{_BLOCK}attn_q_norm",
    "layers/attention/k_norm": f"{_BLOCK}attn_k_norm",
    "layers/attention/o": f"{_BLOCK}attn_output",
    "layers/attention_post_norm": f"{_BLOCK}post_attention_norm",
    "layers/mlp_norm": f"{_BLOCK}ffn_norm",
    "layers/mlp/gate": f"{_BLOCK}ffn_gate",
    "layers/mlp/up": f"{_BLOCK}ffn_up",
    "layers/mlp/down": f"{_BLOCK}ffn_down",
    "layers/mlp_post_norm": f"{_BLOCK}post_ffw_norm",
    "norm": "output_norm",
    "output": "output",
}


class _Architecture(NamedTuple):
    """What llama.cpp calls a family, and how it stores it."""

    family: str
    layout: Layout


_PLAIN = Layout(_NAMES)
_GEMMA = Layout(_NAMES, scale_offset=1.0)  # norms are stored with the 1 that the model adds
_ARCHITECTURES = {
    "llama": _Architecture("llama", Layout(_NAMES, interleaved=True)),
    "qwen2": _Architecture("qwen2", _PLAIN),
    "qwen3": _Architecture("qwen3", _PLAIN),
    "gemma": _Architecture("gemma", _GEMMA),
    "gemma2": _Architecture("gemma2", _GEMMA),
    "gemma3": _Architecture("gemma3_text", _GEMMA),
}
# Key of config.json -> key of the file, without the architecture.
_KEYS = {
    "hidden_size": "embedding_length",
    "intermediate_size": "feed_forward_length",
    "num_hidden_layers": "block_count",
    "num_attention_heads": "attention.head_count",
    "num_key_value_heads": "attention.head_count_kv",
    "head_dim": "attention.key_length",
    "max_position_embeddings": "context_length",
    "rope_theta": "rope.freq_base",
    "rms_norm_eps": "attention.layer_norm_rms_epsilon",
    "sliding_window": "attention.sliding_window",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
}
_REQUIRED = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads")

_LLAMA3_PATTERN = (  # splits text before byte-level BPE in Llama 3's tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def load_config(path: Path) -> DecoderConfig:
    """Reads the header of a GGUF file; see `lomo_jax.models.load_config`."""
    return _config(*_open(path))


def load(path: Path, param_dtype: DTypeLike, **placement: Any) -> tuple[DecoderConfig, nnx.State]:
    """Reads a GGUF file, dequantising one tensor at a time; see `lomo_jax.models.load`."""
    metadata, tensors = _open(path)
    config, layout = _config(metadata, tensors), _architecture(metadata).layout
    read = [Tensor(tensor.name, tensor.shape, tensor.read) for tensor in tensors]
    return config, assemble(config, param_dtype, read, layout, str(path), **placement)


def load_tokenizer(path: Path) -> Any:
    """Builds a tokenizer from the metadata of a GGUF file; see `lomo_jax.models.tokenizer`.

    By hand, because transformers' own conversion of GGUF files needs torch.
    """
    import transformers

    metadata, _ = _open(path)
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    arguments: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (piece := metadata.piece(f"tokenizer.ggml.{key}_token_id")) is not None:
            arguments[f"{role}_token"] = piece
    with library_errors_are_the_users(f"{path}: the tokenizer", "download it again"):
        match metadata["tokenizer.ggml.model"]:
            case "gpt2":
                backend = _byte_level_bpe(metadata, pieces)
                return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)
            case "llama":
                return transformers.LlamaTokenizer(
                    vocab={piece: index for index, piece in enumerate(pieces)},
                    merges=_merges_of_scores(pieces, metadata.per_token("tokenizer.ggml.scores")),
                    add_prefix_space=metadata.get("tokenizer.ggml.add_space_prefix", True),
                    add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", True),
                    **arguments,
                )
            case kind:
                raise metadata.unsupported("tokenizer.ggml.model", kind, "'gpt2', 'llama'")


class _Metadata:
    """The checked metadata of a GGUF file."""

    def __init__(self, values: dict[str, Any], path: Path) -> None:
        self._values, self.path = values, path

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key, or the default."""
        return self._values.get(key, default)

    def __getitem__(self, key: str) -> Any:
        if key not in self._values:
            raise UserError(f"{self.path} lacks the metadata {key}; download or convert it again")
        return self._values[key]

    def per_token(self, key: str) -> list[Any]:
        """Returns a list that has an entry for each token."""
        found, expected = len(self[key]), len(self["tokenizer.ggml.tokens"])
        if found != expected:
            raise UserError(f"{self.path}: {key} has {found} entries for {expected} tokens")
        return self[key]

    def piece(self, key: str) -> str | None:
        """Returns the token with the id at `key`; None without an id."""
        pieces, token_id = self["tokenizer.ggml.tokens"], self.get(key)
        if token_id is not None and token_id >= len(pieces):
            raise UserError(f"{self.path}: {key}={token_id}, but it has {len(pieces)} tokens")
        return None if token_id is None else pieces[token_id]

    def unsupported(self, key: str, value: Any, supported: str) -> UserError:
        found = f"{key}={short(value)}"
        return UserError(f"{self.path}: {found} is not supported; supported: {supported}")


def _open(path: Path) -> tuple[_Metadata, list[StoredTensor]]:
    """Memory-maps a GGUF file and checks its metadata."""
    values, tensors = gguf_file.read(path)
    gguf_metadata(values.get("general.architecture")).check(values, path)
    return _Metadata(values, path), tensors


def _architecture(metadata: _Metadata) -> _Architecture:
    name = metadata["general.architecture"]
    if name not in _ARCHITECTURES:
        supported = ", ".join(map(repr, _ARCHITECTURES))
        raise metadata.unsupported("general.architecture", name, supported)
    return _ARCHITECTURES[name]


def _config(metadata: _Metadata, tensors: list[StoredTensor]) -> DecoderConfig:
    """Reads the shape of a model as config.json would tell it."""
    family, tensor_names = _architecture(metadata).family, {tensor.name for tensor in tensors}
    prefix = metadata["general.architecture"]
    kind = metadata.get(f"{prefix}.rope.scaling.type", "none")
    refused = {f"{prefix}.expert_count": 0}
    refused |= {} if kind == "linear" else {f"{prefix}.rope.scaling.type": "none"}
    for key, supported in refused.items():
        if (value := metadata.get(key, supported)) != supported:
            raise metadata.unsupported(key, value, repr(supported))
    if "rope_freqs.weight" in tensor_names:
        raise UserError(
            f"{metadata.path}: scaled rotary frequencies (the tensor rope_freqs.weight) are "
            "supported in Hugging Face directories only; use the model's original weights"
        )
    hf = {
        key: metadata[f"{prefix}.{name}"]
        for key, name in _KEYS.items()
        if key in _REQUIRED or metadata.get(f"{prefix}.{name}") is not None
    }
    hf = {key: _decimal(x) if isinstance(x, float) else x for key, x in hf.items()}
    hf |= {
        "architectures": [FAMILIES[family].architecture],
        "vocab_size": metadata.get(f"{prefix}.vocab_size")
        or len(metadata["tokenizer.ggml.tokens"]),
        "tie_word_embeddings": f"{_NAMES['output']}.weight" not in tensor_names,
        "bos_token_id": metadata.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": metadata.get("tokenizer.ggml.eos_token_id"),
    }
    if kind == "linear":
        factor = _decimal(metadata[f"{prefix}.rope.scaling.factor"])
        hf["rope_scaling"] = {"rope_type": "linear", "factor": factor}
    if family in ("gemma2", "gemma3_text"):
        # Not in the file: llama.cpp knows it by the number of layers.
        is_27b = hf["num_hidden_layers"] == {"gemma2": 46, "gemma3_text": 62}[family]
        per_head = hf["hidden_size"] // hf["num_attention_heads"]
        hf["query_pre_attn_scalar"] = per_head if is_27b else hf["head_dim"]
    try:
        return read_config(hf)
    except UserError as error:
        raise UserError(f"{metadata.path}: {error}") from None


def _decimal(value: float) -> float:
    """Returns the shortest decimal with this float32 value: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _byte_level_bpe(metadata: _Metadata, pieces: list[str]) -> Any:
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from tokenizers.processors import TemplateProcessing

    gpt2 = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    digits = pre_tokenizers.Digits(individual_digits=True)
    llama3 = pre_tokenizers.Split(Regex(_LLAMA3_PATTERN), behavior="isolated")
    plain_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    splits = {
        "gpt-2": gpt2,
        "smollm": pre_tokenizers.Sequence([digits, gpt2]),
        "llama-bpe": pre_tokenizers.Sequence([llama3, plain_bytes]),
    }
    if (split := metadata["tokenizer.ggml.pre"]) not in splits:
        raise metadata.unsupported("tokenizer.ggml.pre", split, ", ".join(map(repr, splits)))
    is_llama3 = split == "llama-bpe"
    vocabulary = {piece: index for index, piece in enumerate(pieces)}
    merges = [tuple(merge.split(" ")) for merge in metadata["tokenizer.ggml.merges"]]
    backend = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=is_llama3))
    backend.pre_tokenizer = splits[split]
    backend.decoder = decoders.ByteLevel()
    for piece, kind in zip(pieces, metadata.per_token("tokenizer.ggml.token_type"), strict=True):
        if kind == gguf.TokenType.CONTROL:
            backend.add_special_tokens([AddedToken(piece, normalized=False)])
        elif kind == gguf.TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(piece, normalized=False)])
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama3):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]  # `piece` has checked it
        backend.post_processor = TemplateProcessing(
            single="BOS $A", pair="BOS $A BOS $B", special_tokens=[("BOS", bos_id)]
        )
    return backend


def _merges_of_scores(pieces: list[str], scores: list[float]) -> list[tuple[str, str]]:
    """Returns the merges, best first, that the scores of a SentencePiece model imply."""
    score = dict(zip(pieces, scores, strict=True))
    order = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in order and piece[cut:] in order
    ]
    return sorted(merges, key=lambda pair: (-score["".join(pair)], order[pair[0]], order[pair[1]]))
