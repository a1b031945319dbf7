"""The folder of an export: which files belong to it, and how a new export replaces them.

An export contains a manifest, `lomo_jax_export.json`, with the size and the SHA-256 of each file
that it wrote. A new export replaces those files only, and only while they are unchanged. Files that
users added to the folder stay where they are. Anything without a manifest is refused.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any

import jax
from jax.experimental import multihost_utils

from lomo_jax._json import read_json, write_json
from lomo_jax._lock import lock_folder
from lomo_jax._schema import EXPORT
from lomo_jax.errors import UserError

MANIFEST = "lomo_jax_export.json"
_FORMAT = 1


def check_save_path(path: str | os.PathLike[str]) -> None:
    """Checks that `save` may write to a path: nothing is there, or an unchanged earlier export.

    Reads all files of an earlier export, to compare their SHA-256.

    Args:
      path: The folder.

    Raises:
      UserError: Something else is there, or a file of the export was changed; the message names it.
    """
    path = Path(path)
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not (path / MANIFEST).is_file():
        raise UserError(
            f"{path} exists and is not an export of lomo_jax (it has no {MANIFEST}); choose "
            "another path"
        )
    for name, expected in _files(path).items():
        if (path / name).exists() and _describe(path / name, expected) != expected:
            raise UserError(
                f"{path / name} was changed after its export and would be lost; move it away or "
                "choose another path"
            )


@contextlib.contextmanager
def replace(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields an empty folder to write an export to; at the end it replaces `path`.

    The new export is written next to `path` and renamed when it is complete. If it fails, even by
    SIGKILL, the earlier export is whole: at `path`, or restored by the next call. All processes of
    a run must enter, and share the file system.

    Raises:
      UserError: See `check_save_path`; or another program writes an export there.
    """
    target = Path(os.path.realpath(path))
    temporary = target.parent / f".{target.name}.writing"
    new, old = temporary / "new", temporary / "old"
    is_first = jax.process_index() == 0
    with _locked(temporary, path) if is_first else contextlib.nullcontext():
        if is_first:
            _recover(target, new, old)
        _wait_for_all("recovered")
        check_save_path(path)
        if is_first:
            new.mkdir()
        try:
            _wait_for_all("created")
            yield new
            _wait_for_all("written")
            if is_first:
                files = sorted(file for file in new.rglob("*") if file.is_file())
                for file in files:  # safetensors writes files that only their owner can read
                    file.chmod(new.stat().st_mode & 0o666)
                described = {file.relative_to(new).as_posix(): _describe(file) for file in files}
                write_json(new / MANIFEST, {"format": _FORMAT, "files": described})
                _swap(target, new, old)
        finally:
            if is_first:
                shutil.rmtree(new, ignore_errors=True)


@contextlib.contextmanager
def _locked(temporary: Path, path: str | os.PathLike[str]) -> Iterator[None]:
    """Creates a folder and locks it; removes it at the end if it is empty."""
    temporary.mkdir(parents=True, exist_ok=True)
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(lock_folder(temporary))
        except (BlockingIOError, FileNotFoundError):
            raise UserError(
                f"another program is writing an export to {path}; wait for it, or choose another "
                "path"
            ) from None
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                temporary.rmdir()


def _swap(target: Path, new: Path, old: Path) -> None:
    for name in _foreign(target):
        if os.path.lexists(new / name):
            raise UserError(
                f"{target / name} is not part of the earlier export and would be lost; move it "
                "away or choose another path"
            )
    if target.exists():
        target.rename(old)
    try:
        new.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    _remove(old, target)


def _recover(target: Path, new: Path, old: Path) -> None:
    """Completes or undoes the swap of a process that was killed."""
    if old.exists() and target.exists():
        _remove(old, target)
    elif old.exists():
        old.rename(target)
    shutil.rmtree(new, ignore_errors=True)


def _remove(old: Path, target: Path) -> None:
    """Deletes an earlier export, after moving the files of others in it to the new one."""
    for name in _foreign(old):
        if os.path.lexists(target / name):
            raise UserError(f"{old / name} would replace {target / name}; move one of them away")
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        (old / name).rename(target / name)
    shutil.rmtree(old, ignore_errors=True)


def _foreign(folder: Path) -> list[str]:
    """Returns the names of files and folders that the export in a folder did not write.

    A folder without any file of the export counts as one name.
    """
    owned = {MANIFEST, *_files(folder)}
    parents = {str(parent) for name in owned for parent in PurePosixPath(name).parents}

    def visit(directory: Path) -> Iterator[str]:
        for entry in sorted(directory.iterdir()):
            name = entry.relative_to(folder).as_posix()
            if name in parents and entry.is_dir() and not entry.is_symlink():
                yield from visit(entry)
            elif name not in owned:
                yield name

    return list(visit(folder)) if folder.is_dir() else []


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Returns the files in the manifest of a folder by name; none if there is no manifest."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        return {}
    return read_json(manifest, EXPORT)["files"]


def _describe(file: Path, expected: dict[str, Any] | None = None) -> dict[str, Any] | None:
    """Returns size and SHA-256 of a file; None, unread, if it cannot be the expected one."""
    if not file.is_file():
        return None
    size = file.stat().st_size
    if isinstance(expected, dict) and expected.get("size") != size:
        return None
    with file.open("rb") as opened:
        return {"size": size, "sha256": hashlib.file_digest(opened, "sha256").hexdigest()}


def _wait_for_all(stage: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"export {stage}")
