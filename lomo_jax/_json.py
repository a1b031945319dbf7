"""JSON files that people can edit or damage."""

import json
from pathlib import Path
from typing import Any

from lomo_jax import _schema
from lomo_jax.errors import UserError

_MAX_BYTES = 2**28  # the largest tokenizer.json has 2**25


def read_json(path: Path, schema: _schema.Kind | None = None) -> dict[str, Any]:
    """Reads a JSON object.

    Args:
      path: The file.
      schema: What the object must be.

    Raises:
      UserError: The file is missing, is not a regular file, does not contain a JSON object, or its
        contents do not fit the schema. The message names the file, and the key.
      OSError: The file cannot be read.
    """
    _schema.check_regular(path)
    try:
        with path.open("rb") as file:
            content = file.read(_MAX_BYTES + 1)
        if len(content) > _MAX_BYTES:
            raise UserError(f"{path} is too large: more than {_MAX_BYTES} bytes")
        value = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: it starts with {str(value)[:20]!r}")
    if _schema.depth_of(value) > _schema.MAX_DEPTH:
        raise UserError(f"{path} is nested too deeply")
    if schema is not None:
        schema.check(value, path)
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object with `write_text`."""
    write_text(path, json.dumps(value, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file atomically: a reader never sees a part of it, and it stays if this fails.

    Raises:
      UserError: There is something else than a regular file at the path.
      OSError: The file cannot be written.
    """
    if path.exists() and not path.is_file():
        raise UserError(f"{path} is not a regular file: choose another name")
    partial = path.with_name(f".{path.name}.partial")
    partial.unlink(missing_ok=True)  # of a process that was killed
    try:
        # "x": never through a link that somebody left there. File names need not be UTF-8.
        with partial.open("x", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
