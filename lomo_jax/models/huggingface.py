"""Hugging Face directories: config.json, safetensors and tokenizer, read and written."""

from __future__ import annotations

import contextlib
import math
import os
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

from lomo_jax._json import read_json, write_json
from lomo_jax.errors import UserError
from lomo_jax.models import export_folder
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.weights import HF_NAMES, Tensor, assemble, disassemble

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")
_DTYPES = ("F32", "BF16", "F16")


def load_config(directory: Path) -> DecoderConfig:
    """Reads config.json; see `lomo_jax.models.load_config`."""
    hf_config = read_json(directory / _CONFIG)
    try:
        return DecoderConfig.from_hf(hf_config)
    except UserError as error:
        raise UserError(f"{directory / _CONFIG}: {error}") from None


def load(
    directory: Path, param_dtype: DTypeLike, **placement: Any
) -> tuple[DecoderConfig, nnx.State]:
    """Reads a Hugging Face directory; see `lomo_jax.models.load`."""
    config = load_config(directory)
    tensors = [
        tensor
        for file in _weight_files(directory)
        for tensor in _tensors(file)
        # transformers 4.30 and older also saved the rotary frequencies, and some exports of tied
        # models repeat the embedding as a head.
        if not tensor.name.endswith("rotary_emb.inv_freq")
        and not (config.tie_embeddings and tensor.name == HF_NAMES["output/kernel"])
    ]
    return config, assemble(config, param_dtype, tensors, HF_NAMES, str(directory), **placement)


def load_tokenizer(directory: Path) -> Any:
    """Reads the tokenizer of a Hugging Face directory; see `lomo_jax.models.tokenizer`."""
    if not any((directory / file).is_file() for file in _TOKENIZER_FILES):
        raise UserError(
            f"{directory} has no tokenizer ({', '.join(_TOKENIZER_FILES)}); copy the tokenizer of "
            "the original model there"
        )
    import transformers

    try:
        with _without_questions():
            found = transformers.AutoTokenizer.from_pretrained(
                directory, local_files_only=True, trust_remote_code=False
            )
    except Exception as error:  # tokenizers raises Exception itself
        if "trust_remote_code" in str(error):
            raise UserError(
                f"{directory}: the tokenizer needs code from the model's directory (auto_map in "
                "tokenizer_config.json), which lomo_jax never runs; use a model with a tokenizer "
                "of transformers"
            ) from None
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UserError(
            f"{directory}: the tokenizer cannot be read ({reason}); copy the tokenizer of the "
            "original model there again"
        ) from error
    if not isinstance(found, transformers.PreTrainedTokenizerBase):
        raise UserError(
            f"{directory}: {type(found).__name__} is not a tokenizer of one text; use the "
            "tokenizer of the original model"
        )
    # How it was found, which save_pretrained would write.
    for key in ("is_local", "local_files_only", "auto_map"):
        found.init_kwargs.pop(key, None)
    return found


def save(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    params: nnx.State,
    *,
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
      config: The model's shape.
      params: The parameters, as from `nnx.split` of a `Llama`.
      dtype: The dtype of the saved weights: float32, bfloat16 or float16. Default: the parameters'.
      tokenizer: A transformers tokenizer to save with the model.
      card: The text of README.md, the model card.
      max_shard_bytes: Larger models are split into several files with an index.

    Raises:
      UserError: `path` holds something else than an earlier export, or a file of the export was
        changed.
      OSError: `path` cannot be written, for example because the disk is full.
    """
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype if dtype is None else dtype)
    with export_folder.replace(path) as folder:
        if jax.process_index() == 0:
            save_config(folder, config, dtype, tokenizer)
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")
        tensors = {tensor.name: tensor for tensor in disassemble(params, HF_NAMES, dtype)}
        try:
            _write_weights(folder, tensors, dtype.itemsize, max_shard_bytes)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} was not written: {error}") from None


def save_config(
    directory: Path, config: DecoderConfig, dtype: DTypeLike, tokenizer: Any = None
) -> None:
    """Writes a Hugging Face directory without weights.

    Args:
      directory: An existing directory.
      config: The model's shape.
      dtype: The dtype of the weights.
      tokenizer: A transformers tokenizer.
    """
    hf_config = config.to_hf(dtype)
    special = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id")}
    write_json(directory / _CONFIG, hf_config)
    write_json(directory / _GENERATION_CONFIG, special)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


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


def _weight_files(directory: Path) -> list[Path]:
    """Returns the weight files that transformers would read."""
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).is_file():
        weight_map = read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise UserError(f"{directory / _INDEX} has no weight_map; download it again")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise UserError(f"{file} is missing, but {_INDEX} names it; download it")
        return files
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise UserError(
        f"{directory} has no .safetensors file; download or convert the model's weights"
    )


def _tensors(file: Path) -> Iterator[Tensor]:
    """Yields a file's tensors in the order of their bytes."""

    def read(name: str) -> np.ndarray:
        # Opened again for each tensor, so that the pages of earlier ones do not stay in memory.
        with safetensors.safe_open(file, "numpy") as opened:
            return opened.get_tensor(name)

    try:
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.offset_keys():
                header = opened.get_slice(name)
                if header.get_dtype() not in _DTYPES:
                    raise UserError(
                        f"{file}: the tensor {name} is stored as {header.get_dtype()}; "
                        f"supported: {', '.join(_DTYPES)}"
                    )
                yield Tensor(name, tuple(header.get_shape()), lambda name=name: read(name))
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
