"""The optimizer and its learning-rate schedule, by name."""

import inspect
from collections.abc import Mapping
from typing import Any

import optax

from lomo_jax.adalomo import adalomo
from lomo_jax.errors import ConfigError, did_you_mean
from lomo_jax.lomo import lomo

SCHEDULES = ("constant", "linear", "cosine")


def make_schedule(kind: str, learning_rate: float, steps: int, warmup: float) -> optax.Schedule:
    """A linear warm-up to `learning_rate`, then constant, or decaying to 0 at step `steps`.

    No step has a learning rate of 0: the first of `w` warm-up steps has `learning_rate / (w + 1)`,
    and the decay reaches 0 one step after the last.

    Args:
      kind: The schedule after the warm-up, one of `SCHEDULES`.
      learning_rate: The peak.
      steps: Number of steps of the run.
      warmup: Length of the warm-up. Below 1 a fraction of `steps`, from 1 on a number of steps.

    Returns:
      A function from the number of finished steps to the learning rate.

    Raises:
      ConfigError: `warmup` is not shorter than the run, or `kind` is unknown.
    """
    warmup_steps = round(warmup * steps) if warmup < 1 else round(warmup)
    if warmup_steps >= steps:
        raise ConfigError(
            f"warmup: {warmup:g} is {warmup_steps} of {steps} steps, it must be shorter than the "
            "run; below 1 it is a fraction of `steps`, from 1 on a number of steps"
        )
    decay_steps = steps - warmup_steps
    match kind:
        case "constant":
            decay = optax.constant_schedule(learning_rate)
        case "linear":
            decay = optax.linear_schedule(learning_rate, 0.0, decay_steps)
        case "cosine":
            decay = optax.cosine_decay_schedule(learning_rate, decay_steps)
        case _:
            raise ConfigError(
                f"schedule: {kind!r} is not one of {', '.join(SCHEDULES)}"
                + did_you_mean(kind, SCHEDULES)
            )
    if warmup_steps == 0:
        return decay
    start = learning_rate / (warmup_steps + 1)
    return optax.join_schedules(
        [optax.linear_schedule(start, learning_rate, warmup_steps), decay], [warmup_steps]
    )


def make_optimizer(
    name: str, learning_rate: optax.ScalarOrSchedule, kwargs: Mapping[str, Any]
) -> optax.GradientTransformation:
    """Builds an optimizer by its name.

    Args:
      name: "adalomo", "lomo" or an optimizer of optax.
      learning_rate: A float, or a schedule.
      kwargs: The optimizer's other arguments.

    Returns:
      The optimizer.

    Raises:
      ConfigError: There is no such optimizer, or it refuses `kwargs`.
    """
    known = _optimizers()
    if name not in known:
        raise ConfigError(
            f"optimizer: {name!r} is not adalomo, lomo or an optimizer of optax, such as adamw"
            + did_you_mean(name, known)
        )
    arguments = list(inspect.signature(known[name]).parameters)[1:]  # without learning_rate
    for argument in kwargs:
        if argument not in arguments:
            raise ConfigError(
                f"optimizer_kwargs: {name} takes no {argument!r}"
                + (did_you_mean(argument, arguments) or f"; it takes {', '.join(arguments)}")
            )
    try:
        return known[name](learning_rate, **kwargs)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"optimizer_kwargs: {name} refuses {dict(kwargs)}: {error}") from error


def _optimizers() -> dict[str, Any]:
    """Returns the functions whose first argument is a learning rate, by name."""
    functions = dict(inspect.getmembers(optax, inspect.isfunction))
    optimizers = {
        name: function
        for name, function in functions.items()
        if next(iter(inspect.signature(function).parameters), None) == "learning_rate"
        and not name.startswith("scale_by")
    }
    return optimizers | {"adalomo": adalomo, "lomo": lomo}
