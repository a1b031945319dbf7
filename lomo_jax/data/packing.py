"""Packing of documents and examples into rows of equal length, with random access to the rows.

By hand, because Grain's packing works on a stream. With random access a run shuffles all rows and
resumes at any of them.

Dimensions: B batch, T sequence. A piece is a stretch of one document's tokens within one row.
"""

from collections.abc import Sequence
from typing import Any, SupportsIndex, TypedDict

import numpy as np


class Batch(TypedDict):
    """A training example: arrays of shape `[T]` for a row, `[B, T]` for a batch."""

    tokens: np.ndarray  # int32
    targets: np.ndarray  # int32: the next token of the same document
    weights: np.ndarray  # float32: 1 for a target with loss, 0 for another one and for padding
    positions: np.ndarray  # int32: 0, 1, ... in each piece
    segments: np.ndarray  # int32: 1, 2, ... for each piece of the row, 0 for padding


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """Assigns pieces to rows by best-fit-decreasing bin packing.

    Longest first, each piece goes into the fullest row that has room. Linear time: the set of free
    space among the rows is the bits of one integer.

    Args:
      lengths: Integer `[pieces]`, from 1 to `capacity`.
      capacity: The length of a row.

    Returns:
      int64 `[pieces]`, the row of each piece; rows are numbered from 0 without gaps.

    References:
      Ding et al., Fewer Truncations Improve Language Modeling, https://arxiv.org/abs/2404.10830
    """
    row_of_piece = np.empty(len(lengths), np.int64)
    rows_by_space: list[list[int]] = [[] for _ in range(capacity)]
    spaces = 0  # bit s is set if some row has exactly s free places
    num_rows = 0
    for piece in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[piece])
        roomy = spaces >> length
        if roomy:
            space = length + (roomy & -roomy).bit_length() - 1
            row = rows_by_space[space].pop()
            if not rows_by_space[space]:
                spaces ^= 1 << space
        else:
            row, space, num_rows = num_rows, capacity, num_rows + 1
        row_of_piece[piece] = row
        if space > length:
            rows_by_space[space - length].append(row)
            spaces |= 1 << (space - length)
    return row_of_piece


class PackedRows:
    """A random-access source of rows, `Batch` of `[T]` arrays, for `grain.MapDataset.source`.

    A document of n tokens has n - 1 targets; each is in exactly one row. A document with more than
    T targets is split into pieces of T and a remainder. Memory holds only indices, 12 bytes per
    piece and 8 per row; tokens are read when a row is accessed.
    """

    def __init__(
        self,
        tokens: np.ndarray,
        spans: np.ndarray,
        sequence_length: int,
        *,
        loss: np.ndarray | None = None,
        packing: bool = True,
    ):
        """Packs documents.

        Args:
          tokens: Integer `[total]`, the concatenated documents; may be a memory map.
          spans: int64 `[documents, 2]`, start and end of each document in `tokens`.
          sequence_length: T.
          loss: Bool `[total]`, whether the loss is on a token; None: on all.
          packing: Whether pieces share rows.
        """
        starts, num_targets = spans[:, 0], np.maximum(spans[:, 1] - spans[:, 0] - 1, 0)
        num_pieces = -(-num_targets // sequence_length)
        document = np.repeat(np.arange(len(spans)), num_pieces)
        nth = np.arange(len(document)) - np.repeat(np.cumsum(num_pieces) - num_pieces, num_pieces)
        offsets = nth * sequence_length
        lengths = np.minimum(num_targets[document] - offsets, sequence_length).astype(np.int32)
        row_of_piece = best_fit(lengths, sequence_length) if packing else np.arange(len(lengths))
        order = np.argsort(row_of_piece, kind="stable")

        self._tokens, self._loss = tokens, loss
        self._starts = (starts[document] + offsets)[order]
        self._lengths = lengths[order]
        num_rows = int(row_of_piece.max(initial=-1)) + 1
        self._first_piece = np.searchsorted(row_of_piece[order], np.arange(num_rows + 1))
        self.sequence_length = sequence_length
        self.num_targets = int(num_targets.sum())  # with and without loss

    def __len__(self) -> int:
        return len(self._first_piece) - 1

    def __getitem__(self, index: SupportsIndex) -> Batch:
        row = int(index)
        shape = (self.sequence_length,)
        batch = Batch(
            tokens=np.zeros(shape, np.int32),
            targets=np.zeros(shape, np.int32),
            weights=np.zeros(shape, np.float32),
            positions=np.zeros(shape, np.int32),
            segments=np.zeros(shape, np.int32),
        )
        end = 0
        pieces = range(self._first_piece[row], self._first_piece[row + 1])
        for segment, piece in enumerate(pieces, 1):
            start, length = self._starts[piece], int(self._lengths[piece])
            place, end = slice(end, end + length), end + length
            batch["tokens"][place] = self._tokens[start : start + length]
            targets = slice(start + 1, start + length + 1)
            batch["targets"][place] = self._tokens[targets]
            batch["weights"][place] = 1 if self._loss is None else self._loss[targets]
            batch["positions"][place] = np.arange(length)
            batch["segments"][place] = segment
        return batch


class Batches:
    """A random-access source of batches, or of some rows of each batch."""

    def __init__(self, dataset: Any, batch_size: int, rows: Sequence[int]):
        """Groups rows into batches.

        Args:
          dataset: Rows with random access, finite or endless.
          batch_size: B.
          rows: The rows of each batch to read.
        """
        self._dataset, self._batch_size, self._rows = dataset, batch_size, rows

    def __len__(self) -> int:
        return -(-len(self._dataset) // self._batch_size)

    def __getitem__(self, index: SupportsIndex) -> Batch:
        first = int(index) * self._batch_size
        rows = [self._row(first + row) for row in self._rows]
        return Batch(**{name: np.stack([row[name] for row in rows]) for name in rows[0]})

    def _row(self, index: int) -> Any:
        if index < len(self._dataset):
            return self._dataset[index]
        return {name: np.zeros_like(x) for name, x in self._dataset[0].items()}  # weight 0
