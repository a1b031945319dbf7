"""The config of a run: its fields, their validation, and the command line that sets them.

A config file defines `get_config() -> Config`. `--config.model.path=DIR` sets a field on the
command line; the field's type says how the value is parsed.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import math
import re
import sys
import traceback
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import optax
from absl import flags

from lomo_jax._json import read_json
from lomo_jax.data import kinds, resolve
from lomo_jax.errors import ConfigError, did_you_mean
from lomo_jax.fused import REMAT_POLICIES, ROUNDINGS, Offload
from lomo_jax.models.config import DecoderConfig
from lomo_jax.training.step import make_optimizer, make_schedule

if TYPE_CHECKING:  # slow to import
    from lomo_jax.lora import LoRA

INITS = ("checkpoint", "random")
DTYPES = ("float32", "bfloat16", "float16")
ATTENTIONS = ("auto", "xla", "cudnn", "pallas")
RESUMES = ("auto", "must", "never")
TOO_LONG = ("cut", "leave_out")
REPEATED = ("leave_out", "keep")
SPECIAL_TOKENS = ("parse", "text")
FROZEN = "frozen"  # as the optimizer of the base: it is not trained
QUANTIZED = ("none", "int8", "nf4")
LINEAR_MAPS = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass
class ModelConfig:
    """The model to start from."""

    # Weights and tokenizer: a Hugging Face directory, the id of a model on the hub (owner/name or
    # owner/name@revision), a .gguf file, the workdir of an earlier run (its last checkpoint), or
    # one checkpoint of such a run.
    path: str | None = None
    init: str = "checkpoint"  # or "random": new weights, and `path` only gives the tokenizer
    # Used with random weights, and for plans without a path.
    architecture: DecoderConfig = dataclasses.field(default_factory=DecoderConfig)


@dataclasses.dataclass
class DataConfig:
    """The dataset for training and evaluation."""

    # A file, folder, glob, package://NAME/FOLDER in an installed package, or OWNER/NAME@CONFIG on
    # the Hugging Face Hub; :SPLIT selects a split of a folder or of the hub, by default :train.
    # Several of one kind: ('a.jsonl', 'b.jsonl'); several sources, by weight: {'a': 0.7, 'b': 0.3}.
    path: dict[str, float] | tuple[str, ...] | str | None = None
    validation_path: tuple[str, ...] | str | None = None  # the held-out data, if not a part of path
    eval_fraction: float = 0.05  # fraction of the examples to hold out
    eval_documents: int | None = None  # number of examples to hold out, instead of the fraction
    format: str | None = None  # text, instruction, prompt or chat; None: the columns tell
    text_key: str = "text"  # column of a text
    # A file of Jinja, or Jinja source: for chats in place of the tokenizer's chat template, for
    # other records a template of their columns.
    template: str | None = None
    train_on: str = "answers"  # or "all": the loss is on prompts too; on a text it always is on all
    packing: bool = True  # examples share rows; False: a row has one example
    too_long: str = "cut"  # an example longer than sequence_length is cut at its end; "leave_out"
    repeated: str = "leave_out"  # examples that are the same as an earlier one; or "keep"
    special_tokens: str = "parse"  # those that a text spells out; or "text": they are ordinary text

    def __post_init__(self) -> None:
        for name in ("path", "validation_path"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))


@dataclasses.dataclass
class MeshConfig:
    """Number of devices on each axis; -1 means all the remaining ones."""

    data: int = 1  # replicas of the model; each gets a part of the batch
    fsdp: int = -1  # shards of model and batch; each layer is gathered before its use
    tensor: int = 1  # shards of each matrix product: heads, MLP width and vocabulary


@dataclasses.dataclass
class LoraConfig:
    """Adapters: with a rank, `optimizer`, `learning_rate` and the like are for them alone."""

    rank: int | None = None  # of each adapter; None: no adapters, all parameters are trained
    alpha: float = 16.0  # multiplies the output of an adapter, divided by the rank
    targets: tuple[str, ...] | str = "all"  # or some of q, k, v, o, gate, up, down: "('q', 'v')"
    rank_stabilized: bool = False  # divides alpha by the root of the rank (rsLoRA)
    dropout: float = 0.0  # the part of an adapter's inputs that is set to zero in training
    path: str | None = None  # PEFT's folder of adapters to start from; None: new ones
    quantize: str = "none"  # or "int8", "nf4": the linear maps of a frozen base in 8 or 4 bits
    base: str = "frozen"  # or the optimizer of all other parameters: "lomo", "adalomo", ...
    base_learning_rate: float = 5e-3  # the peak of their schedule
    base_schedule: str | None = None  # None: the same as `schedule`
    base_warmup: float | None = None  # None: the same as `warmup`
    base_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)  # as optimizer_kwargs

    def __post_init__(self) -> None:
        if isinstance(self.targets, list):
            self.targets = tuple(self.targets)

    @property
    def is_frozen(self) -> bool:
        """Whether only adapters are trained."""
        return self.rank is not None and self.base == FROZEN

    def adapters(self) -> "LoRA | None":
        """Returns the adapters, if there are any."""
        if self.rank is None:
            return None
        from lomo_jax.lora import LoRA

        return LoRA(self.rank, self.alpha, self.targets, self.rank_stabilized, self.dropout)


@dataclasses.dataclass
class Config:
    """One run."""

    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    data: DataConfig = dataclasses.field(default_factory=DataConfig)

    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)

    optimizer: str = "adalomo"  # or "lomo", or any optimizer of optax or optax.contrib: "adamw"
    optimizer_kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    # What a weight decay is for: "matrices" (not norms, biases and embeddings), "all", or a regular
    # expression that is searched in a parameter's name, such as "layers/.*/kernel".
    decay_mask: str = "matrices"
    learning_rate: float = 1e-3  # the peak of the schedule
    schedule: str = "cosine"  # or "linear", both to 0 at the end of the run, or "constant"
    warmup: float = 0.03  # below 1 a fraction of `steps`, from 1 on a number of steps
    fused: bool = True  # False runs reference_step, which holds the whole gradient
    microbatches: int = 1  # parts of a batch that run through a layer one after the other
    clip_norm: float | None = None  # bound on the global gradient norm; 1.7 times as slow
    dynamic_loss_scale: bool = False  # for float16: skips steps that overflow; as slow as clip_norm
    skip_nonfinite: int = 0  # NaN or infinite updates in a row to skip before the run stops
    rounding: str = "nearest"  # or "stochastic", which preserves small updates of bfloat16 weights
    remat: str = "full"  # recomputes whole layers; or "attention": all but attention, "none"
    offload: Offload = dataclasses.field(default_factory=Offload)  # arrays to store in host memory
    mesh: MeshConfig = dataclasses.field(default_factory=MeshConfig)
    attention: str = "auto"  # cuDNN flash attention where it is supported; or "xla", "cudnn"

    batch_size: int = 8  # sequences per step
    sequence_length: int = 512  # tokens
    steps: int = 1000
    epochs: float | None = None  # passes over the training split, which then set `steps`
    param_dtype: str = "bfloat16"  # of the weights, in training and in the export
    seed: int = 0

    eval_every: int = 100  # steps; 0: only before the first step and after the last one
    eval_batches: int | None = None  # limit on held-out batches per evaluation; None: all
    log_every: int = 10  # steps
    # Tasks whose accuracy is measured at each evaluation: superglue/boolq and the like, a file of
    # questions (.jsonl), or tasks of lm-evaluation-harness, "('boolq', 'piqa')".
    eval_tasks: tuple[str, ...] | str | None = None
    eval_examples: int = 200  # limit on the examples of each task
    eval_data: tuple[str, ...] | str | None = None  # folders with their data; None: from the hub
    prompt: str = ""  # the model continues it at each evaluation, as a sample; "": no sample
    prompt_tokens: int = 48  # length of the sample
    wandb: str | None = None  # Weights & Biases project to log to, in addition to workdir

    workdir: str = "runs/default"  # everything that the run writes; one run at a time
    resume: str = (
        "auto"  # from the last checkpoint, if any; "must": it is an error if there is none; "never"
    )
    checkpoint_every: int = 100  # steps; 0: only by time, at the end and when stopped
    checkpoint_minutes: float = 30.0  # longest time between checkpoints; 0: no limit
    # Keep the checkpoint with the lowest held-out loss as well; or with the best value of another
    # metric of an evaluation: "accuracy", "boolq_acc".
    keep_best: bool | str = True
    keep_checkpoints: int = 1  # number of last checkpoints; each is as large as weights and state

    def __post_init__(self) -> None:
        for name in ("eval_tasks", "eval_data"):
            if isinstance(value := getattr(self, name), list):
                setattr(self, name, tuple(value))

    def task_names(self) -> tuple[str, ...]:
        """Returns the names of `eval_tasks`."""
        return _names(self.eval_tasks)

    def task_folders(self) -> list[Path]:
        """Returns the folders of `eval_data`."""
        return [Path(resolve(name)) for name in _names(self.eval_data)]

    def best_metric(self) -> str:
        """Returns the name of the metric that says which checkpoint is the best."""
        return self.keep_best if isinstance(self.keep_best, str) else "loss"

    def make_schedule(self) -> optax.Schedule:
        """Returns the learning rate as a function of the number of finished steps."""
        return make_schedule(self.schedule, self.learning_rate, self.steps, self.warmup)

    def make_optimizer(self) -> optax.GradientTransformation:
        """Returns the optimizer, with the schedule."""
        optimizer = make_optimizer(
            self.optimizer,
            self.make_schedule(),
            self.optimizer_kwargs,
            decay_mask=self.decay_mask,
        )
        lora = self.lora
        if lora.rank is None or lora.is_frozen:
            return optimizer
        from lomo_jax.lora import partition

        schedule = make_schedule(
            lora.base_schedule or self.schedule,
            lora.base_learning_rate,
            self.steps,
            self.warmup if lora.base_warmup is None else lora.base_warmup,
        )
        base = make_optimizer(
            lora.base,
            schedule,
            lora.base_kwargs,
            field="lora.base",
            decay_mask=self.decay_mask,
        )
        return partition(optimizer, base)

    def step_options(self) -> dict[str, Any]:
        """Returns the fields that are options of `step.make_step`, by name."""
        names = ("fused", "microbatches", "clip_norm", "dynamic_loss_scale", "skip_nonfinite")
        options = {name: getattr(self, name) for name in (*names, "rounding", "remat", "offload")}
        if not self.lora.is_frozen:
            return options
        from lomo_jax.lora import is_adapter

        return options | {"trainable": is_adapter}


def _names(value: tuple[str, ...] | str | None) -> tuple[str, ...]:
    return value if isinstance(value, tuple) else tuple(filter(None, (value or "").split(",")))


def to_dict(config: Config) -> dict[str, Any]:
    """Returns the config as nested plain dictionaries, for JSON."""
    return dataclasses.asdict(config)


def parse(
    argv: Sequence[str],
    values: flags.FlagValues | None = None,
    *,
    for_plan: bool = False,
    usage: str | None = None,
) -> Config:
    """Reads the config that `argv` names, sets its fields from `argv` and validates it.

    Args:
      argv: The command line, program name first. `--print_config` prints the config as JSON and
        exits, `--help` prints the usage and exits.
      values: The caller's own flags. `--config` becomes one of them: the file or name as given.
      for_plan: See `validate`.
      usage: What `--help` prints before the flags; by default the docstring of `__main__`.

    Returns:
      The validated config.

    Raises:
      ConfigError: A flag, the file or a field is unknown or wrong; one line.
    """
    values = flags.FlagValues() if values is None else values  # a process may parse more than once
    name = flags.DEFINE_string("config", None, "a config file, or its name", flag_values=values)
    print_config = flags.DEFINE_bool("print_config", False, "print the config", flag_values=values)
    show_help = flags.DEFINE_bool("help", False, "print this", flag_values=values)
    overrides, rest = _split_overrides(argv)
    try:
        positional = values(rest)[1:]
    except flags.Error as error:
        raise _flag_error(error) from None
    if show_help.value:
        fields = json.dumps(to_dict(Config()), indent=2)
        usage = sys.modules["__main__"].__doc__ if usage is None else usage
        print(usage, values.get_help(), "The fields:", fields, sep="\n")
        raise SystemExit
    if positional:
        raise ConfigError(f"{positional[0]}: not a flag; set a field with --config.NAME=VALUE")
    if name.value is None:
        raise ConfigError("--config: missing; name a file or a config, such as --config quickstart")
    config = set_fields(read_config(name.value), overrides)
    validate(config, for_plan=for_plan)
    if print_config.value:
        print(json.dumps(to_dict(config), indent=2))
        raise SystemExit
    return config


def _split_overrides(argv: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Returns the values of `--config.NAME=VALUE` by name, and the other arguments."""
    overrides: dict[str, Any] = {}
    rest: list[str] = []
    arguments = iter(argv)
    for argument in arguments:
        match = re.fullmatch(r"--?(no)?config\.([^=]+)(?:=(.*))?", argument, re.DOTALL)
        if match is None:
            rest.append(argument)
            continue
        negated, name, text = match.groups()
        kind = field_type(name)
        if text is None and bool in _alternatives(kind):
            text = "false" if negated else "true"
        elif negated:
            raise ConfigError(f"{argument}: only for true or false; set --config.{name}=VALUE")
        elif text is None and (text := next(arguments, None)) is None:
            raise ConfigError(f"{argument}: a value is missing")
        overrides[name] = _parse_value(name, text, kind)
    return overrides, rest


def _parse_value(name: str, text: str, kind: Any) -> Any:
    kinds = _alternatives(kind)
    if text == "None" and types.NoneType in kinds:
        return None
    parsers = {str: str, int: int, float: float, bool: _parse_bool}
    parsers |= {dict: _parse_dict, tuple: _parse_tuple}
    for alternative in kinds:
        with contextlib.suppress(KeyError, ValueError, SyntaxError):
            return parsers[alternative](text)
    raise ConfigError(f"{name}: {text!r} is not {describe(kind)}")


def _parse_bool(text: str) -> bool:
    return {"true": True, "1": True, "false": False, "0": False}[text.lower()]


def _parse_dict(text: str) -> dict[str, Any]:
    value = ast.literal_eval(text)
    if not isinstance(value, dict):
        raise ValueError
    return value


def _parse_tuple(text: str) -> tuple[Any, ...]:
    value = ast.literal_eval(text) if text[:1] in ("(", "[") else None  # "1,2" may be a file
    if not isinstance(value, tuple | list):
        raise ValueError
    return tuple(value)


def set_fields(config: Config, values: dict[str, Any]) -> Config:
    """Returns a copy of a config with new values of some fields, such as "offload.params".

    Raises:
      ConfigError: The values do not fit together.
    """

    def replace(node: Any, prefix: str) -> Any:
        # All fields of a node at once: a number of heads alone may not fit the other sizes.
        changes = {}
        for field in dataclasses.fields(node):
            name, value = prefix + field.name, getattr(node, field.name)
            if name in values:
                changes[field.name] = values[name]
            elif dataclasses.is_dataclass(value):
                changes[field.name] = replace(value, f"{name}.")
        try:
            return dataclasses.replace(node, **changes)
        except ValueError as error:
            raise ConfigError(f"{prefix.rstrip('.')}: {error}") from None

    return replace(config, "")


def _flag_error(error: flags.Error) -> ConfigError:
    text = " ".join(str(error).split())
    if missing := re.match(r"Missing value for flag (--\w+)", text):
        return ConfigError(f"{missing[1]}: a value is missing")
    if wrong := re.match(r"flag --(\w+)=(.*?): ", text):
        return ConfigError(f"--{wrong[1]}: {wrong[2]!r} is not a value of this flag; see --help")
    return ConfigError(text)


def read_config(name: str) -> Config:
    """Reads a config.

    Args:
      name: A config file (.py), the config.json of a run, or the name of a config that ships with
        the package, such as "quickstart". After a colon comes the argument of `get_config`, if it
        has one: "superglue:boolq".

    Raises:
      ConfigError: It does not exist, or reading it failed.
    """
    path, argument = _find_config(name)
    if path.suffix not in (".py", ".json"):
        raise ConfigError(f"--config {path}: a config file ends in .py or .json")
    is_json = path.suffix == ".json"
    config = _from_dict(Config, read_json(path), "") if is_json else _run_file(path, argument)
    if not isinstance(config, Config):
        raise ConfigError(f"--config {path}: get_config() returned {config!r}, not a Config")
    _check_types(config)
    return config


def shipped_configs() -> Path:
    """Returns the folder of the configs that ship with the package."""
    package = Path(__file__).parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def _find_config(name: str) -> tuple[Path, str | None]:
    """Returns the file of a config, and the argument of its `get_config`."""
    path = Path(name).expanduser()
    if path.is_file():
        return path, None
    name, _, argument = name.partition(":")
    path = Path(name).expanduser()
    if path.is_file():
        return path, argument or None
    names = sorted(file.stem for file in shipped_configs().glob("*.py"))
    if name in names:
        return shipped_configs() / f"{name}.py", argument or None
    hint = did_you_mean(name, names) or f"; give a file or one of {', '.join(names)}"
    raise ConfigError(f"--config: {name!r} does not exist{hint}")


def _run_file(path: Path, argument: str | None) -> Any:
    """Returns the result of `get_config()` in a config file."""
    folder, modules = str(path.absolute().parent), set(sys.modules)
    spec = importlib.util.spec_from_file_location("config_file", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, folder)  # a config may import its neighbours
    try:
        spec.loader.exec_module(module)
        return module.get_config() if argument is None else module.get_config(argument)
    except ConfigError:
        raise
    except Exception as error:  # the user's code may raise anything
        raise _file_error(path, error) from error
    finally:
        sys.path.remove(folder)
        for name in set(sys.modules) - modules:  # a neighbour may have the name of another module
            if Path(getattr(sys.modules[name], "__file__", None) or "").parent == Path(folder):
                del sys.modules[name]


def _file_error(path: Path, error: Exception) -> ConfigError:
    """Returns the error, in one line, for a config file that failed."""
    classes = (Config, ModelConfig, DataConfig, MeshConfig, LoraConfig, DecoderConfig, Offload)
    nodes = {node.__name__: node for node in classes}
    keyword = re.search(r"(\w+)\.__init__\(\).* unexpected keyword argument '(\w+)'", str(error))
    if keyword and keyword[1] in nodes:
        fields = typing.get_type_hints(nodes[keyword[1]])
        return unknown_field(keyword[2], fields, parent=keyword[1])
    frames = traceback.extract_tb(error.__traceback__)
    line = getattr(error, "lineno", None) if isinstance(error, SyntaxError) else None
    line = line or next((f.lineno for f in reversed(frames) if f.filename == str(path)), None)
    where = f"{path}:{line}" if line else str(path)
    what = " ".join(str(error).split())
    return ConfigError(f"--config {where}: {type(error).__name__}: {what}")


def _from_dict(node: Any, values: Any, prefix: str) -> Any:
    """Builds a dataclass from `to_dict` of it."""
    kinds = typing.get_type_hints(node)
    if not isinstance(values, dict):
        raise ConfigError(f"{prefix.rstrip('.')}: {values!r} is not {describe(node)}")
    fields = {}
    for name, value in values.items():
        if name not in kinds:
            raise unknown_field(name, kinds, parent=prefix.rstrip("."))
        inner = next(filter(dataclasses.is_dataclass, _alternatives(kinds[name])), None)
        if inner is not None and value is not None:
            value = _from_dict(inner, value, f"{prefix}{name}.")
        fields[name] = tuple(value) if isinstance(value, list) else value
    try:
        return node(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: {error}") from None


def validate(config: Config, *, for_plan: bool = False) -> None:
    """Checks every field.

    Args:
      config: The config, from file and command line.
      for_plan: Whether the run is only planned, which needs neither dataset nor checkpoint.

    Raises:
      ConfigError: For the first field that is unknown, has the wrong type or value, or contradicts
        another field; one line with the field, its value and the allowed ones.
    """
    _check_types(config)
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
    config.make_optimizer()
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


def _check_lora(lora: LoraConfig) -> None:
    targets = () if lora.targets == "all" else lora.targets
    for target in (targets,) if isinstance(targets, str) else targets:
        if target not in LINEAR_MAPS:
            raise ConfigError(
                f"lora.targets: {target!r} is not all and not one of {', '.join(LINEAR_MAPS)}"
                + did_you_mean(target, LINEAR_MAPS)
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


def _check_types(config: Config) -> None:
    for name, value, kind in _leaves(config):
        allowed = tuple(typing.get_origin(k) or k for k in _alternatives(kind))
        # An int is a valid float, but True is not a valid int.
        accepted = (*allowed, int) if float in allowed else allowed
        if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in allowed):
            raise ConfigError(f"{name}: {value!r} is not {describe(kind)}")


def _leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Any, Any]]:
    """Yields (name, value, type) of every leaf; an attribute outside the schema is an error."""
    kinds = typing.get_type_hints(type(node))
    for name, value in vars(node).items():
        if name not in kinds:
            raise unknown_field(name, kinds, parent=prefix.rstrip("."))
        if dataclasses.is_dataclass(kinds[name]):
            if not isinstance(value, kinds[name]):
                raise ConfigError(f"{prefix}{name}: {value!r} is not {describe(kinds[name])}")
            yield from _leaves(value, f"{prefix}{name}.")
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
        dict: "a dictionary",
        tuple: "a list",
        types.NoneType: "None",
    }
    kinds = _alternatives(kind)
    return " or ".join(words.get(typing.get_origin(k) or k) or f"a {k.__name__}" for k in kinds)


def _alternatives(kind: Any) -> tuple[Any, ...]:
    """Returns the types of a union, without the types in a dictionary or a list."""
    kinds = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    origins = ((k, typing.get_origin(k)) for k in kinds)
    return tuple(origin if origin in (dict, tuple) else k for k, origin in origins)


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
_RULES: tuple[tuple[str, Callable[[Any], bool], str], ...] = (
    ("model.init", INITS.__contains__, "one of " + ", ".join(INITS)),
    ("param_dtype", DTYPES.__contains__, "one of " + ", ".join(DTYPES)),
    ("data.format", kinds.FORMATS.__contains__, "one of " + ", ".join(kinds.FORMATS)),
    ("data.train_on", kinds.TRAIN_ON.__contains__, "one of " + ", ".join(kinds.TRAIN_ON)),
    ("data.too_long", TOO_LONG.__contains__, "one of " + ", ".join(TOO_LONG)),
    ("data.repeated", REPEATED.__contains__, "one of " + ", ".join(REPEATED)),
    ("data.special_tokens", SPECIAL_TOKENS.__contains__, "one of " + ", ".join(SPECIAL_TOKENS)),
    ("data.eval_documents", _positive, _POSITIVE),
    ("epochs", _positive, _POSITIVE),
    ("lora.rank", _positive, "1 or more"),
    ("lora.alpha", _positive, _POSITIVE),
    ("lora.quantize", QUANTIZED.__contains__, "one of " + ", ".join(QUANTIZED)),
    ("lora.targets", bool, "all or names of linear maps"),
    ("lora.dropout", lambda x: 0 <= x < 1, "0 or more, and below 1"),
    ("lora.base_learning_rate", _positive, _POSITIVE),
    (
        "lora.base_warmup",
        lambda x: _not_negative(x) and (x < 1 or x == round(x)),
        "a fraction of `steps` below 1, or a whole number of steps",
    ),
    ("data.eval_fraction", lambda x: 0 < x < 1, "a fraction between 0 and 1, both excluded"),
    ("learning_rate", _positive, _POSITIVE),
    (
        "warmup",
        lambda x: _not_negative(x) and (x < 1 or x == round(x)),
        "a fraction of `steps` below 1, or a whole number of steps",
    ),
    ("decay_mask", _is_pattern, "matrices, all or a regular expression"),
    ("batch_size", lambda x: 0 < x <= 2**20, "a positive number up to 2**20"),
    ("microbatches", _positive, _POSITIVE),
    ("clip_norm", _positive, _POSITIVE),
    ("skip_nonfinite", _not_negative, _NOT_NEGATIVE),
    ("rounding", ROUNDINGS.__contains__, "one of " + ", ".join(ROUNDINGS)),
    ("remat", REMAT_POLICIES.__contains__, "one of " + ", ".join(REMAT_POLICIES)),
    ("attention", ATTENTIONS.__contains__, "one of " + ", ".join(ATTENTIONS)),
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
    ("resume", RESUMES.__contains__, "one of " + ", ".join(RESUMES)),
    ("checkpoint_every", _not_negative, _NOT_NEGATIVE),
    ("checkpoint_minutes", _not_negative, _NOT_NEGATIVE),
    ("keep_checkpoints", _positive, _POSITIVE),
)
