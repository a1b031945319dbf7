"""Argument checks shared by the update rules."""

import math
import numbers

import optax


def number(name: str, value: object, *, low: float, high: float = math.inf, open_low: bool = False):
    """Raises ValueError unless `value` is a real number in [low, high), or (low, high)."""
    ok = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if ok and math.isfinite(value) and (low < value if open_low else low <= value) and value < high:
        return
    interval = f"{'(' if open_low else '['}{low:g}, {high:g})"
    raise ValueError(f"{name} must be a number in {interval}, got {value!r}")


def optional_number(name: str, value: object, **limits):
    """Like `number`, with None allowed."""
    if value is not None:
        number(name, value, **limits)


def learning_rate(value: object) -> optax.Schedule:
    """Returns `value`, a number >= 0, a scalar array or a schedule, as a schedule."""
    if callable(value):
        return value
    if hasattr(value, "dtype") and getattr(value, "shape", None) == ():
        return lambda count: value
    number("learning_rate", value, low=0.0)
    return lambda count: value
