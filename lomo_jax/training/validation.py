"""Checks the fields of a config: their names, types and values, and that they fit together."""

import dataclasses
import importlib.util
import json
import math
import re
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

from lomo_jax.data import kinds
from lomo_jax.errors import ConfigError, did_you_mean
from lomo_jax.fused import REMAT_POLICIES, ROUNDINGS
from lomo_jax.training.config import Config, LoraConfig

_LINEAR_MAPS = ("q", "k", "v", "o", "gate", "up", "down")


def validate(config: Config, *, for_plan: bool = False) -> None:
    """Checks every field.

    Args:
      config: The config, from file and command line.
      for_plan: Whether the run is only planned, which needs neither dataset nor checkpoint.

    Raises:
      ConfigError: For the first field that is unknown, has the wrong type or value, or contradicts
        another field; one line with the field, its value and the allowed ones.
    """
    check_types(config)
    for name, rule, allowed in _RULES:
        value = config
        for part in name.split("."):
            value = getattr(value, part)
        if value is not None and not rule(value):
            raise ConfigError(f"{name}: {value!r} is not allowed; it must be {allowed}")

    if not for_plan:
        _require_paths(config)
        if config.wandb is not None and importlib.util.find_spec("wandb") is None:
            raise ConfigError(
                f"wandb: {config.wandb!r} needs a package that is not installed: pip install wandb"
            )
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"microbatches: {config.microbatches} does not divide batch_size={config.batch_size}"
        )
    if not config.fused:
        _refuse_memory_options(config)
    _check_lora(config.lora)
    # Epochs set the number of steps once the dataset is known.
    dataclasses.replace(
        config, steps=config.steps if config.epochs is None else 10**8
    ).make_optimizer()
    for field, kwargs in {
        "optimizer_kwargs": config.optimizer_kwargs,
        "lora.base_kwargs": config.lora.base_kwargs,
    }.items():
        for name, value in kwargs.items():
            try:
                json.dumps(value)
            except TypeError:
                raise ConfigError(
                    f"{field}: {name}={value!r} cannot be saved with a checkpoint; give a "
                    "number, a list or the name, such as 'bfloat16'"
                ) from None


def warnings(config: Config) -> list[str]:
    """Returns what a run should be warned of, for a config that is valid."""
    rules = (
        (config.optimizer, config.optimizer_kwargs),
        (config.lora.base, config.lora.base_kwargs),
    )
    clips = [options.get("clip_value") is not None for rule, options in rules if rule == "lomo"]
    found = []
    if config.clip_norm is None and not all(clips):
        found.append("LOMO without clipping can destroy the model: set clip_norm=1.0")
    is_adam = config.optimizer in ("adam", "adamw") and config.lora.rank is None
    if is_adam and config.param_dtype != "float32" and config.rounding == "nearest":
        found.append(
            f"updates of {config.optimizer} are often too small for weights in "
            f"{config.param_dtype}: set rounding=stochastic"
        )
    return found


def _check_lora(lora: LoraConfig) -> None:
    targets = () if lora.targets == "all" else lora.targets
    for target in (targets,) if isinstance(targets, str) else targets:
        if target not in _LINEAR_MAPS:
            raise ConfigError(
                f"lora.targets: {target!r} is not all and not one of {', '.join(_LINEAR_MAPS)}"
                + did_you_mean(target, _LINEAR_MAPS)
            )
    if lora.rank is None:
        for name, value in vars(lora).items():
            if value != getattr(LoraConfig(), name):
                raise ConfigError(f"lora.{name}: {value!r} needs adapters: set --config.lora.rank")
    elif lora.quantize != "none" and not lora.is_frozen:
        raise ConfigError(
            f"lora.base: {lora.base!r} cannot train a quantised base, lora.quantize="
            f"{lora.quantize!r}; set lora.base=frozen or lora.quantize=none"
        )


def check_types(config: Config) -> None:
    for name, value, kind in leaves(config):
        if not _fits(value, kind):
            raise ConfigError(f"{name}: {value!r} is not {describe(kind)}")


def _fits(value: Any, kind: Any) -> bool:
    """Whether a value has a type, and so have the values in it."""
    if isinstance(kind, types.UnionType):
        return any(_fits(value, each) for each in typing.get_args(kind))
    origin, inner = typing.get_origin(kind) or kind, typing.get_args(kind)
    if kind is Any or isinstance(value, bool):  # which Python takes for an int
        return kind in (Any, bool)
    if not isinstance(value, (float, int) if kind is float else origin):
        return False
    if origin is dict:
        return all(_fits(k, inner[0]) and _fits(v, inner[1]) for k, v in value.items())
    return origin is not tuple or all(_fits(each, inner[0]) for each in value)


def leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, value, type) of every leaf; an attribute outside the schema is an error."""
    kinds = typing.get_type_hints(type(node))
    for name, value in vars(node).items():
        if name not in kinds:
            raise unknown_field(name, kinds, parent=prefix.rstrip("."))
        if dataclasses.is_dataclass(kinds[name]):
            if not isinstance(value, kinds[name]):
                raise ConfigError(f"{prefix}{name}: {value!r} is not {describe(kinds[name])}")
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, kinds[name]


def field_type(name: str) -> Any:
    """Returns the type of a field such as "model.path".

    Raises:
      ConfigError: There is no such field.
    """
    kind: Any = Config
    for depth, part in enumerate(name.split(".")):
        if typing.get_origin(kind) is dict:
            raise ConfigError(f"{name}: set the whole dictionary: \"{{'{part}': VALUE}}\"")
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            raise unknown_field(part, fields, parent=".".join(name.split(".")[:depth]))
        kind = fields[part]
    return kind


def unknown_field(name: str, fields: Iterable[str], parent: str = "") -> ConfigError:
    """Returns the error for the field `name`, which is not among the `fields` of `parent`."""
    where = f"{parent}.{name}" if parent else name
    if not fields:
        return ConfigError(f"{where}: {parent} is a single value, it has no fields")
    hint = did_you_mean(name, fields) or f"; the fields here are {', '.join(fields)}"
    return ConfigError(f"{where}: no such field{hint}")


def describe(kind: Any) -> str:
    """Describes in words the values that a field of this type may have."""
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        dict[str, Any]: "a dictionary of names",
        dict[str, float]: "a dictionary of names and numbers",
        tuple[str, ...]: "a list of text",
        types.NoneType: "None",
    }
    return " or ".join(words.get(each) or f"a {each.__name__}" for each in _members(kind))


def alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types of a union, without the types in a dictionary or a list."""
    return tuple(typing.get_origin(each) or each for each in _members(kind))


def _members(kind: Any) -> tuple[Any, ...]:
    return typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)


def _require_paths(config: Config) -> None:
    if config.model.init == "checkpoint" and config.model.path is None:
        raise ConfigError(
            "model.path: missing; set --config.model.path to a Hugging Face directory or a .gguf "
            "file, or train random weights with --config.model.init=random"
        )
    if config.data.path is None:
        raise ConfigError(
            "data.path: missing; set --config.data.path to the dataset: a file, a folder or a glob"
        )


def _refuse_memory_options(config: Config) -> None:
    options = {"remat": (config.remat, "full")}
    options |= {f"offload.{name}": (value, False) for name, value in vars(config.offload).items()}
    for name, (value, default) in options.items():
        if value != default:
            raise ConfigError(
                f"{name}: {value!r} is an option of the fused step; with fused=False it must be "
                f"{default}"
            )


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _is_unicode(value: str) -> bool:
    return value.encode(errors="replace").decode() == value  # a shell may pass other bytes


def _is_pattern(value: str) -> bool:
    try:
        return re.compile(value) is not None
    except re.error:
        return False


_POSITIVE = "a positive number"
_NOT_NEGATIVE = "0 or more"
_WARMUP = (
    lambda x: _not_negative(x) and (x < 1 or x == round(x)),
    "a fraction of `steps` below 1, or a whole number of steps",
)
_CHOICES: dict[str, Sequence[str]] = {
    "model.init": ("checkpoint", "random"),
    "param_dtype": ("float32", "bfloat16", "float16"),
    "data.format": kinds.FORMATS,
    "data.train_on": kinds.TRAIN_ON,
    "data.too_long": ("cut", "leave_out"),
    "data.repeated": ("leave_out", "keep"),
    "data.special_tokens": ("parse", "text"),
    "lora.quantize": ("none", "int8", "nf4"),
    "rounding": ROUNDINGS,
    "remat": (*REMAT_POLICIES, "auto"),
    "attention": ("auto", "xla", "cudnn", "pallas"),
    "resume": ("auto", "must", "never"),
}
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    *((name, x.__contains__, "one of " + ", ".join(x)) for name, x in _CHOICES.items()),
    # An empty variable of a shell.
    ("model.path", bool, "a directory, the id of a model or a .gguf file"),
    ("data.path", bool, "a file, a folder or a dataset"),
    ("data.eval_documents", _positive, _POSITIVE),
    ("epochs", _positive, _POSITIVE),
    ("lora.rank", _positive, "1 or more"),
    ("lora.alpha", _positive, _POSITIVE),
    ("lora.targets", bool, "all or names of linear maps"),
    ("lora.dropout", lambda x: 0 <= x < 1, "0 or more, and below 1"),
    ("lora.base_learning_rate", _positive, _POSITIVE),
    ("lora.base_warmup", *_WARMUP),
    ("data.eval_fraction", lambda x: 0 < x < 1, "a fraction between 0 and 1, both excluded"),
    ("learning_rate", _positive, _POSITIVE),
    ("warmup", *_WARMUP),
    ("decay_mask", _is_pattern, "matrices, all or a regular expression"),
    ("batch_size", lambda x: 0 < x <= 2**20, "a positive number up to 2**20"),
    ("microbatches", _positive, _POSITIVE),
    ("clip_norm", _positive, _POSITIVE),
    ("skip_nonfinite", _not_negative, _NOT_NEGATIVE),
    ("sequence_length", _positive, _POSITIVE),
    ("steps", lambda x: 0 < x <= 10**8, "a positive number up to 10**8"),
    ("seed", lambda x: 0 <= x < 2**31, "between 0 and 2**31 - 1"),
    ("eval_every", _not_negative, _NOT_NEGATIVE),
    ("eval_batches", _positive, _POSITIVE),
    ("eval_examples", _positive, _POSITIVE),
    ("keep_best", lambda x: x != "", "true, false or the name of a metric"),
    ("log_every", _positive, _POSITIVE),
    ("prompt", _is_unicode, "text in UTF-8"),
    ("prompt_tokens", _positive, _POSITIVE),
    ("wandb", bool, "the name of a project"),
    ("workdir", bool, "a folder"),
    ("checkpoint_every", _not_negative, _NOT_NEGATIVE),
    ("checkpoint_minutes", _not_negative, _NOT_NEGATIVE),
    ("keep_checkpoints", _positive, _POSITIVE),
)
