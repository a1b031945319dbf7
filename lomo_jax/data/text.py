"""Text to train on, with a part held out by document."""

import hashlib
import itertools
import logging
import os
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, NamedTuple

import grain
import numpy as np

from lomo_jax.data.documents import read_documents
from lomo_jax.data.packing import Batch, Batches, PackedRows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Rows are cut from memory in microseconds: one thread is enough to have the next batches ready, and
# held-out ones need none.
_AHEAD = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class Text(NamedTuple):
    """What `text_dataset` makes of text."""

    # Endless; `get_state()` and `set_state()` give and restore the position, as JSON.
    train: grain.DatasetIterator[Batch]
    # Finite: the same batches whenever it is iterated, the last filled up with rows of weight 0.
    held_out: grain.IterDataset[Batch]
    # Of documents and tokenizer. Where it is the same, so is what comes after a position, given
    # the same other arguments.
    fingerprint: str


def text_dataset(
    path: str | os.PathLike[str] | Sequence[str | os.PathLike[str]],
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    eval_fraction: float = 0.05,
    text_key: str = "text",
    rows: Sequence[int] | None = None,
) -> Text:
    """Tokenises text, holds out a part of it and packs both parts into batches.

    Documents. A line of a `.jsonl` file is a document. So is any other file, unless it is longer
    than 32 characters per token of `sequence_length` (about eight sequences): then it is cut at
    the blank lines after each such stretch. Documents that differ in nothing but white space are
    taken once. A document's tokens are those the tokenizer gives, with the special tokens it adds
    itself, and its end-of-text token where it has one.

    Held-out part. `eval_fraction` of the documents, one at least, chosen by a hash of their text
    alone: the same for every seed, and nearly the same when documents are added. Where there is
    only one document, its end is held out.

    Packing. A document longer than a row is cut into rows and a remainder; remainders and short
    documents share rows, by best fit, and do not see each other: each has its own segment, and its
    positions start at 0. Every target of the training part comes once an epoch. Rows are shuffled,
    anew each epoch, and an epoch's last rows share a batch with the next one's first.

    Memory. The text is tokenised once, at the start, a million characters at a time. The tokens lie
    in an unnamed temporary file (2 bytes each, 4 where the vocabulary is larger than 65,536) that
    is mapped, not read; besides, about 100 bytes a document and 20 a row are held.

    Args:
      path: a file, a folder (its `.txt`, `.md` and `.jsonl` files, at any depth), a glob pattern,
        or several of these.
      tokenizer: the model's own.
      sequence_length: tokens in a row.
      batch_size: rows in a batch.
      seed: of the training order, from 0 to 2**32 - 1.
      eval_fraction: share of the documents held out, from 0 to below 1; 0 holds out none.
      text_key: the key of the text in a `.jsonl` line.
      rows: which rows of every batch to read, for a process that needs only those; all by default.

    Returns:
      The training batches, the held-out ones, and a fingerprint; see `Text` and `Batch`.

    Raises:
      FileNotFoundError: a path does not exist or matches no file.
      ValueError: an argument is out of range, a file cannot be read as text, or there is too
        little text.
    """
    if not path:
        raise ValueError("path is empty: give a file, a folder or a glob of UTF-8 text")
    if not 0 <= eval_fraction < 1:
        raise ValueError(f"eval_fraction is {eval_fraction}: it must be from 0 to below 1")
    if not 0 <= seed < 2**32:
        raise ValueError(f"seed is {seed}: it must be from 0 to 2**32 - 1")
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise ValueError(f"{name} is {value}: it must be at least 1")

    paths = [path] if isinstance(path, str | os.PathLike) else path
    documents = itertools.chain.from_iterable(
        read_documents(os.fspath(p), text_key=text_key, part_size=32 * sequence_length)
        for p in paths
    )
    tokens, spans, hashes = _tokenize(documents, tokenizer)
    _, distinct = np.unique(hashes, return_index=True)  # sorted by hash: a fixed random order
    training, held_out = _hold_out(spans[distinct], eval_fraction)
    train_rows = PackedRows(tokens, training, sequence_length)
    eval_rows = PackedRows(tokens, held_out, sequence_length)
    if train_rows.num_targets < sequence_length:
        raise ValueError(
            f"the training text has {train_rows.num_targets} tokens to predict, less than one "
            f"sequence of {sequence_length}: add text or lower sequence_length"
        )
    if eval_fraction and not eval_rows.num_targets:
        raise ValueError(
            f"too little text to hold out a part of {eval_fraction}: add text or set "
            "eval_fraction to 0"
        )
    _log.info(
        "%d documents, %d more left out as duplicates; training on %d tokens in %d rows, %.2f %% "
        "padding; %d tokens held out in %d documents",
        len(distinct),
        len(hashes) - len(distinct),
        train_rows.num_targets,
        len(train_rows),
        100 * (1 - train_rows.num_targets / (len(train_rows) * sequence_length)),
        eval_rows.num_targets,
        len(held_out),
    )
    rows = range(batch_size) if rows is None else rows
    train = grain.MapDataset.source(train_rows).shuffle(seed).repeat()
    train = grain.MapDataset.source(Batches(train, batch_size, rows)).to_iter_dataset(_AHEAD)
    # In a random order, so that the first batches are a fair sample of all.
    evaluation = grain.MapDataset.source(eval_rows).shuffle(0)
    evaluation = grain.MapDataset.source(Batches(evaluation, batch_size, rows))
    lengths = spans[distinct, 1] - spans[distinct, 0]
    fingerprint = hashlib.blake2b(hashes[distinct].tobytes() + lengths.tobytes(), digest_size=8)
    return Text(iter(train), evaluation.to_iter_dataset(_NO_THREADS), fingerprint.hexdigest())


def _tokenize(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all tokens in one array, the span of each document in it, and the texts' hashes."""
    dtype = np.uint16 if len(tokenizer) <= 2**16 else np.uint32
    end_of_text = tokenizer.eos_token_id
    lengths: list[int] = []
    hashes: list[int] = []
    with tempfile.TemporaryFile() as spool:
        for texts in _chunks(documents, 2**20):
            encoded = tokenizer(texts, return_attention_mask=False, verbose=False)["input_ids"]
            for text, ids in zip(texts, encoded, strict=True):
                if end_of_text is not None and ids[-1:] != [end_of_text]:
                    ids.append(end_of_text)
                np.asarray(ids, dtype).tofile(spool)
                lengths.append(len(ids))
                words = " ".join(text.split()).encode()
                hashes.append(int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()))
        spool.flush()
        # The map outlives the file: the pages can be dropped from memory and read again.
        tokens = np.memmap(spool, dtype, mode="r") if sum(lengths) else np.zeros(0, dtype)
    ends = np.cumsum(lengths, dtype=np.int64)
    spans = np.stack([ends - lengths, ends], axis=1)
    return tokens, spans, np.array(hashes, np.uint64)


def _chunks(documents: Iterable[str], characters: int) -> Iterator[list[str]]:
    chunk: list[str] = []
    length = 0
    for text in documents:
        chunk.append(text)
        length += len(text)
        if length >= characters:
            yield chunk
            chunk, length = [], 0
    if chunk:
        yield chunk


def _hold_out(spans: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    """Returns the spans for training and those held out: the first ones, or the end of the only."""
    if not fraction:
        return spans, spans[:0]
    if len(spans) == 1:
        start, end = spans[0]
        cut = end - round((end - start) * fraction)
        return np.array([[start, cut]]), np.array([[cut, end]])
    count = min(max(1, round(len(spans) * fraction)), len(spans) - 1)
    return spans[count:], spans[:count]
