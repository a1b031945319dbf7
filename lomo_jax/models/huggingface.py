"""Hugging Face directories: config.json and safetensors, in and out."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx
from jax.experimental import multihost_utils
from jax.typing import DTypeLike

from lomo_jax.models.config import LlamaConfig
from lomo_jax.models.weights import HF_NAMES, Tensor, assemble, disassemble

_CONFIG, _GENERATION_CONFIG = "config.json", "generation_config.json"
_WEIGHTS, _INDEX = "model.safetensors", "model.safetensors.index.json"
# The names of what `save` and the tokenizers of transformers write.
_EXPORTED = re.compile(
    r"((generation_)?config|model\.safetensors\.index)\.json|model[-\w]*\.safetensors|README\.md"
    r"|(tokenizer|special_tokens|added_tokens|(additional_)?chat_template|vocab|merges).*"
)
_OLD = "old"  # where an earlier export is while the new one takes its place
_DTYPES = ("F32", "BF16", "F16")


def load_config(directory: Path) -> LlamaConfig:
    """Reads config.json; see `lomo_jax.models.load_config`."""
    config_file = directory / _CONFIG
    try:
        return LlamaConfig.from_hf(_read_json(config_file))
    except ValueError as error:
        raise ValueError(f"{config_file}: {error}") from None


def load(directory: Path, param_dtype: DTypeLike, **where: Any) -> tuple[LlamaConfig, nnx.State]:
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
    return config, assemble(config, param_dtype, tensors, HF_NAMES, str(directory), **where)


def save(
    path: str | os.PathLike[str],
    config: LlamaConfig,
    params: nnx.State,
    *,
    dtype: DTypeLike | None = None,
    tokenizer: Any = None,
    card: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
) -> None:
    """Writes a Hugging Face directory that `transformers` and `lomo_jax.models.load` read.

    Everything is written beside `path` first and renamed when complete, so a failure leaves an
    earlier export as it was. Host memory holds one shard. Of several processes, which must all call
    this and share the file system, each writes its part of the files.

    Args:
      path: the directory; an earlier export there is replaced, and nothing else ever is.
      config: the model's shape.
      params: the parameters, as `nnx.split` of a `Llama` gives them.
      dtype: of the saved weights: float32, bfloat16 or float16. By default the parameters' own.
      tokenizer: a transformers tokenizer to save with the model.
      card: the text of README.md, the model card.
      max_shard_bytes: larger models are split into several files and an index.

    Raises:
      ValueError: `path` exists and is not an export, or holds more than that.
      OSError: it cannot be written, for example because the disk is full.
    """
    path = Path(path)
    dtype = jnp.dtype(jax.tree.leaves(params)[0].dtype if dtype is None else dtype)
    _check_replaceable(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _temporary_beside(path) as temporary:
        written = temporary / "new"
        if jax.process_index() == 0:
            written.mkdir()
            save_config(written, config, dtype, tokenizer)
            if card is not None:
                (written / "README.md").write_text(card, encoding="utf-8")
        _wait_for_all("directory")
        tensors = disassemble(params, HF_NAMES, dtype)
        try:
            _write_weights(written, tensors, dtype.itemsize, max_shard_bytes)
        except safetensors.SafetensorError as error:
            raise OSError(f"{path} was not written: {error}") from None
        _wait_for_all("weights")
        if jax.process_index() == 0:
            _replace(path, written, temporary / _OLD)


def save_config(
    directory: Path, config: LlamaConfig, dtype: DTypeLike, tokenizer: Any = None
) -> None:
    """Writes all of a Hugging Face directory but the weights.

    Args:
      directory: which exists.
      config: the model's shape.
      dtype: of the weights.
      tokenizer: a transformers tokenizer.
    """
    hf_config = config.to_hf(dtype)
    special = {key: hf_config[key] for key in ("bos_token_id", "eos_token_id")}
    _write_json(directory / _CONFIG, hf_config)
    _write_json(directory / _GENERATION_CONFIG, special)
    if tokenizer is not None:
        tokenizer.save_pretrained(directory)


def _check_replaceable(path: Path) -> None:
    """Raises ValueError if more would be lost than an earlier export."""
    if not path.exists():
        return
    names = sorted(entry.name for entry in path.iterdir()) if path.is_dir() else [path.name]
    is_export = _CONFIG in names and any(name.endswith(".safetensors") for name in names)
    if names and not is_export:
        raise ValueError(f"{path} exists and is not an export; choose another path")
    foreign = next((name for name in names if not _EXPORTED.fullmatch(name)), None)
    if foreign is not None:
        raise ValueError(
            f"{path} holds {foreign}, which is of no export and would be lost; choose another path"
        )


@contextlib.contextmanager
def _temporary_beside(path: Path) -> Iterator[Path]:
    """Yields a new directory, the same in all processes, that is gone afterwards."""
    temporary = path.parent / f".{path.name}.writing"
    if jax.process_index() == 0:
        # One that is there is of a process that was killed, perhaps between two renamings.
        if (temporary / _OLD).exists() and not path.exists():
            (temporary / _OLD).rename(path)
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir()
    try:
        yield temporary
    finally:
        if jax.process_index() == 0:
            shutil.rmtree(temporary, ignore_errors=True)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {what}")


def _replace(path: Path, new: Path, old: Path) -> None:
    """Renames `new` to `path`, and what is at `path` to `old`; puts it back if that fails."""
    if not path.exists():
        new.rename(path)
        return
    path.rename(old)
    try:
        new.rename(path)
    except OSError:
        old.rename(path)
        raise


def _weight_files(directory: Path) -> list[Path]:
    """Returns the files that transformers would read, in its order of preference."""
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if (directory / _INDEX).is_file():
        weight_map = _read_json(directory / _INDEX).get("weight_map")
        if not isinstance(weight_map, dict):
            raise ValueError(f"{directory / _INDEX} has no weight_map; download it again")
        files = [directory / name for name in sorted(set(weight_map.values()))]
        for file in files:
            if not file.is_file():
                raise FileNotFoundError(f"{file} is missing, but {_INDEX} names it; download it")
        return files
    if files := sorted(directory.glob("*.safetensors")):
        return files
    raise FileNotFoundError(
        f"{directory} has no .safetensors file; download one, or convert the model's weights"
    )


def _tensors(file: Path) -> Iterator[Tensor]:
    """Yields the file's tensors in the order of their bytes."""

    def read(name: str) -> np.ndarray:
        # Opened for each tensor, so that pages of the mapping that were read do not stay resident.
        with safetensors.safe_open(file, "numpy") as opened:
            return opened.get_tensor(name)

    try:
        with safetensors.safe_open(file, "numpy") as opened:
            for name in opened.offset_keys():
                header = opened.get_slice(name)
                if header.get_dtype() not in _DTYPES:
                    raise ValueError(
                        f"{file}: the tensor {name} is stored as {header.get_dtype()}; "
                        f"supported: {', '.join(_DTYPES)}"
                    )
                yield Tensor(name, tuple(header.get_shape()), lambda name=name: read(name))
    except safetensors.SafetensorError as error:
        raise ValueError(
            f"{file} is truncated or not a safetensors file ({error}); download it again"
        ) from None


def _write_weights(
    directory: Path, tensors: Iterable[Tensor], itemsize: int, max_shard_bytes: int
) -> None:
    shards: list[list[Tensor]] = []
    total = room = 0
    for tensor in tensors:
        size = math.prod(tensor.shape) * itemsize
        if not shards or size > room:
            shards.append([])
            room = max_shard_bytes
        shards[-1].append(tensor)
        room -= size
        total += size

    weight_map = {}
    for number, shard in enumerate(shards, start=1):
        name = (
            _WEIGHTS if len(shards) == 1 else f"model-{number:05}-of-{len(shards):05}.safetensors"
        )
        mine = number % jax.process_count() == jax.process_index()
        arrays = {}
        for tensor in shard:
            array = tensor.read()  # by all processes: each device has a part of it
            if mine:
                arrays[tensor.name] = array
        if mine:
            # transformers refuses files that do not say which framework's layout they hold.
            safetensors.numpy.save_file(arrays, directory / name, metadata={"format": "pt"})
        weight_map |= dict.fromkeys((tensor.name for tensor in shard), name)
    if len(shards) > 1 and jax.process_index() == 0:
        _write_json(
            directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": weight_map}
        )


def _read_json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        value = json.loads(file.read_text())
    except ValueError as error:
        raise ValueError(f"{file} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{file} is not a JSON object")
    return value


def _write_json(file: Path, value: dict[str, Any]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n")
