"""Data of tasks: from the Hugging Face Hub, or from folders on disk."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from lomo_jax.errors import UserError


def find(folders: Sequence[Path], names: Sequence[str]) -> Path:
    """Returns the folder or file of a data set.

    Args:
      folders: The folders given by --data.
      names: Places to look in each, such as ["boolq", "aps/super_glue/boolq", "super_glue/boolq"].

    Raises:
      UserError: There is none.
    """
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"--data {folder}: there is no such folder")
    for place in (folder / name for folder in folders for name in names):
        # "none" and "plain_text" are the configs of data sets on the hub that have only one.
        for path in (place, place / "none", place / "plain_text"):
            if path.is_dir() and _splits(path):
                return path
        for ending in (".jsonl", ".json", ".parquet"):
            if (path := place.with_name(place.name + ending)).is_file():
                return path
    where = ", ".join(map(str, folders))
    raise UserError(f"--data {where}: there is no {' or '.join(names)}")


_SPLITS = ("train", "validation", "test", "dev")


def _splits(folder: Path) -> dict[str, Path]:
    """Returns the files or folders of the splits in a folder."""
    found = {}
    for path in sorted(folder.iterdir()):
        stem = path.name.partition(".")[0].partition("-")[0]
        if stem in _SPLITS:
            found[stem] = path
    return found


def read(place: Path) -> Any:
    """Reads a `datasets.DatasetDict`: a file, or a folder of files or folders named after splits.

    Raises:
      UserError: It cannot be read.
    """
    import datasets

    # One file is all splits: of a task of one's own there is often no other.
    splits = dict.fromkeys(_SPLITS, place) if place.is_file() else _splits(place)
    try:
        return datasets.DatasetDict({name: _read_split(path) for name, path in splits.items()})
    except Exception as error:  # datasets and pyarrow raise anything
        raise UserError(f"{place}: it cannot be read as data ({first_line(error)})") from error


def _read_split(path: Path) -> Any:
    import datasets

    if path.is_dir() and (path / "state.json").exists():
        return datasets.load_from_disk(str(path))
    files = sorted(file for file in path.iterdir() if file.is_file()) if path.is_dir() else [path]
    if all(file.suffix == ".arrow" for file in files):
        return datasets.concatenate_datasets([datasets.Dataset.from_file(str(f)) for f in files])
    names: Any = [str(file) for file in files]
    is_parquet = files[0].suffix == ".parquet"
    with _without_progress_bars():  # they would end up between the lines of a run
        return (datasets.Dataset.from_parquet if is_parquet else datasets.Dataset.from_json)(names)


@contextlib.contextmanager
def _without_progress_bars() -> Iterator[None]:
    import datasets

    if datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def read_any(hub: str, config: str, names: Sequence[str], folders: Sequence[Path]) -> Any:
    """Reads a data set from folders, or without folders from the hub.

    Args:
      hub: Its id on the hub.
      config: Its config there.
      names: Places to look in each folder.
      folders: The folders.

    Raises:
      UserError: There is none, or it cannot be read.
    """
    if folders:
        return read(find(folders, names))
    import datasets

    try:
        return datasets.load_dataset(hub, config)
    except Exception as error:  # the hub, the network, datasets
        raise UserError(
            f"{hub} ({config}) cannot be read from the hub ({first_line(error)}); give a folder "
            "with it: --data DIR"
        ) from error


def first_line(error: BaseException) -> str:
    """Returns the first line of an error's message."""
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
