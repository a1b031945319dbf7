"""Numbers and config fields in words."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

_RAISED = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
NONE = "\N{EN DASH}"  # in place of what there is not


def loss(value: float) -> str:
    """A loss: 4.003."""
    return f"{value:.3f}" if math.isfinite(value) else "not finite"


def whole(value: float | None) -> str:
    """A whole number: 12,345."""
    return NONE if value is None else f"{value:,.0f}"


def gib(value: float | None) -> str:
    """Memory: 13.42 GiB."""
    return NONE if value is None else f"{value:.2f} GiB"


def rate(value: float | None) -> str:
    """Tokens per second: 8,123, and 81.2 where a digit would be missed."""
    return f"{value:,.1f}" if value is not None and value < 100 else whole(value)


def compact(value: float, places: int = 1) -> str:
    """A large number: 134.5 M; 1.2 k; 12."""
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:.{places}f}".rstrip("0").rstrip(".") + f" {letter}"
    return f"{value:g}"


def ticks(values: Sequence[float]) -> list[str]:
    """The numbers of an axis, alike: 2.50, 2.75, 3.00; 500, 1,000; 100k, 250k; 5e-4, 1e-3."""
    largest = max((abs(value) for value in values), default=0.0)
    if largest >= 10_000:
        return [compact(value, 2).replace(" ", "") for value in values]
    if 0 < largest < 0.01:
        return [_scientific(value) for value in values]
    apart = min((b - a for a, b in itertools.pairwise(sorted(values)) if b > a), default=1.0)
    enough = (n for n in range(12) if all(abs(round(v, n) - v) < apart / 100 for v in values))
    places = next(enough, 12)
    return [f"{value:,.{places}f}" for value in values]


def percents(values: Sequence[float]) -> list[str]:
    """The shares of an axis: 35%, 40%."""
    return [f"{number}%" for number in ticks([100 * value for value in values])]


def magnitudes(values: Sequence[float]) -> list[str]:
    """The numbers of a logarithmic axis, each for itself: 0.01, 1, 100, 10k."""
    return [
        compact(value).replace(" ", "") if value >= 0.001 else _scientific(value)
        for value in values
    ]


def powers_of_two(values: Sequence[float]) -> list[str]:
    """The powers of two of an axis, the exponents raised."""
    return ["2" + str(round(math.log2(value))).translate(_RAISED) for value in values]


def _scientific(value: float) -> str:
    mantissa, _, exponent = f"{value:.2e}".partition("e")
    return f"{float(mantissa):g}e{int(exponent)}" if value else "0"


def duration(seconds: float | None) -> str:
    """Time: 2 d 3 h; 3 h 12 min; 2 min 41 s; 45 s."""
    if seconds is None:
        return NONE
    units = (("d", 86400), ("h", 3600), ("min", 60), ("s", 1))
    left, parts = round(seconds), []
    for unit, size in units:
        if left >= size or parts:
            parts.append((left // size, unit))
        left %= size
    return " ".join(f"{count} {unit}" for count, unit in parts[:2] if count) or "0 s"


def leaves(config: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields name and value of every field of a config, such as ("model.path", "...").

    The shape in it is left out where the model has that of its checkpoint.
    """
    for name, value in config.items():
        if prefix == "model." and name == "architecture" and config.get("init") == "checkpoint":
            continue
        # A dictionary is either a group of fields or, if so named, the value of one.
        if isinstance(value, dict) and not name.endswith("_kwargs"):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def field(value: Any) -> str:
    """A config field's value, for a person."""
    if value is None or value in ("", {}, []):
        return NONE
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:g}"
    return f"{value:,}" if isinstance(value, int) and value >= 10_000 else str(value)
