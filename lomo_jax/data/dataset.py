"""A dataset for training: tokenised, split into training and held-out, and packed into batches."""

import functools
import hashlib
import itertools
import logging
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import grain
import numpy as np

from lomo_jax.data.packing import Batch, Batches, PackedRows
from lomo_jax.data.tokens import Tokens, tokenize
from lomo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_log = logging.getLogger(__name__)

_SHOWN = 3  # first examples in a summary

# Reading a row takes microseconds: one thread prefetches enough, and the held-out split needs none.
_PREFETCH = grain.ReadOptions(num_threads=1, prefetch_buffer_size=2)
_NO_THREADS = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)

Path = str | os.PathLike[str]
Paths = Path | Sequence[Path] | Mapping[str, float]


class Summary(NamedTuple):
    """What was found in a dataset, held-out examples included. Documents of text are examples."""

    kind: str  # several, joined by a comma, if sources differ
    files_read: list[str]
    files_left_out: list[str]  # files of folders that were not read
    examples: int
    tokens: int
    loss_tokens: int
    cut: int  # examples cut at `sequence_length`; documents of text never are
    left_out: int  # examples that are too long, or whose answer lies behind the cut
    repeated: int  # examples that are the same as an earlier one
    lengths: np.ndarray  # int64 [examples], tokens of each before a cut
    first: list[tuple[np.ndarray, np.ndarray]]  # tokens and loss (0 or 1) of the first examples

    def describe(self) -> str:
        """Returns the counts in words."""
        files = len(self.files_read)
        name = self.files_read[0] if files == 1 else f"{files} files"
        parts = [
            f"{self.kind} from {name}",
            f"{self.examples:,} examples",
            f"{self.tokens:,} tokens, {self.loss_tokens:,} with loss",
        ]
        counts = {"files left out": len(self.files_left_out), "cut": self.cut}
        counts |= {"left out": self.left_out, "repeated": self.repeated}
        return ", ".join(parts + [f"{count:,} {name}" for name, count in counts.items() if count])


class Rows(NamedTuple):
    """A dataset as rows that can be accessed in any order, for each source."""

    train: list[PackedRows]
    held_out: list[PackedRows]
    weights: list[float] | None  # of the sources; None: all rows are used equally often
    fingerprint: str
    summary: Summary


class TextSplits(NamedTuple):
    """The training split and the held-out split of a dataset."""

    # Endless. `get_state()` returns the position as JSON, `set_state()` restores it.
    train: grain.DatasetIterator[Batch]
    # Finite. Every iteration gives the same batches; rows of weight 0 fill up the last one.
    held_out: grain.IterDataset[Batch]
    # Hash of documents and tokenisation. With equal fingerprints and arguments, the batches after a
    # position are the same.
    fingerprint: str
    rows_per_epoch: int  # of the training split
    summary: Summary


def text_dataset(
    path: Paths,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    batch_size: int,
    seed: int = 0,
    rows: Sequence[int] | None = None,
    **options: Any,
) -> TextSplits:
    """Reads a dataset and gives batches of its training split and of its held-out split.

    Rows are reshuffled every epoch; a batch may hold the last rows of one epoch and the first of
    the next. With weights, a row comes from each source as often as its weight says.

    Args:
      path: See `read_rows`.
      tokenizer: The model's tokenizer.
      sequence_length: Tokens per row.
      batch_size: Rows per batch.
      seed: Seed of the training order, from 0 to 2**32 - 1.
      rows: The rows of each batch to read, for a process that needs only those. Default: all.
      **options: Other arguments of `read_rows`.

    Returns:
      The two splits, a fingerprint and a summary; see `TextSplits` and `Batch`.

    Raises:
      UserError: An argument is out of range, a path does not exist, a record is wrong, or there is
        too little text.
    """
    if not 0 <= seed < 2**32:
        raise UserError(f"seed is {seed}: it must be from 0 to 2**32 - 1")
    if batch_size < 1:
        raise UserError(f"batch_size is {batch_size}: it must be at least 1")
    dataset = read_rows(path, tokenizer, sequence_length=sequence_length, **options)
    has_text = "text" in dataset.summary.kind.split(", ")
    targets = sum(part.num_targets for part in dataset.train)
    if targets < (sequence_length if has_text else 1):
        raise UserError(
            f"the training split has {targets} tokens to predict, less than one sequence of "
            f"{sequence_length}: add text or lower sequence_length"
        )
    has_held_out = any(part.num_targets for part in dataset.held_out)
    if options.get("eval_fraction", 1) and not has_held_out:
        raise UserError(
            f"too little text to hold out eval_fraction={options.get('eval_fraction', 0.05)}: add "
            "text or raise eval_fraction"
        )
    _log_summary(dataset)
    rows = range(batch_size) if rows is None else rows
    parts = [grain.MapDataset.source(part) for part in dataset.train]
    if dataset.weights is None:
        train = grain.MapDataset.concatenate(parts).shuffle(seed).repeat()
    else:
        endless = [part.shuffle(seed + i).repeat() for i, part in enumerate(parts)]
        train = grain.MapDataset.mix(endless, dataset.weights)
    train = grain.MapDataset.source(Batches(train, batch_size, rows)).to_iter_dataset(_PREFETCH)
    # Shuffled, so that the first batches are a fair sample of the split.
    parts = [grain.MapDataset.source(part) for part in dataset.held_out]
    evaluation = grain.MapDataset.concatenate(parts).shuffle(0)
    evaluation = grain.MapDataset.source(Batches(evaluation, batch_size, rows))
    return TextSplits(
        iter(train),
        evaluation.to_iter_dataset(_NO_THREADS),
        dataset.fingerprint,
        sum(map(len, dataset.train)),
        dataset.summary,
    )


def read_rows(
    path: Paths,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    sequence_length: int,
    validation_path: Path | Sequence[Path] | None = None,
    eval_fraction: float = 0.05,
    eval_documents: int | None = None,
    packing: bool = True,
    too_long: str = "cut",
    repeated: str = "leave_out",
    **options: Any,
) -> Rows:
    """Reads, tokenises and splits a dataset, and packs both splits into rows.

    **Examples.** A record is one example: a text, an instruction, a prompt or a conversation, as
    its columns tell; see `kinds`. A file of text is one document. The tokenizer's special tokens
    are put around it, and its end-of-text token behind it, if it has one; a conversation has those
    of the chat template.

    **Held-out split.** A fraction `eval_fraction` of the examples, at least one, chosen by a hash
    of their text alone: the same for every seed, and nearly the same after examples are added. A
    long text is chosen in sections of at least 16,384 characters. If there is only one section, its
    end is held out.

    **Packing.** A document longer than a row is split into full rows and a remainder; an example of
    another kind is never split. Remainders and short examples share rows (best fit) but do not see
    each other: each has its own segment, and positions that start at 0. Each target of the training
    split comes once per epoch.

    **Memory.** The tokens are in files (`tokens.cache_folder`) that are memory-mapped, and found
    again at the next start. Beyond that, memory holds about 100 bytes per section and 20 per row.

    Args:
      path: A path, several of one kind, or a dictionary of paths and the weights of their rows; see
        `sources.find`.
      tokenizer: The model's tokenizer.
      sequence_length: T, tokens per row. An example has at most T + 1: T that are read, and T that
        are predicted.
      validation_path: The held-out split, if it is not to be a part of `path`.
      eval_fraction: Fraction of the examples to hold out, at least 0 and below 1.
      eval_documents: Number of sections to hold out, instead of the fraction.
      packing: Whether examples share rows.
      too_long: What happens to an example of more than T + 1 tokens: "cut" at its end, or
        "leave_out". Documents of text are neither.
      repeated: What happens to examples that differ only in white space from an earlier one:
        "leave_out" or "keep".
      **options: Other arguments of `tokens.tokenize`.

    Raises:
      UserError: An argument is out of range, a path does not exist, a record is wrong, or no
        example has an answer in its first T + 1 tokens.
    """
    if not path:
        raise UserError("path is empty: give a file, a folder or a glob")
    if not 0 <= eval_fraction < 1:
        raise UserError(f"eval_fraction is {eval_fraction}: it must be at least 0 and below 1")
    if sequence_length < 1:
        raise UserError(f"sequence_length is {sequence_length}: it must be at least 1")
    weights = list(path.values()) if isinstance(path, Mapping) else None
    groups = [[key] for key in path] if isinstance(path, Mapping) else [_as_list(path)]
    if weights is not None and not all(0 < weight < float("inf") for weight in weights):
        raise UserError(f"path has the weights {weights}: they must be positive")

    sources = [tokenize(group, tokenizer, **options) for group in groups]
    chosen, count = _choose(sources, keep=repeated == "keep")
    held_out = np.zeros(0, np.uint64)
    if validation_path is None:
        hashes = [part.hashes[docs] for part, docs in zip(sources, chosen, strict=True)]
        held_out = _hold_out(np.concatenate(hashes), eval_fraction, eval_documents)
    fit = functools.partial(_fit, sequence_length=sequence_length, is_cut=too_long == "cut")
    whole = [fit(part, _spans(part, s)) for part, s in zip(sources, chosen, strict=True)]
    summary = _summary(sources, chosen, whole, sequence_length, count)
    if not summary.examples:
        raise UserError(
            f"{', '.join(summary.files_read[:3])}: no example has an answer within "
            f"sequence_length={sequence_length} tokens; raise it"
        )
    is_alone = sum(map(len, chosen)) == 1
    training, evaluation = [], []
    for part, sections in zip(sources, chosen, strict=True):
        split = np.isin(part.hashes[sections], held_out)
        if is_alone and part.kind == "text" and len(held_out):
            spans = _cut_end(_spans(part, sections), eval_fraction)
        else:
            spans = _spans(part, sections[~split]), _spans(part, sections[split])
        training.append(fit(part, spans[0]).spans)
        evaluation.append(fit(part, spans[1]).spans)
    empty = [group[0] for group, spans in zip(groups, training, strict=True) if not len(spans)]
    if weights is not None and empty:
        raise UserError(
            f"path: {empty[0]} has nothing to train on, because its examples are repeated, held "
            f"out, or have no answer within sequence_length={sequence_length} tokens: add some, or "
            "leave it out"
        )
    validation = sources
    if validation_path is not None:
        validation = [tokenize(_as_list(validation_path), tokenizer, **options)]
        [sections], _ = _choose(validation, keep=repeated == "keep")
        evaluation = [fit(validation[0], _spans(validation[0], sections)).spans]
        chosen = [*chosen, sections]

    def pack(sources: list[Tokens], spans: list[np.ndarray]) -> list[PackedRows]:
        return [
            PackedRows(part.ids, span, sequence_length, loss=part.loss, packing=packing)
            for part, span in zip(sources, spans, strict=True)
        ]

    identity = sources if validation is sources else [*sources, *validation]
    return Rows(
        pack(sources, training),
        pack(validation, evaluation),
        weights,
        _fingerprint(identity, chosen, weights),
        summary,
    )


def _as_list(path: Any) -> list[str]:
    paths = [path] if isinstance(path, str | os.PathLike) else path
    return [os.fspath(part) for part in paths]


def _choose(sources: list[Tokens], *, keep: bool) -> tuple[list[np.ndarray], int]:
    """Chooses the documents to use.

    Returns:
      The sections of each source's documents, in an order that depends on their text alone, and the
      number of documents that are the same as an earlier one.
    """
    keys = []
    for part in sources:
        first = np.flatnonzero(np.diff(part.document, prepend=-1))
        keys.append(np.add.reduceat(part.hashes, first))
    every = np.concatenate(keys)
    is_first = np.zeros(len(every), np.bool_)
    is_first[np.unique(every, return_index=True)[1]] = True
    count = int((~is_first).sum())
    used = np.ones_like(is_first) if keep else is_first
    ends = np.cumsum([len(key) for key in keys])
    chosen = []
    for part, key, mask in zip(sources, keys, np.split(used, ends[:-1]), strict=True):
        rank = np.empty(len(key), np.int64)
        rank[np.argsort(key, kind="stable")] = np.arange(len(key))
        sections = np.flatnonzero(mask[part.document])
        chosen.append(sections[np.argsort(rank[part.document[sections]], kind="stable")])
    return chosen, count


def _hold_out(hashes: np.ndarray, fraction: float, number: int | None) -> np.ndarray:
    """Returns the hashes of the sections to hold out: the smallest ones."""
    distinct = np.unique(hashes)
    if not fraction and not number:
        return distinct[:0]
    count = max(1, round(len(distinct) * fraction)) if number is None else number
    return distinct[: max(1, min(count, len(distinct) - 1))]


def _spans(part: Tokens, sections: np.ndarray) -> np.ndarray:
    """Returns start and end of each run of sections that follow each other in a document."""
    if not len(sections):
        return np.zeros((0, 2), np.int64)
    follows = (np.diff(sections) == 1) & (np.diff(part.document[sections]) == 0)
    first = np.flatnonzero(np.concatenate([[True], ~follows]))
    last = np.concatenate([first[1:], [len(sections)]]) - 1
    starts = np.concatenate([[0], part.ends[:-1]])
    return np.stack([starts[sections[first]], part.ends[sections[last]]], axis=1)


def _cut_end(spans: np.ndarray, fraction: float) -> tuple[np.ndarray, np.ndarray]:
    [[start, end]] = spans
    cut = end - round((end - start) * fraction)
    return np.array([[start, cut]]), np.array([[cut, end]])


class _Fitting(NamedTuple):
    spans: np.ndarray  # int64 [examples, 2]
    cut: int
    left_out: int


def _fit(part: Tokens, spans: np.ndarray, *, sequence_length: int, is_cut: bool) -> _Fitting:
    """Cuts examples at the length of a row or leaves them out; texts stay as they are."""
    if part.kind == "text":
        return _Fitting(spans, 0, 0)
    end = spans[:, 0] + sequence_length + 1
    is_long = spans[:, 1] > end
    cut = np.stack([spans[:, 0], np.minimum(spans[:, 1], end)], axis=1)
    used = (_count_loss(part, cut) > 0) & (is_cut | ~is_long)
    return _Fitting(cut[used], int((is_long & used).sum()), int((~used).sum()))


def _count_loss(part: Tokens, spans: np.ndarray) -> np.ndarray:
    """Returns the number of targets with loss of each span."""
    if part.loss is None:
        return np.maximum(spans[:, 1] - spans[:, 0] - 1, 0)
    counts = (np.count_nonzero(part.loss[start + 1 : end]) for start, end in spans.tolist())
    return np.fromiter(counts, np.int64, len(spans))


def _summary(
    sources: list[Tokens],
    chosen: list[np.ndarray],
    used: list[_Fitting],
    sequence_length: int,
    repeated: int,
) -> Summary:
    pairs = [(part, fitting.spans) for part, fitting in zip(sources, used, strict=True)]
    lengths = [np.diff(_spans(part, s)) for part, s in zip(sources, chosen, strict=True)]
    shown = ((part, start, end) for part, spans in pairs for start, end in sorted(spans.tolist()))
    return Summary(
        kind=", ".join(dict.fromkeys(part.kind for part in sources)),
        files_read=list(itertools.chain.from_iterable(part.files_read for part in sources)),
        files_left_out=list(itertools.chain.from_iterable(part.files_left_out for part in sources)),
        examples=sum(len(spans) for _, spans in pairs),
        tokens=sum(int(np.diff(spans).sum()) for _, spans in pairs),
        loss_tokens=sum(int(_count_loss(part, spans).sum()) for part, spans in pairs),
        cut=sum(fitting.cut for fitting in used),
        left_out=sum(fitting.left_out for fitting in used),
        repeated=repeated,
        lengths=np.concatenate(lengths)[:, 0],
        first=[_example(*item, sequence_length) for item in itertools.islice(shown, _SHOWN)],
    )


def _example(
    part: Tokens, start: int, end: int, sequence_length: int
) -> tuple[np.ndarray, np.ndarray]:
    place = slice(start, min(end, start + sequence_length + 1))
    tokens = np.array(part.ids[place], np.int64)
    loss = np.ones_like(tokens) if part.loss is None else np.array(part.loss[place], np.int64)
    loss[:1] = 0  # nothing predicts the first token
    return tokens, loss


def _fingerprint(
    sources: list[Tokens], chosen: list[np.ndarray], weights: list[float] | None
) -> str:
    fingerprint = hashlib.blake2b(repr(weights).encode(), digest_size=8)
    for part, sections in zip(sources, chosen, strict=True):
        for column in (part.hashes, part.digests, np.diff(part.document, prepend=-1)):
            fingerprint.update(np.ascontiguousarray(column[sections]).tobytes())
    return fingerprint.hexdigest()


def _log_summary(dataset: Rows) -> None:
    summary, train = dataset.summary, dataset.train
    targets, places = (sum(part.num_targets for part in train), sum(map(len, train)))
    places *= train[0].sequence_length
    _log.info(
        "%d documents, %d duplicates; training split: %d tokens in %d rows, %.2f %% padding; "
        "held-out split: %d tokens",
        *(summary.examples, summary.repeated, targets, sum(map(len, train))),
        100 * (1 - targets / places),
        sum(part.num_targets for part in dataset.held_out),
    )
