"""Reading GGUF files of llama.cpp: shape, weights and tokenizer of a LLaMA-family model.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
from flax import nnx
from jax.typing import DTypeLike

from lomo_jax.errors import UserError
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.weights import GGUF_NAMES, Tensor, assemble

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
    config = _config(metadata, tensors)
    read = [_tensor(tensor, config) for tensor in tensors]
    return config, assemble(config, param_dtype, read, GGUF_NAMES, str(path), **placement)


def load_tokenizer(path: Path) -> Any:
    """Builds a tokenizer from the metadata of a GGUF file; see `lomo_jax.models.tokenizer`.

    By hand, because transformers' own conversion of GGUF files needs torch.
    """
    import transformers

    metadata, _ = _open(path)
    pieces: list[str] = metadata["tokenizer.ggml.tokens"]
    arguments: dict[str, Any] = {"chat_template": metadata.get("tokenizer.chat_template")}
    for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        if (token_id := metadata.get(f"tokenizer.ggml.{key}_token_id")) is not None:
            arguments[f"{role}_token"] = pieces[token_id]
    match metadata["tokenizer.ggml.model"]:
        case "gpt2":
            backend = _byte_level_bpe(metadata, pieces)
            return transformers.PreTrainedTokenizerFast(tokenizer_object=backend, **arguments)
        case "llama":
            return transformers.LlamaTokenizer(
                vocab={piece: index for index, piece in enumerate(pieces)},
                merges=_merges_of_scores(pieces, metadata["tokenizer.ggml.scores"]),
                add_prefix_space=metadata.get("tokenizer.ggml.add_space_prefix", True),
                add_bos_token=metadata.get("tokenizer.ggml.add_bos_token", True),
                **arguments,
            )
        case kind:
            raise metadata.unsupported("tokenizer.ggml.model", kind, "'gpt2', 'llama'")


class _Metadata:
    """The key-value pairs of a GGUF file."""

    def __init__(self, reader: gguf.GGUFReader, path: Path) -> None:
        self._fields = reader.fields
        self.path = path

    def get(self, key: str, default: Any = None) -> Any:
        """Returns the value of a key as Python objects, or the default."""
        return self._fields[key].contents() if key in self._fields else default

    def __getitem__(self, key: str) -> Any:
        if key not in self._fields:
            raise UserError(f"{self.path} lacks the metadata {key}; download or convert it again")
        return self._fields[key].contents()

    def unsupported(self, key: str, value: Any, supported: str) -> UserError:
        return UserError(f"{self.path}: {key}={value!r} is not supported; supported: {supported}")


def _open(path: Path) -> tuple[_Metadata, list[gguf.ReaderTensor]]:
    """Memory-maps a GGUF file."""
    try:
        reader = gguf.GGUFReader(path)
    except (ValueError, IndexError, KeyError) as error:
        raise UserError(
            f"{path} is truncated or not a GGUF file ({error}); download it again"
        ) from None
    return _Metadata(reader, path), reader.tensors


def _config(metadata: _Metadata, tensors: list[gguf.ReaderTensor]) -> DecoderConfig:
    tensor_names = {tensor.name for tensor in tensors}
    if (architecture := metadata["general.architecture"]) != "llama":
        raise metadata.unsupported("general.architecture", architecture, "'llama'")
    for key, supported in {"llama.expert_count": 0, "llama.rope.scaling.type": "none"}.items():
        if (value := metadata.get(key, supported)) != supported:
            raise metadata.unsupported(key, value, repr(supported))
    if "rope_freqs.weight" in tensor_names:
        raise UserError(
            f"{metadata.path}: scaled rotary frequencies (the tensor rope_freqs.weight) are "
            "supported in Hugging Face directories only; use the model's original weights"
        )
    width = metadata["llama.embedding_length"]
    num_heads = metadata["llama.attention.head_count"]
    try:
        config = DecoderConfig(
            vocab_size=metadata.get("llama.vocab_size") or len(metadata["tokenizer.ggml.tokens"]),
            width=width,
            mlp_width=metadata["llama.feed_forward_length"],
            num_layers=metadata["llama.block_count"],
            num_heads=num_heads,
            num_kv_heads=metadata.get("llama.attention.head_count_kv", num_heads),
            head_dim=metadata.get("llama.attention.key_length") or width // num_heads,
            rope_theta=_decimal(metadata.get("llama.rope.freq_base", 10000.0)),
            norm_eps=_decimal(metadata["llama.attention.layer_norm_rms_epsilon"]),
            max_length=metadata["llama.context_length"],
            tie_embeddings=GGUF_NAMES["output/kernel"] not in tensor_names,
            bos_id=metadata.get("tokenizer.ggml.bos_token_id"),
            eos_id=metadata.get("tokenizer.ggml.eos_token_id"),
        )
    except UserError as error:
        raise UserError(f"{metadata.path}: {error}") from None
    except (ArithmeticError, TypeError) as error:
        raise UserError(
            f"{metadata.path}: a value of the metadata has the wrong type or size: {error}"
        ) from None
    return config


def _tensor(tensor: gguf.ReaderTensor, config: DecoderConfig) -> Tensor:
    shape = tuple(int(size) for size in reversed(tensor.shape))

    def read() -> np.ndarray:
        weight = gguf.dequantize(tensor.data, tensor.tensor_type).reshape(shape)
        if tensor.name.endswith((".attn_q.weight", ".attn_k.weight")):
            # llama.cpp rotates the pairs (2i, 2i + 1), Hugging Face the pairs (i, i + h / 2).
            pairs = weight.reshape(-1, config.head_dim // 2, 2, shape[1])
            weight = pairs.swapaxes(1, 2).reshape(shape)
        return weight

    return Tensor(tensor.name, shape, read)


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
    for piece, kind in zip(pieces, metadata["tokenizer.ggml.token_type"], strict=True):
        if kind == gguf.TokenType.CONTROL:
            backend.add_special_tokens([AddedToken(piece, normalized=False)])
        elif kind == gguf.TokenType.USER_DEFINED:
            backend.add_tokens([AddedToken(piece, normalized=False)])
    if metadata.get("tokenizer.ggml.add_bos_token", is_llama3):
        bos_id = metadata["tokenizer.ggml.bos_token_id"]
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
