"""Reads the config of a run from a file and the command line.

A config file defines `get_config() -> Config`. `--config.model.path=DIR` sets a field on the
command line; the field's type says how the value is parsed.
"""

import ast
import contextlib
import dataclasses
import importlib.util
import json
import re
import sys
import traceback
import types
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from absl import flags

from lomo_jax._json import read_json
from lomo_jax.errors import ConfigError, did_you_mean
from lomo_jax.fused import Offload
from lomo_jax.models.config import DecoderConfig
from lomo_jax.training.config import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    set_fields,
    to_dict,
)
from lomo_jax.training.validation import (
    alternatives,
    check_types,
    describe,
    field_type,
    unknown_field,
    validate,
)


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
        if text is None and bool in alternatives(kind):
            text = "false" if negated else "true"
        elif negated:
            raise ConfigError(f"{argument}: only for true or false; set --config.{name}=VALUE")
        elif text is None and (text := next(arguments, None)) is None:
            raise ConfigError(f"{argument}: a value is missing")
        overrides[name] = _parse_value(name, text, kind)
    return overrides, rest


def _parse_value(name: str, text: str, kind: Any) -> Any:
    kinds = alternatives(kind)
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
    check_types(config)
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
        inner = next(filter(dataclasses.is_dataclass, alternatives(kinds[name])), None)
        if inner is not None and value is not None:
            value = _from_dict(inner, value, f"{prefix}{name}.")
        fields[name] = tuple(value) if isinstance(value, list) else value
    try:
        return node(**fields)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{prefix.rstrip('.') or 'config'}: {error}") from None
