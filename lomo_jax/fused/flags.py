"""Lists of values: selecting and replacing those that are flagged, and splitting."""

import itertools
from collections.abc import Collection, Iterable, Sequence
from typing import Any

Flags = Sequence[bool]


def select(items: Iterable[Any], flags: Iterable[bool]) -> list[Any]:
    """Returns the flagged items."""
    return [item for item, flag in zip(items, flags, strict=True) if flag]


def scatter(items: Sequence[Any], new: Iterable[Any], flags: Flags) -> list[Any]:
    """Returns `items` with the flagged ones replaced by the items of `new`, in order."""
    replacements = iter(new)
    return [next(replacements) if flag else item for item, flag in zip(items, flags, strict=True)]


def zip_and(a: Flags, b: Flags) -> list[bool]:
    """Returns `x and y` for each pair of flags."""
    return [x and y for x, y in zip(a, b, strict=True)]


def zip_not(flags: Flags) -> list[bool]:
    """Returns `not x` for each flag."""
    return [not flag for flag in flags]


def split(items: Sequence[Any], like: Iterable[Collection[Any]]) -> list[Sequence[Any]]:
    """Splits a sequence into parts as long as those of `like`."""
    ends = [0, *itertools.accumulate(map(len, like))]
    return [items[a:b] for a, b in itertools.pairwise(ends)]
