"""Tokenised datasets on disk: made once, in bounded memory, and found again by what they depend on.

The tokenizer works on all cores, on a million characters at a time. A text is tokenised in
sections, cut where that changes no token, so that a document may be larger than memory and a part
of it may be held out. A section holds no special tokens but at the ends of its document.
"""

import array
import concurrent.futures
import functools
import hashlib
import itertools
import json
import os
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from lomo_jax.data import kinds, sources
from lomo_jax.data.kinds import Example, Span
from lomo_jax.data.sources import Record
from lomo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SECTION = 2**14  # characters; a section has up to four times as many
_CHARACTERS = 2**20  # tokenised at a time
_CONTEXT = 64  # characters on each side of a cut, whose tokens are compared
# Where to cut, the best first; how many places of each are tried.
_GAPS = tuple(re.compile(r"(?<!\s)" + gap) for gap in (r"\n\s*\n", r"\n", r" "))
_TRIES = 4
_VERSION = 2  # of the files below
_IDS, _LOSS, _INDEX, _INFO = "tokens.bin", "loss.bin", "index.npz", "info.json"


class Tokens(NamedTuple):
    """A tokenised dataset. Arrays of tokens are memory maps; the others have a number a section."""

    ids: np.ndarray  # uint16 or uint32 [tokens]
    loss: np.ndarray | None  # bool [tokens], whether the loss is on it; None: on all
    ends: np.ndarray  # int64 [sections], the index behind its last token
    document: np.ndarray  # int64 [sections], the number of its document or example
    hashes: np.ndarray  # uint64 [sections], of the text, whatever the tokenizer
    digests: np.ndarray  # uint64 [sections], of tokens and loss
    kind: str
    files_read: list[str]
    files_left_out: list[str]


class _Section(NamedTuple):
    where: str
    example: Example
    is_first: bool = True  # of its document
    is_last: bool = True


def tokenize(
    paths: Sequence[str],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    format: str | None = None,
    text_key: str = "text",
    template: str | None = None,
    train_on: str = "answers",
    special_tokens: str = "parse",
    vocab_size: int | None = None,
) -> Tokens:
    """Tokenises a dataset, or finds it in the cache.

    Args:
      paths: See `sources.find`. All records have one kind.
      tokenizer: The model's tokenizer.
      format: The kind of the records, one of `kinds.FORMATS`; None: the columns tell it.
      text_key: The column of a text.
      template: A file of Jinja, or Jinja source; see `kinds.make_kind`.
      train_on: "answers" or "all".
      special_tokens: "parse" special tokens that a text spells out, or read them as "text".
      vocab_size: The size of the model's vocabulary; None for no check.

    Raises:
      UserError: Nothing is found, a record is wrong, or a token is outside the vocabulary.
    """
    found = sources.find_all(paths)
    template = kinds.read_template(template)
    settings = [format, text_key, template, train_on, special_tokens, vocab_size]
    identity = [source.identity for source in found.sources]
    key = _hash(json.dumps([_VERSION, identity, settings, _describe(tokenizer)]).encode(), 16)
    folder = cache_folder() / key.hex()
    if folder.exists() and _read_info(folder) is None:
        shutil.rmtree(folder, ignore_errors=True)  # it is damaged
    if not folder.exists():
        writer = _Writer(tokenizer, special_tokens, vocab_size)
        records = itertools.chain.from_iterable(source.read() for source in found.sources)
        first = next(records, None)
        kind = "text"
        if first is not None:
            if template is not None and format not in (None, "chat"):
                raise UserError(
                    f"data.format={format} has a text of its own: leave out data.format or "
                    "data.template"
                )
            kind = format or kinds.find_kind(first, text_key, template is not None)
            if kind == "chat" and special_tokens == "text":
                raise UserError(
                    "data.special_tokens=text would also spell out the special tokens that the "
                    "chat template writes: leave it out for conversations"
                )
            make = kinds.make_kind(
                kind, tokenizer, text_key=text_key, template=template, train_on=train_on
            )
            examples = ((r, make(r)) for r in itertools.chain([first], records))
            is_exact = writer.is_exact if kind == "text" else None
            sections = _sections(examples, is_exact)
        else:
            sections = iter(())
        has_loss = kind != "text" and train_on == "answers"
        writer.write(folder, sections, has_loss, {"kind": kind})
    names = [source.name for source in found.sources]
    return _read(folder, names, found.left_out, paths)


def cache_folder() -> Path:
    """Returns the folder of tokenised datasets; `LOMO_JAX_CACHE` sets its parent."""
    parent = os.environ.get("LOMO_JAX_CACHE") or "~/.cache/lomo_jax"
    return Path(parent).expanduser() / "tokens"


def _describe(tokenizer: "PreTrainedTokenizerBase") -> str:
    """Returns a hash of what the tokens of a text depend on."""
    import tokenizers
    import transformers

    backend = getattr(tokenizer, "backend_tokenizer", None)
    model = backend.to_str() if backend is not None else sorted(tokenizer.get_vocab().items())
    versions = transformers.__version__, tokenizers.__version__
    parts = type(tokenizer).__name__, tokenizer.special_tokens_map, tokenizer.chat_template
    return _hash(repr([versions, parts, model]).encode(), 16).hex()


def _read(folder: Path, names: list[str], left_out: list[str], paths: Sequence[str]) -> Tokens:
    info = _read_info(folder)
    if info is None:
        raise UserError(f"{folder} was changed by another process: start again")
    try:
        index = dict(np.load(folder / _INDEX))
    except (OSError, ValueError, zipfile.BadZipFile) as error:
        raise UserError(f"{folder} is damaged: delete it, it is made again") from error
    if not index["ends"].any():
        raise UserError(f"{', '.join(paths)} has no text, it is empty or blank: add text")
    ids = np.memmap(folder / _IDS, info["dtype"], mode="r")
    loss = np.memmap(folder / _LOSS, np.bool_, mode="r") if _LOSS in info["sizes"] else None
    return Tokens(ids, loss, **index, kind=info["kind"], files_read=names, files_left_out=left_out)


def _read_info(folder: Path) -> dict[str, Any] | None:
    """Returns what is known of a tokenised dataset; None if a file is missing or cut off."""
    try:
        info = json.loads((folder / _INFO).read_text())
        sizes = {name: (folder / name).stat().st_size for name in info["sizes"]}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return info if sizes == info["sizes"] else None


# Sections, the ids of each, and, of each token, where its text starts and ends.
_Encoded = tuple[list[_Section], list[list[int]], Iterable[list[Span]]]


class _Writer:
    """Tokenises sections, and writes them into a folder."""

    def __init__(
        self, tokenizer: "PreTrainedTokenizerBase", special_tokens: str, vocab_size: int | None
    ):
        self._tokenizer = tokenizer
        self._split_special = {"split_special_tokens": True} if special_tokens == "text" else {}
        self._vocab_size = vocab_size
        highest = max(tokenizer.get_vocab().values(), default=0)
        self._dtype = np.dtype(np.uint16 if highest < 2**16 else np.uint32)
        # The special tokens around a text.
        full, bare = tokenizer("a")["input_ids"], self._encode(["a"])["input_ids"][0]
        start = next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)
        self._prefix, self._suffix = full[:start], full[start + len(bare) :]
        end = tokenizer.eos_token_id
        if end is not None and self._suffix[-1:] != [end]:
            self._suffix = [*self._suffix, end]

    def _encode(self, texts: list[str], **kwargs: Any) -> Any:
        options: dict[str, Any] = {"return_attention_mask": False, "verbose": False}
        options |= {"add_special_tokens": False, **self._split_special, **kwargs}
        return self._tokenizer(texts, **options)

    def _ids(self, texts: list[str]) -> list[list[int]]:
        if not self._tokenizer.is_fast:
            return self._encode(texts)["input_ids"]
        # Twice as fast as `_encode`, whose last call has set the options.
        backend: Any = getattr(self._tokenizer, "backend_tokenizer")  # noqa: B009
        encoded = backend.encode_batch_fast(texts, add_special_tokens=False)
        return [encoding.ids for encoding in encoded]

    def _ids_and_offsets(self, batch: list[_Section], has_loss: bool) -> _Encoded:
        texts = [section.example.text for section in batch]
        if not has_loss:
            return batch, self._ids(texts), itertools.repeat([])
        encoded = self._encode(texts, return_offsets_mapping=True)
        return batch, encoded["input_ids"], encoded["offset_mapping"]

    def is_exact(self, left: str, gap: str, right: str) -> bool:
        """Whether the tokens of left + gap + right are those of left and of right."""
        whole, left_ids, right_ids = self._ids([left + gap + right, left, right])
        return whole == left_ids + right_ids

    def write(
        self, folder: Path, sections: Iterable[_Section], has_loss: bool, info: dict[str, Any]
    ) -> None:
        """Writes the files; the folder appears when they are complete."""
        columns = {"ends": "q", "document": "q", "hashes": "Q", "digests": "Q"}
        index = {name: array.array(code) for name, code in columns.items()}
        document, end = -1, 0
        try:
            folder.parent.mkdir(parents=True, exist_ok=True)
            temporary = Path(tempfile.mkdtemp(prefix=".", dir=folder.parent))
        except OSError as error:
            raise UserError(
                f"{folder.parent} cannot be written: {error.strerror}; set LOMO_JAX_CACHE to "
                "another folder for tokenised datasets"
            ) from error
        try:
            with (temporary / _IDS).open("wb") as ids, (temporary / _LOSS).open("wb") as loss:
                encode = functools.partial(self._ids_and_offsets, has_loss=has_loss)
                for encoded in _ahead(encode, _batches(sections)):
                    for section, tokens, mask in self._tokens(encoded, has_loss):
                        document += section.is_first
                        end += len(tokens)
                        digest = hashlib.blake2b(tokens.tobytes(), digest_size=8)
                        if mask is not None:
                            digest.update(mask.tobytes())
                            loss.write(mask.tobytes())
                        ids.write(tokens.tobytes())
                        words = " ".join(section.example.key.split()).encode()
                        index["ends"].append(end)
                        index["document"].append(document)
                        index["hashes"].append(int.from_bytes(_hash(words, 8)))
                        index["digests"].append(int.from_bytes(digest.digest()))
            if not has_loss:
                (temporary / _LOSS).unlink()
            dtypes = {"q": np.int64, "Q": np.uint64}
            arrays: dict[str, Any] = {
                name: np.frombuffer(x, dtypes[x.typecode]) for name, x in index.items()
            }
            np.savez(temporary / _INDEX, **arrays)
            sizes = {file.name: file.stat().st_size for file in temporary.iterdir()}
            info = {**info, "dtype": self._dtype.str, "sizes": sizes}
            (temporary / _INFO).write_text(json.dumps(info))
            try:
                temporary.rename(folder)
            except OSError:
                if _read_info(folder) is None:  # else another process was faster
                    raise
        except OSError as error:
            raise UserError(
                f"{temporary} cannot be written: {error.strerror or error}; make room, or set "
                "LOMO_JAX_CACHE to another folder for tokenised datasets"
            ) from error
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def _tokens(
        self, encoded: _Encoded, has_loss: bool
    ) -> Iterator[tuple[_Section, np.ndarray, np.ndarray | None]]:
        """Yields each section with its tokens and, if `has_loss`, which of them have a loss."""
        for section, ids, spans in zip(*encoded, strict=False):
            prefix, suffix = [], []
            if not section.example.is_rendered:
                if section.is_first and ids[: len(self._prefix)] != self._prefix:
                    prefix = self._prefix
                if section.is_last and ids[len(ids) - len(self._suffix) :] != self._suffix:
                    suffix = self._suffix
            tokens = np.array([*prefix, *ids, *suffix], np.int64)
            self._check(section, tokens)
            mask = None
            if has_loss:
                mask = np.zeros(len(tokens), np.bool_)
                answers = section.example.answers
                assert answers is not None
                place = slice(len(prefix), len(prefix) + len(ids))
                mask[place] = _in_spans([end for _, end in spans], answers)
                if answers and answers[-1][1] == len(section.example.text):
                    mask[place.stop :] = True
            yield section, tokens.astype(self._dtype), mask

    def _check(self, section: _Section, tokens: np.ndarray) -> None:
        if self._vocab_size is None or not len(tokens) or tokens.max() < self._vocab_size:
            return
        token = int(tokens.max())
        raise UserError(
            f"{section.where} has the token {token} ({self._tokenizer.decode([token])!r}), but the "
            f"model only {self._vocab_size} tokens, from 0: use the tokenizer that the model was "
            "trained with"
        )


def _in_spans(ends: list[int], spans: Sequence[Span]) -> np.ndarray:
    """Returns whether each token is in a span: a token belongs to where its last character is."""
    # Not its first character: byte-level tokenizers leave white space out of it.
    tokens = np.array(ends, np.int64)
    inside = np.zeros(len(tokens), np.bool_)
    for start, end in spans:
        inside |= (start < tokens) & (tokens <= end)
    return inside


def _sections(
    examples: Iterable[tuple[Record, Example]],
    is_exact: Callable[[str, str, str], bool] | None,
) -> Iterator[_Section]:
    """Yields the examples, each in one section or, with `is_exact`, cut, without blank ones."""
    if is_exact is None:
        for record, example in examples:
            yield _Section(record.where, example)
        return
    for _, parts in itertools.groupby(examples, _number()):
        head = next(parts)
        texts = (example.text for _, example in itertools.chain([head], parts))
        section: _Section | None = None
        for text in _cut(texts, is_exact):
            if section is not None:
                yield section
            example = Example(text, None, text)
            section = _Section(head[0].where, example, section is None, False)
        if section is not None and not (section.is_first and not section.example.text.strip()):
            yield section._replace(is_last=True)


def _number() -> Callable[[tuple[Record, Example]], int]:
    """Returns a function that numbers the document of each record."""
    count = -1

    def number(item: tuple[Record, Example]) -> int:
        nonlocal count
        count += not item[0].continues
        return count

    return number


def _cut(texts: Iterable[str], is_exact: Callable[[str, str, str], bool]) -> Iterator[str]:
    """Cuts a text, given in parts of any size, into sections."""
    rest = ""
    for text in texts:
        start, rest = 0, rest + text
        while len(rest) - start > 4 * SECTION:
            end, following = _find_cut(rest, start, is_exact)
            yield rest[start:end]
            start = following
        rest = rest[start:]
    while len(rest) > 2 * SECTION:
        end, following = _find_cut(rest, 0, is_exact)
        yield rest[:end]
        rest = rest[following:]
    if rest:
        yield rest


def _find_cut(text: str, start: int, is_exact: Callable[[str, str, str], bool]) -> tuple[int, int]:
    """Returns where a section ends and where the next one starts.

    White space stays with the next section, or is left out where the tokenizer writes it by itself
    before each text, as SentencePiece does.
    """
    first, last = start + SECTION, min(start + 4 * SECTION, len(text) - 1)
    for pattern in _GAPS:
        for gap in itertools.islice(pattern.finditer(text, first, last), _TRIES):
            left = text[gap.start() - _CONTEXT : gap.start()]
            for following in (gap.start(), gap.end()):
                right = text[following : following + _CONTEXT]
                if is_exact(left, text[gap.start() : following], right):
                    return gap.start(), following
    return last, last


def _batches(sections: Iterable[_Section]) -> Iterator[list[_Section]]:
    batch: list[_Section] = []
    length = 0
    for section in sections:
        batch.append(section)
        length += len(section.example.text)
        if length >= _CHARACTERS:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch


def _ahead(function: Callable[[Any], Any], items: Iterable[Any]) -> Iterator[Any]:
    """Yields the result for each item; the next one is computed by a thread meanwhile."""
    with concurrent.futures.ThreadPoolExecutor(1) as thread:
        result: concurrent.futures.Future[Any] | None = None
        for item in items:
            following = thread.submit(function, item)
            if result is not None:
                yield result.result()
            result = following
        if result is not None:
            yield result.result()


def _hash(data: bytes, size: int) -> bytes:
    return hashlib.blake2b(data, digest_size=size).digest()
