"""The command line: `--config FILE --config.a.b=value --print_config`."""

import json
import re
import sys
import typing
from collections.abc import Sequence

from absl import flags
from ml_collections import config_flags

from lomo_jax.errors import ConfigError
from lomo_jax.training import config as schema


def parse(
    argv: Sequence[str], values: flags.FlagValues | None = None, *, for_plan: bool = False
) -> schema.Config:
    """Reads the config file that `argv` names, applies the overrides and validates the result.

    Args:
      argv: The command line, program name first. `--print_config` prints the config as JSON and
        exits, `--help` prints the usage and exits.
      values: The caller's own flags, which `argv` may hold too.
      for_plan: Whether the run is to be planned only; see `config.validate`.

    Returns:
      The validated config.

    Raises:
      ConfigError: A flag, the file or a field is unknown or wrong; one line.
    """
    argv = list(argv)
    # Not the global flags: a process may parse more than once.
    values = flags.FlagValues() if values is None else values
    config_file = config_flags.DEFINE_config_file(
        "config", None, "a file of configs/", flag_values=values, sys_argv=argv
    )
    print_config = flags.DEFINE_bool("print_config", False, "print the config", flag_values=values)
    wants_help = flags.DEFINE_bool("help", False, "print this", flag_values=values)

    for arg in argv:
        if override := re.match(r"--?(?:no)?config\.([^=]+)", arg):
            schema.field_type(override[1])
    try:
        rest = values(argv)[1:]
    except (flags.Error, AttributeError, TypeError) as error:
        raise _explain(error) from error
    if wants_help.value:
        defaults = json.dumps(schema.to_dict(schema.Config()), indent=2)
        print(sys.modules["__main__"].__doc__, values.get_help(), "The fields:", defaults, sep="\n")
        raise SystemExit
    if rest:
        raise ConfigError(f"{rest[0]}: not a flag; a field is set with --config.NAME=VALUE")
    if not values["config"].present:
        raise ConfigError("--config: missing; name a file, such as --config configs/quickstart.py")
    config = config_file.value
    if not isinstance(config, schema.Config):
        # ml_collections keeps what went wrong with the file for the first use of the config.
        file = config_flags.get_config_filename(values["config"])
        why = str(getattr(config, "_error", f"get_config() returned {config!r}"))
        raise ConfigError(f"--config {file}: {why.splitlines()[-1].strip()}")
    schema.validate(config, for_plan=for_plan)
    if print_config.value:
        print(json.dumps(schema.to_dict(config), indent=2))
        raise SystemExit
    return config


def _explain(error: BaseException) -> ConfigError:
    """Says in one line what a flag parser, or a config file it ran, stumbled over."""
    if override := re.match(r"flag --config\.(\S+?)=(.*?): ", str(error)):
        name, value = override.groups()
        return ConfigError(f"{name}: {value!r} is not {schema.describe(schema.field_type(name))}")
    if flag := re.match(r"flag --(?!config=)(\w+)=(.*?): ", str(error)):
        return ConfigError(f"--{flag[1]}: {flag[2]!r} is not a value of this flag; see --help")
    while error.__context__ is not None:
        error = error.__context__
    if keyword := re.search(
        r"(\w+)\.__init__\(\).* unexpected keyword argument '(\w+)'", str(error)
    ):
        node = getattr(schema, keyword[1], None)
        if node is not None:
            return schema.unknown_field(keyword[2], typing.get_type_hints(node), parent=keyword[1])
    return ConfigError(str(error) or "--config: a value is missing")
