"""Explains a step: which gradients exist together, and which stacks get a whole one, and why."""

import collections
import dataclasses
import textwrap
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from lomo_jax.fused import jaxprs
from lomo_jax.fused.reasons import Finder, Reason
from lomo_jax.fused.trace import DenseSegment, LayerScan, TracedLoss

# `init` warns if whole stacks are a larger part of all trainable bytes.
_SMALL = 0.05


@dataclasses.dataclass(frozen=True)
class Piece:
    """A piece of the loss: a layer scan, or the operations before, between or after layer scans.

    The gradients of a piece exist together.
    """

    layers: int | None  # of a layer scan; None for a dense piece
    walked: tuple[str, ...]  # parameters that are updated layer by layer
    layer_mib: float  # the gradient of one layer of them
    whole: tuple[str, ...]  # parameters that are updated after this piece
    whole_mib: float  # their gradients
    held: tuple[
        str, ...
    ]  # parameters with a part of their gradient: an earlier piece uses them too
    held_mib: float  # their gradients so far

    @property
    def gradient_mib(self) -> float:
        """The gradients that exist together in this piece."""
        return self.layer_mib + self.whole_mib + self.held_mib


@dataclasses.dataclass(frozen=True)
class WholeStack:
    """Something as large as a stack that exists for all layers at once."""

    parameters: tuple[str, ...]
    mib: float
    # "gradient"; "zeros" for a gradient that is always zero; "value" for something else that is
    # computed before the layer scan.
    of: str
    reason: str
    remedy: str

    def __str__(self) -> str:
        if self.of == "gradient":
            fact = f"{_list(self.parameters)}: the whole gradient, {self.mib:.3g} MiB, exists"
            return f"{fact} at once: {self.reason}; {self.remedy}"
        if self.of == "zeros":
            return f"{_list(self.parameters)}: its gradient is zero: {self.reason}; {self.remedy}"
        return (
            f"{self.mib:.3g} MiB are computed for all layers at once before the scan of "
            f"{_list(self.parameters)}, as a whole gradient would be: {self.reason}; {self.remedy}"
        )


@dataclasses.dataclass(frozen=True)
class Explanation:
    """The gradients of a step, from `Step.explain`. Printed, it is a table.

    A gradient is counted in the dtype of its parameter, and in float32 where several parts of it
    are added: from pieces, layers or microbatches.
    """

    pieces: tuple[Piece, ...]  # in the order of the forward pass
    whole_stacks: tuple[WholeStack, ...]  # what a layer loop could have spared
    trainable_mib: float  # all trainable parameters

    @property
    def gradient_mib(self) -> float:
        """The most MiB of gradient that exist together."""
        return max((piece.gradient_mib for piece in self.pieces), default=0.0)

    def __str__(self) -> str:
        rows = [("piece", "gradient", "parameters")]
        for piece in self.pieces:
            title = "dense" if piece.layers is None else f"scan of {piece.layers} layers"
            parts = [
                (piece.layer_mib, piece.walked, "one layer of "),
                (piece.whole_mib, piece.whole, ""),
                (piece.held_mib, piece.held, "still, for an earlier piece: "),
            ]
            for mib, names, label in parts:
                if names:
                    rows.append((title, f"{mib:.3g} MiB", label + ", ".join(names)))
                    title = ""
        first, second = (max(len(row[k]) for row in rows) for k in (0, 1))
        lines = []
        for title, mib, names in rows:
            start = f"{title:<{first}}  {mib:>{second}}  "
            lines += textwrap.wrap(
                names,
                100,
                initial_indent=start,
                subsequent_indent=" " * len(start),
                break_long_words=False,
            )
        lines.append(
            f"At most {self.gradient_mib:.3g} MiB of gradient exist together; the trainable "
            f"parameters are {self.trainable_mib:.3g} MiB."
        )
        for whole in self.whole_stacks:
            lines += textwrap.wrap(str(whole), 100, subsequent_indent="  ", break_long_words=False)
        return "\n".join(lines)

    @property
    def warning(self) -> str | None:
        """What `init` warns about: large `whole_stacks`; None if there is nothing to say."""
        # XLA need not store zeros.
        stored = [x for x in self.whole_stacks if x.of != "zeros"]
        large = [x for x in stored if x.mib > _SMALL * self.trainable_mib]
        return "\n".join(map(str, large)) or None


def explain(
    loss: TracedLoss, names: Sequence[str], trainable: Iterable[int], microbatches: int
) -> Explanation:
    """Explains the gradients of a loss.

    Args:
      loss: traced with one microbatch.
      names: of the leaves of the parameters.
      trainable: indices of the parameters to train.
      microbatches: their number.
    """
    trainable = list(trainable)
    return Explanation(
        pieces=tuple(_pieces(loss, names, microbatches)),
        whole_stacks=tuple(_whole_stacks(loss, names, trainable)),
        trainable_mib=sum(jaxprs.mib(loss.inputs.params[i]) for i in trainable),
    )


def _pieces(loss: TracedLoss, names: Sequence[str], microbatches: int) -> Iterator[Piece]:
    parts: dict[int, list[int]] = collections.defaultdict(list)  # pieces that add to a gradient
    added: dict[int, int] = {}  # the last piece in which layers add to a gradient
    complete = {i: k for k, segment in enumerate(loss.program.segments) for i in segment.dense}
    for k, segment in enumerate(loss.program.segments):
        inputs, shared = _inputs(segment)
        for i in complete:
            if loss.inputs.params[i] in inputs:
                parts[i].append(k)
                if loss.inputs.params[i] in shared:
                    added[i] = k

    def mib(indices: Iterable[int], k: int) -> float:
        total = 0.0
        for i in indices:
            summed = microbatches > 1 or sum(part >= k for part in parts[i]) > 1
            total += jaxprs.mib(loss.inputs.params[i], wide=summed or added.get(i, -1) >= k)
        return total

    def names_of(indices: Iterable[int]) -> tuple[str, ...]:
        return tuple(names[i] for i in indices)

    for k, segment in enumerate(loss.program.segments):
        held = [i for i, first in complete.items() if first < k <= max(parts[i], default=first)]
        if not (segment.stacked or segment.dense or held):
            continue
        walked = [stack.index for stack in segment.stacked]
        layers = None
        if isinstance(segment, LayerScan):
            layers = segment.scan.length * max((_inner_layers(loss, i) for i in walked), default=1)
        yield Piece(
            layers,
            names_of(walked),
            sum(
                jaxprs.mib(loss.inputs.params[i], wide=microbatches > 1) / _num_layers(loss, i)
                for i in walked
            ),
            names_of(segment.dense),
            mib(segment.dense, k),
            names_of(held),
            mib(held, k),
        )


def _inputs(segment: DenseSegment | LayerScan) -> tuple[set[Any], set[Any]]:
    """Returns the inputs of a segment, and those of them that all layers share."""
    if isinstance(segment, DenseSegment):
        return set(segment.inputs), set()
    shared = set(jaxprs.variables(segment.scan.consts))
    return shared | set(jaxprs.variables(segment.scan.invars)), shared


def _num_layers(loss: TracedLoss, i: int) -> int:
    axes = np.atleast_1d(loss.layer_axes[i])
    return int(np.prod([jaxprs.shape(loss.inputs.params[i])[axis] for axis in axes]))


def _inner_layers(loss: TracedLoss, i: int) -> int:
    """Returns the number of layers in each group, of a stack of groups of layers."""
    axes = np.atleast_1d(loss.layer_axes[i])
    return int(np.prod([jaxprs.shape(loss.inputs.params[i])[axis] for axis in axes[1:]]))


def _list(names: Sequence[str], most: int = 6) -> str:
    """Names parameters in a sentence."""
    if len(names) <= most:
        return ", ".join(names)
    return f"{', '.join(names[: most - 1])} and {len(names) - most + 1} more"


def _whole_stacks(
    loss: TracedLoss, names: Sequence[str], trainable: Sequence[int]
) -> Iterator[WholeStack]:
    finder = Finder(loss, names)
    found: dict[Reason, list[int]] = {}
    for i in trainable:
        reason = None if i in loss.stacked else finder.reason(i)
        if reason is not None:
            found.setdefault(reason, []).append(i)
    for reason, indices in found.items():
        mib = sum(jaxprs.mib(loss.inputs.params[i]) for i in indices)
        parameters = tuple(names[i] for i in indices)
        yield WholeStack(parameters, mib, reason.of, reason.why, reason.remedy)
    if all(reason.of == "zeros" for reason in found) and not loss.stacked and len(trainable) > 1:
        yield _NoLayerScan(
            tuple(names[i] for i in trainable),
            sum(jaxprs.mib(loss.inputs.params[i]) for i in trainable),
            "gradient",
            "no trainable parameter is in a layer scan",
            "run the layers in jax.lax.scan over stacked parameters",
        )
    for indices, mib in finder.random_values():
        if mib > _SMALL * sum(jaxprs.mib(loss.inputs.params[i]) for i in trainable):
            yield WholeStack(
                tuple(names[i] for i in indices),
                mib,
                "value",
                "random numbers are drawn for all layers",
                "draw them in the scanned function, from jax.random.split(key, L) as xs",
            )


class _NoLayerScan(WholeStack):
    def __str__(self) -> str:
        return (
            f"{self.reason}: the gradients of all {self.mib:.3g} MiB of parameters may exist at "
            f"once; {self.remedy}"
        )
