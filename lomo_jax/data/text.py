"""A dataset of text, split by document into training and held-out."""

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
from lomo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

# Reading a row takes microseconds: one thread prefetches enough, and the held-out split needs none.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)


class TextSplits(NamedTuple):
    """The training split and the held-out split of a text dataset."""

    # Endless. `get_state()` returns the position as JSON, `set_state()` restores it.
    train: grain.DatasetIterator[Batch]
    # Finite. Every iteration gives the same batches; rows of weight 0 fill up the last one.
    held_out: grain.IterDataset[Batch]
    # Hash of documents and tokenisation. With equal fingerprints and arguments, the batches after a
    # position are the same.
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
) -> TextSplits:
    """Tokenises documents, splits them into training and held-out and packs both into batches.

    **Documents.** A line of a `.jsonl` file is a document. So is any other file, unless it is
    longer than 32 characters per token of `sequence_length` (about eight sequences): it is then
    split at the next blank line after each such stretch. Documents that differ only in white space
    are duplicates; one is used. The tokenizer encodes each document with its special tokens, and
    its end-of-text token follows, if it has one.

    **Held-out split.** A fraction `eval_fraction` of the documents, at least one, chosen by a hash
    of their text alone: the same for every seed, and nearly the same after documents are added. If
    there is only one document, its end is held out.

    **Packing.** A document longer than a row is split into full rows and a remainder. Remainders
    and short documents share rows (best fit) but do not see each other: each has its own segment,
    and positions that start at 0. Each target of the training split comes once per epoch. Rows are
    reshuffled every epoch; a batch may hold the last rows of one epoch and the first of the next.

    **Memory.** Documents are tokenised once, at the start, a million characters at a time, into an
    unnamed temporary file that is memory-mapped (2 bytes per token, 4 for a vocabulary above
    65,536). Beyond that, memory holds about 100 bytes per document and 20 per row.

    Args:
      path: A file, a folder (its `.txt`, `.md` and `.jsonl` files, at any depth), a glob pattern,
        or several of these.
      tokenizer: The model's tokenizer.
      sequence_length: Tokens per row.
      batch_size: Rows per batch.
      seed: Seed of the training order, from 0 to 2**32 - 1.
      eval_fraction: Fraction of the documents to hold out, at least 0 and below 1.
      text_key: The key of the text in a `.jsonl` line.
      rows: The rows of each batch to read, for a process that needs only those. Default: all.

    Returns:
      The two splits and a fingerprint; see `TextSplits` and `Batch`.

    Raises:
      UserError: An argument is out of range, a path does not exist or matches no file, a file
        cannot be read as text, or there is too little text.
    """
    if not path:
        raise UserError("path is empty: give a file, a folder or a glob of UTF-8 text")
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction is {eval_fraction}: it must be at least 0 and below 1")
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}: it must be from 0 to 2**32 - 1")
    for name, value in (("sequence_length", sequence_length), ("batch_size", batch_size)):
        if value < 1:
            raise UserError(f"{name} is {value}: it must be at least 1")

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
        raise UserError(
            f"the training split has {train_rows.num_targets} tokens to predict, less than one "
            f"sequence of {sequence_length}: add text or lower sequence_length"
        )
    if eval_fraction and not eval_rows.num_targets:
        raise UserError(
            f"too little text to hold out eval_fraction={eval_fraction}: add text or raise "
            "eval_fraction"
        )
    _log.info(
        "%d documents, %d duplicates dropped; training split: %d tokens in %d rows, %.2f %% "
        "padding; held-out split: %d tokens in %d documents",
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
    train = grain.MapDataset.source(Batches(train, batch_size, rows)).to_iter_dataset(_PREFETCH)
    # Shuffled, so that the first batches are a fair sample of the split.
    evaluation = grain.MapDataset.source(eval_rows).shuffle(0)
    evaluation = grain.MapDataset.source(Batches(evaluation, batch_size, rows))
    lengths = spans[distinct, 1] - spans[distinct, 0]
    fingerprint = hashlib.blake2b(hashes[distinct].tobytes() + lengths.tobytes(), digest_size=8)
    return TextSplits(iter(train), evaluation.to_iter_dataset(_NO_THREADS), fingerprint.hexdigest())


def _tokenize(
    documents: Iterable[str], tokenizer: "PreTrainedTokenizerBase"
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns all tokens in one array, the span of each document, and the documents' hashes."""
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
        # The map stays valid after the file is closed; its pages need not stay in memory.
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
    """Splits spans: holds out the first ones, or the end of a single one."""
    if not fraction:
        return spans, spans[:0]
    if len(spans) == 1:
        start, end = spans[0]
        cut = end - round((end - start) * fraction)
        return np.array([[start, cut]]), np.array([[cut, end]])
    count = min(max(1, round(len(spans) * fraction)), len(spans) - 1)
    return spans[count:], spans[:count]
