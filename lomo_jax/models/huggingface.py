"""Hugging Face directories: config.json, safetensors and tokenizer, read and written."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from huggingface_hub import split_state_dict_into_shards_factory
from jax.typing import DTypeLike

from lomo_jax import _schema
from lomo_jax._json import read_json, write_json
from lomo_jax.errors import UserError, library_errors_are_the_users
from lomo_jax.models import export_folder
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.decoder import Decoder
from lomo_jax.models.families import FAMILIES
from lomo_jax.models.hf_config import read_config, write_config
from lomo_jax.models.weights import Tensor, assemble, disassemble

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CHAT_TEMPLATE = "chat_template.jinja"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_DTYPES = ("F32", "BF16", "F16")
_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"
# Buffers that old versions of transformers saved; none is trained or read.
_BUFFERS = ("rotary_emb.inv_freq", "rotary_emb.cos_cached", "rotary_emb.sin_cached", "masked_bias")
# What an export copies from the folder that its model came from.
_CARRIED = (
    "LICENSE*",
    "NOTICE*",
    "USE_POLICY*",
    "*tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "chat_template*",
    "additional_chat_templates/*",
)


def load_config(directory: Path) -> DecoderConfig:
    """Reads config.json; see `lomo_jax.models.load_config`."""
    _refuse_other_formats(directory)
    _check_files(directory)
    hf_config = read_json(directory / _CONFIG)
    try:
        config = read_config(hf_config)
    except UserError as error:
        raise UserError(f"{directory / _CONFIG}: {error}") from None
    if config.tie_embeddings and _has_own_head(directory):
        warnings.warn(
            f"{directory}: config.json ties the output head to the embedding, but the stored head "
            "differs; they are untied",
            stacklevel=3,
        )
        config = dataclasses.replace(config, tie_embeddings=False)
    return config


def load(
    directory: Path, param_dtype: DTypeLike, **placement: Any
) -> tuple[DecoderConfig, nnx.State]:
    """Reads a Hugging Face directory; see `lomo_jax.models.load`."""
    config = load_config(directory)
    layout = FAMILIES[config.family].layout
    tensors = {tensor.name: tensor for tensor in _read_tensors(directory)}
    if config.tie_embeddings and (head := tensors.pop(_HEAD, None)) is not None:
        # A copy of the embedding, which some exports store in its place.
        tensors.setdefault(_EMBEDDING, head._replace(name=_EMBEDDING))
    inside = ("model.layers.", "model.embed_tokens.", "model.norm.", "lm_head.")
    if outside := [name for name in tensors if not name.startswith(inside)]:
        warnings.warn(
            f"{directory}: {', '.join(outside[:3])}{' ...' if len(outside) > 3 else ''} "
            "belong to no part of the decoder and are left out",
            stacklevel=3,
        )
    known = [tensor for name, tensor in tensors.items() if name not in outside]
    return config, assemble(config, param_dtype, known, layout, str(directory), **placement)


def load_tokenizer(directory: Path) -> Any:
    """Reads the tokenizer of a Hugging Face directory; see `lomo_jax.models.tokenizer`."""
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(
            f"{directory} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the tokenizer of "
            "the original model there"
        )
    _check_files(directory)
    for name, schema in _schema.TOKENIZER_FILES.items():
        if (directory / name).is_file():
            read_json(directory / name, schema)
    import transformers

    remedy = "copy the tokenizer of the original model there again"
    with library_errors_are_the_users(f"{directory}: the tokenizer", remedy):
        try:
            with _without_questions():
                found = transformers.AutoTokenizer.from_pretrained(
                    directory, local_files_only=True, trust_remote_code=False
                )
        except Exception as error:
            if "trust_remote_code" not in str(error):
                raise
            raise UserError(
                f"{directory}: the tokenizer needs code from the model's directory (auto_map in "
                "tokenizer_config.json), which lomo_jax never runs; use a model with a tokenizer "
                "of transformers"
            ) from None
    if not isinstance(found, transformers.PreTrainedTokenizerBase):
        raise UserError(
            f"{directory}: {type(found).__name__} is not a tokenizer of one text; use the "
            "tokenizer of the original model"
        )
    with library_errors_are_the_users(f"{directory}: the tokenizer", remedy):
        found("A text with a rare character: \u2603")  # some faults show only now
    # How it was found, which save_pretrained would write.
    for key in ("is_local", "local_files_only", "auto_map"):
        found.init_kwargs.pop(key, None)
    return found


def save(
    path: str | os.PathLike[str],
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    *,
    like: str | os.PathLike[str] | None = None,
    dtype: DTypeLike | None = None,
    tokenizer: Any = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face directory that `transformers` and `lomo_jax.models.load` read.

    The export appears at `path` when it is complete: if it fails, even by SIGKILL, an earlier
    export stays. Files that users added to an earlier export stay. Host memory holds one shard.
    With several processes, all must call this and share the file system; each writes its part.

    Args:
      path: The directory. An earlier export there is replaced if its files are unchanged.
      graphdef: The structure of a `Decoder`.
      params: Its parameters.
      like: The Hugging Face directory whose config.json (every field but the dtype),
        generation_config.json, tokenizer and licence go into the export. Default: the one that the
        model was loaded from. A model from elsewhere gets the config.json of its `DecoderConfig`.
      dtype: The dtype of the saved weights: float32, bfloat16 or float16. Default: the parameters'.
      tokenizer: A transformers tokenizer to save with the model. If `like` has a tokenizer, its
        files are copied instead, and only the chat template is taken from this one.
      card: The text of README.md, the model card.
      max_shard_bytes: Larger models are split into several files with an index.

    Raises:
      UserError: `path` holds something else than an earlier export, a file of the export was
        changed, or `like` is another model.
      OSError: `path` cannot be written, for example because the disk is full.
    """
    model = nnx.merge(graphdef, params)
    config, like = model.config, model.source if like is None else like
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype if dtype is None else dtype)
    layout = FAMILIES[config.family].layout
    with export_folder.replace(path) as folder:
        if jax.process_index() == 0:
            save_config(folder, config, dtype, tokenizer, like)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
        tensors = {t.name: t for t in disassemble(config, params, layout, dtype)}
        try:
            _write_weights(folder, tensors, dtype.itemsize, max_shard_bytes)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} was not written: {error}") from None


def save_config(
    directory: Path,
    config: DecoderConfig,
    dtype: DTypeLike,
    tokenizer: Any = None,
    like: str | os.PathLike[str] | None = None,
) -> None:
    """Writes a Hugging Face directory without weights.

    Args:
      directory: An existing directory.
      config: The model's shape.
      dtype: The dtype of the weights.
      tokenizer: A transformers tokenizer; see `save`.
      like: A Hugging Face directory, or None; see `save`.

    Raises:
      UserError: `like` is missing or another model.
    """
    if like is None:
        hf_config = write_config(config, dtype)
        special = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id")}
        write_json(directory / _GENERATION_CONFIG, special)
    else:
        like = Path(like)
        _check_files(like)
        hf_config = _changed(read_json(like / _CONFIG), config, dtype, like)
        for file in (like / _GENERATION_CONFIG, *_files_to_carry(like)):
            if file.is_file():
                target = directory / file.relative_to(like)
                target.parent.mkdir(exist_ok=True)
                shutil.copyfile(file, target)
    write_json(directory / _CONFIG, hf_config)
    if tokenizer is None:
        return
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        tokenizer.save_pretrained(directory)
        return
    template = tokenizer.chat_template
    if isinstance(template, str) and template != load_tokenizer(directory).chat_template:
        # In a file of its own, which takes precedence over tokenizer_config.json.
        (directory / _CHAT_TEMPLATE).write_text(template, encoding="utf-8")


def _changed(
    hf_config: dict[str, Any], config: DecoderConfig, dtype: DTypeLike, like: Path
) -> dict[str, Any]:
    """Returns an original config.json with what training changed: the dtype, a head of its own."""
    original = dataclasses.replace(read_config(hf_config), tie_embeddings=config.tie_embeddings)
    if original != config:
        raise UserError(f"{like} is another model than the one to save; give the original folder")
    dtype_keys = [key for key in ("dtype", "torch_dtype") if key in hf_config] or ["torch_dtype"]
    hf_config |= dict.fromkeys(dtype_keys, jnp.dtype(dtype).name)
    if read_config(hf_config).tie_embeddings != config.tie_embeddings:
        hf_config["tie_word_embeddings"] = config.tie_embeddings
    return hf_config


def _check_files(directory: Path) -> None:
    """Raises UserError if a folder has a pipe, socket or device in place of a file."""
    for entry in directory.iterdir() if directory.is_dir() else ():
        _schema.check_regular(entry)


def _files_to_carry(like: Path) -> list[Path]:
    return sorted({file for pattern in _CARRIED for file in like.glob(pattern)})


@contextlib.contextmanager
def _without_questions() -> Iterator[None]:
    """Makes transformers refuse a model's own code instead of asking on stdin.

    `trust_remote_code=False` does not reach the tokenizers inside a `RagTokenizer`.
    """
    from transformers import dynamic_module_utils

    timeout = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0  # seconds; 0 refuses at once
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = timeout


def _refuse_other_formats(directory: Path) -> None:
    """Raises UserError for a folder that holds a model in a format that others write."""
    if (directory / "adapter_config.json").is_file() and not (directory / _CONFIG).is_file():
        raise UserError(
            f"{directory} holds an adapter, not a model; merge it into its base model: python -c "
            '"from peft import AutoPeftModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').merge_and_unload().save_pretrained('OUT')\""
        )
    if (directory / "params.json").is_file() and not (directory / _CONFIG).is_file():
        raise UserError(
            f"{directory} holds weights in Meta's format (params.json); use the Hugging Face "
            "version of the model, or convert it with convert_llama_weights_to_hf.py of "
            "transformers"
        )


def _has_own_head(directory: Path) -> bool:
    """Returns whether the weights have an output head that is not a copy of the embedding."""
    if not any(directory.glob("*.safetensors")):
        return False
    tensors = {tensor.name: tensor for tensor in _read_tensors(directory)}
    if _HEAD not in tensors or _EMBEDDING not in tensors:
        return False
    head, embedding = tensors[_HEAD], tensors[_EMBEDDING]
    return head.shape != embedding.shape or not np.array_equal(head.read(), embedding.read())


def _read_tensors(directory: Path) -> Iterator[Tensor]:
    """Yields the tensors of a directory, without buffers, by their names in a causal model."""
    files: dict[str, Path] = {}
    found = []
    for file in _weight_files(directory):
        for tensor in _tensors(file):
            if (before := files.setdefault(tensor.name, file)) != file:
                raise UserError(
                    f"{file}: the tensor {tensor.name} is in {before.name} too; remove the file "
                    "that does not belong to the model"
                )
            found.append(tensor)
    names = files.keys()
    # A model that was saved without its head has no prefix.
    is_bare = "embed_tokens.weight" in names and _EMBEDDING not in names
    for tensor in found:
        bare = is_bare and tensor.name != _HEAD
        yield tensor._replace(name=f"model.{tensor.name}") if bare else tensor


def _weight_files(directory: Path) -> list[Path]:
    """Returns the weight files that transformers would read."""
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).is_file():
        index = read_json(directory / _INDEX, _schema.WEIGHTS_INDEX)
        files = [directory / name for name in sorted(set(index["weight_map"].values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, but {_INDEX} names it; download it")
        return files
    if files := sorted(directory.glob("*.safetensors")):
        return files
    if any(directory.glob("*.bin")):
        raise UserError(
            f"{directory} has its weights in .bin files, which can run code and are never read; "
            'convert them: python -c "from transformers import AutoModelForCausalLM as M; '
            f"M.from_pretrained('{directory}').save_pretrained('{directory}')\""
        )
    raise UserError(
        f"{directory} has no .safetensors file; download or convert the model's weights"
    )


def _tensors(file: Path) -> Iterator[Tensor]:
    """Yields a file's tensors in the order of their bytes."""

    def read(name: str, shape: tuple[int, ...]) -> np.ndarray:
        # Opened again for each tensor, so that the pages of earlier ones do not stay in memory.
        with _safe_open(file) as opened:
            array = opened.get_tensor(name)
        if array.shape != shape:
            raise UserError(f"{file} has changed while it was read; start again")
        return array

    with _safe_open(file) as opened:
        for name in opened.offset_keys():
            header = opened.get_slice(name)
            if name.endswith(_BUFFERS) or header.get_dtype() == "BOOL":
                continue
            if header.get_dtype() not in _DTYPES:
                raise UserError(
                    f"{file}: the tensor {name} is stored as {header.get_dtype()}; "
                    f"supported: {', '.join(_DTYPES)}"
                )
            shape = tuple(header.get_shape())
            yield Tensor(name, shape, functools.partial(read, name, shape))


@contextlib.contextmanager
def _safe_open(file: Path) -> Iterator[Any]:
    try:
        with safetensors.safe_open(file, "numpy") as opened:
            yield opened
    except safetensors.SafetensorError as error:
        raise UserError(
            f"{file} is truncated or not a safetensors file ({error}); download it again"
        ) from None


def _write_weights(
    directory: Path, tensors: dict[str, Tensor], itemsize: int, max_shard_bytes: int
) -> None:
    split = split_state_dict_into_shards_factory(
        tensors,
        get_storage_size=lambda tensor: math.prod(tensor.shape) * itemsize,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_shard_bytes,
    )
    for number, (file, names) in enumerate(split.filename_to_tensors.items()):
        is_ours = number % jax.process_count() == jax.process_index()
        arrays = {}
        for name in names:
            array = tensors[name].read()  # in all processes: every device holds a part of it
            if is_ours:
                arrays[name] = array
        if is_ours:
            # transformers refuses files without the metadata of a framework.
            safetensors.numpy.save_file(arrays, directory / file, metadata={"format": "pt"})
    if split.is_sharded and jax.process_index() == 0:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        write_json(directory / _INDEX, index)
