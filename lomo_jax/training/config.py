"""What a run is made of: the schema behind `configs/*.py`, and its validation.

A config file defines `get_config() -> Config`. Every field can be set on the command line,
`--config.model.path=DIR`; the types here decide how the text is read.
"""

import dataclasses
import importlib.util
import json
import math
import types
import typing
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from ml_collections import ConfigDict

from lomo_jax.errors import ConfigError, did_you_mean
from lomo_jax.fused import ROUNDINGS
from lomo_jax.training.optimizer import make_optimizer, make_schedule

INITS = ("checkpoint", "random")
DTYPES = ("float32", "bfloat16", "float16")
REMATS = ("full", "attention", "none")
ATTENTIONS = ("auto", "xla", "cudnn")
RESUMES = ("auto", "must", "never")
_ALSO = {float: int, ConfigDict: dict}


@dataclasses.dataclass
class Architecture:
    """The shape of a model with random weights; by default that of LLaMA-7B."""

    vocab_size: int = 32000
    width: int = 4096
    mlp_width: int = 11008
    num_layers: int = 32
    num_heads: int = 32
    num_kv_heads: int = 32
    head_dim: int = 128
    rope_theta: float = 10000.0
    norm_eps: float = 1e-6
    max_length: int = 2048
    tie_embeddings: bool = False


@dataclasses.dataclass
class ModelConfig:
    """Where the model comes from."""

    # Of weights and tokenizer: Hugging Face directory, .gguf file, or workdir of an earlier run, of
    # which the last checkpoint is taken, or one of its checkpoints.
    path: str | None = None
    init: str = "checkpoint"  # or "random": fresh weights; `path` then only gives the tokenizer
    # With random weights and no path, a token is a byte.
    architecture: Architecture = dataclasses.field(default_factory=Architecture)


@dataclasses.dataclass
class DataConfig:
    """The text to train on and to evaluate on."""

    path: str | None = None  # file, folder, glob, or package://NAME/FOLDER of an installed package
    text_key: str = "text"  # field of a .jsonl line that holds its text
    eval_fraction: float = 0.05  # part of the documents that is held out


@dataclasses.dataclass
class OffloadConfig:
    """What lives in host memory, to be fetched layer by layer."""

    params: bool = False  # the weights: twice over PCIe to the GPU in a step, once back
    activations: bool = False  # the layer inputs: once each way
    state: bool = False  # the optimizer's: once each way


@dataclasses.dataclass
class MeshConfig:
    """How many devices along each axis; -1 for those that are left."""

    data: int = 1  # copies of the model, each with its part of the batch
    fsdp: int = -1  # parts of the model and of the batch; a layer is gathered when it is its turn
    tensor: int = 1  # parts of every layer's products: divides heads, MLP and vocabulary


@dataclasses.dataclass
class Config:
    """One run of `train.py`."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    optimizer: str = "adalomo"  # or "lomo", or any optimizer of optax, such as "adamw"
    optimizer_kwargs: ConfigDict = dataclasses.field(default_factory=ConfigDict)
    learning_rate: float = 1e-3  # the peak of the schedule
    schedule: str = "cosine"  # or "linear", both to 0 at the end of the run, or "constant"
    warmup: float = 0.03  # below 1 a fraction of `steps`, from 1 on a number of steps
    fused: bool = True  # False runs reference_step: the whole gradient at once
    microbatches: int = 1  # parts of a batch that go through a layer one after the other
    clip_norm: float | None = None  # of the gradient over all parameters; takes 1.7 times as long
    dynamic_loss_scale: bool = False  # for float16: skips steps that overflow; as long as clip_norm
    skip_nonfinite: int = 0  # updates in a row that NaN or infinity may cost before the run stops
    rounding: str = "nearest"  # or "stochastic", which keeps small updates of bfloat16 weights
    remat: str = "full"  # or "attention", "none": what the backward pass computes again
    offload: OffloadConfig = dataclasses.field(default_factory=OffloadConfig)
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    attention: str = "auto"  # cuDNN's flash attention where there is one; or "xla", "cudnn"

    batch_size: int = 8  # sequences a step
    sequence_length: int = 512  # tokens
    steps: int = 1000
    param_dtype: str = "bfloat16"  # of the weights in training and in the export
    seed: int = 0

    eval_every: int = 100  # steps; 0: only before the first and after the last one
    eval_batches: int | None = None  # of held-out text, at most, in an evaluation; None: all
    log_every: int = 10  # steps
    prompt: str = ""  # continued at each evaluation, and shown; "": nothing is
    prompt_tokens: int = 48  # length of that continuation
    wandb: str | None = None  # project of Weights & Biases to log to, beside the files of workdir

    workdir: str = "runs/default"  # of all that the run writes; one run at a time
    resume: str = "auto"  # from the last checkpoint there; or "must" there be one, or "never"
    checkpoint_every: int = 100  # steps; 0: only as the next two say, at the end and when stopped
    checkpoint_minutes: float = 30.0  # since the last one, at most; 0: however long
    keep_best: bool = True  # the checkpoint of the lowest held-out loss, beside the last ones
    keep_checkpoints: int = 1  # of the last ones; each takes the disk that weights and state do


def validate(config: Config, *, for_plan: bool = False) -> None:
    """Checks every field.

    Args:
      config: The config, as the file and the command line made it.
      for_plan: Whether the run is to be planned only, which needs neither text nor checkpoint.

    Raises:
      ConfigError: For the first field that is unknown, of the wrong type or out of range, or that
        contradicts another; one line with field, value and what is allowed.
    """
    for name, value, kind in _walk(config):
        allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
        # An int is a fine float and a dict a fine ConfigDict, but True is no fine int.
        accepted = (*allowed, *(also for k, also in _ALSO.items() if k in allowed))
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{name}: {value!r} is not {describe(kind)}")
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
                f"wandb: {config.wandb!r} asks for a package that is not installed: pip install "
                "wandb"
            )
    if config.batch_size % config.microbatches:
        raise ConfigError(
            f"microbatches: {config.microbatches} does not divide batch_size={config.batch_size}"
        )
    if not config.fused:
        _refuse_memory_options(config)
    schedule = make_schedule(config.schedule, config.learning_rate, config.steps, config.warmup)
    make_optimizer(config.optimizer, schedule, dict(config.optimizer_kwargs))
    for name, value in config.optimizer_kwargs.items():
        try:
            json.dumps(value)
        except TypeError:
            raise ConfigError(
                f"optimizer_kwargs: {name}={value!r} cannot be saved with a checkpoint; give a "
                "number, a list or the name, such as 'bfloat16'"
            ) from None


def field_type(name: str) -> Any:
    """Returns the type of a field such as "model.path"; raises ConfigError for an unknown one."""
    kind: Any = Config
    for depth, part in enumerate(name.split(".")):
        if kind is ConfigDict:
            raise ConfigError(f"{name}: set the whole dictionary: \"{{'{part}': VALUE}}\"")
        fields = typing.get_type_hints(kind) if dataclasses.is_dataclass(kind) else {}
        if part not in fields:
            raise unknown_field(part, fields, parent=".".join(name.split(".")[:depth]))
        kind = fields[part]
    return kind


def unknown_field(name: str, fields: Iterable[str], parent: str = "") -> ConfigError:
    """The error for the field `name`, which is not among the `fields` of `parent`."""
    where = f"{parent}.{name}" if parent else name
    if not fields:
        return ConfigError(f"{where}: {parent} is a single value, it has no fields")
    hint = did_you_mean(name, fields) or f"; the fields here are {', '.join(fields)}"
    return ConfigError(f"{where}: no such field{hint}")


def describe(kind: Any) -> str:
    """Says in words which values a field of type `kind` takes."""
    words = {
        str: "text",
        int: "a whole number",
        float: "a number",
        bool: "true or false",
        ConfigDict: "a dictionary",
        types.NoneType: "None",
    }
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    return " or ".join(words.get(k, f"a {k.__name__}") for k in kinds)


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested plain dictionaries, for JSON."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return dict(value) if isinstance(value, ConfigDict) else value

    return plain(config)


def _require_paths(config: Config) -> None:
    if config.model.init == "checkpoint" and config.model.path is None:
        raise ConfigError(
            "model.path: missing; set --config.model.path to a Hugging Face directory or a .gguf "
            "file, or train random weights with --config.model.init=random"
        )
    if config.data.path is None:
        raise ConfigError(
            "data.path: missing; set --config.data.path to the text: a file, a folder or a glob"
        )


def _refuse_memory_options(config: Config) -> None:
    if config.remat != "full":
        raise ConfigError(
            f"remat: {config.remat!r} is an option of the fused step; with fused=False it must be "
            "full"
        )
    for name, value in vars(config.offload).items():
        if value:
            raise ConfigError(
                f"offload.{name}: True is an option of the fused step; with fused=False it must be "
                "False"
            )


def _walk(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, value, type) of every leaf; an attribute outside the schema is an error."""
    kinds = typing.get_type_hints(type(node))
    for name, value in vars(node).items():
        if name not in kinds:
            raise unknown_field(name, kinds, parent=prefix.rstrip("."))
        if dataclasses.is_dataclass(kinds[name]):
            if not isinstance(value, kinds[name]):
                raise ConfigError(f"{prefix}{name}: {value!r} is not {describe(kinds[name])}")
            yield from _walk(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value, kinds[name]


def _positive(value: float) -> bool:
    return 0 < value < math.inf


def _not_negative(value: float) -> bool:
    return 0 <= value < math.inf


def _is_text(value: str) -> bool:
    return value.encode(errors="replace").decode() == value  # of a shell's other bytes it is not


_POSITIVE = "a positive number"
_NOT_NEGATIVE = "0 or more"
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model.init", INITS.__contains__, "one of " + ", ".join(INITS)),
    ("param_dtype", DTYPES.__contains__, "one of " + ", ".join(DTYPES)),
    *(
        (f"model.architecture.{f.name}", _positive, _POSITIVE)
        for f in dataclasses.fields(Architecture)
        if f.type is not bool
    ),
    ("data.eval_fraction", lambda x: 0 < x < 1, "a fraction between 0 and 1, both excluded"),
    ("learning_rate", _positive, _POSITIVE),
    (
        "warmup",
        lambda x: _not_negative(x) and (x < 1 or x == round(x)),
        "a fraction of `steps` below 1, or a whole number of steps",
    ),
    ("batch_size", _positive, _POSITIVE),
    ("microbatches", _positive, _POSITIVE),
    ("clip_norm", _positive, _POSITIVE),
    ("skip_nonfinite", _not_negative, _NOT_NEGATIVE),
    ("rounding", ROUNDINGS.__contains__, "one of " + ", ".join(ROUNDINGS)),
    ("remat", REMATS.__contains__, "one of " + ", ".join(REMATS)),
    ("attention", ATTENTIONS.__contains__, "one of " + ", ".join(ATTENTIONS)),
    ("sequence_length", _positive, _POSITIVE),
    ("steps", _positive, _POSITIVE),
    ("seed", lambda x: 0 <= x < 2**31, "between 0 and 2**31 - 1"),
    ("eval_every", _not_negative, _NOT_NEGATIVE),
    ("eval_batches", _positive, _POSITIVE),
    ("log_every", _positive, _POSITIVE),
    ("prompt", _is_text, "text in UTF-8"),
    ("prompt_tokens", _positive, _POSITIVE),
    ("wandb", bool, "the name of a project"),
    ("workdir", bool, "a folder"),
    ("resume", RESUMES.__contains__, "one of " + ", ".join(RESUMES)),
    ("checkpoint_every", _not_negative, _NOT_NEGATIVE),
    ("checkpoint_minutes", _not_negative, _NOT_NEGATIVE),
    ("keep_checkpoints", _positive, _POSITIVE),
)
