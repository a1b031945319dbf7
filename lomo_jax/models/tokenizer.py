"""The tokenizer that belongs to a model."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lomo_jax.models.load import is_gguf

if TYPE_CHECKING:
    from lomo_jax.models.gguf import Metadata

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_LLAMA3_PATTERN = (  # splits text before byte-level BPE, as Llama 3's tokenizer does
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer(path: str | os.PathLike[str]) -> Any:
    """Returns the transformers tokenizer of a model.

    Args:
      path: what `lomo_jax.models.load` takes: a Hugging Face directory, or a GGUF file, whose
        tokenizer is built from its metadata.

    Returns:
      A `transformers.PreTrainedTokenizerBase`, with the model's chat template if it has one.

    Raises:
      FileNotFoundError: the path or its tokenizer does not exist.
      ValueError: the tokenizer's kind is not supported.
    """
    path = Path(path)
    if is_gguf(path):
        from lomo_jax.models.gguf import open_gguf

        metadata, _ = open_gguf(path)
        try:
            return _from_gguf(metadata)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
    if not any((path / file).is_file() for file in _TOKENIZER_FILES):
        raise FileNotFoundError(
            f"{path} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the model's there"
        )
    import transformers

    found = transformers.AutoTokenizer.from_pretrained(path, local_files_only=True)
    for key in ("is_local", "local_files_only"):  # how it was found, which it would save
        found.init_kwargs.pop(key, None)
    return found


def _from_gguf(metadata: Metadata) -> Any:
    import transformers

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
            raise ValueError(
                f"tokenizer.ggml.model={kind!r} is not supported; supported: 'gpt2', 'llama'"
            )


def _byte_level_bpe(metadata: Metadata, pieces: list[str]) -> Any:
    import gguf
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
        raise ValueError(
            f"tokenizer.ggml.pre={split!r} is not supported; supported: {', '.join(splits)}"
        )
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
    """Returns the merges, best first, that a SentencePiece model leaves implicit in its scores."""
    score = dict(zip(pieces, scores, strict=True))
    order = {piece: index for index, piece in enumerate(pieces)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in pieces
        for cut in range(1, len(piece))
        if piece[:cut] in order and piece[cut:] in order
    ]
    return sorted(merges, key=lambda pair: (-score["".join(pair)], order[pair[0]], order[pair[1]]))
