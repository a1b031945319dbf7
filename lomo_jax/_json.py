"""JSON files that people can edit or damage."""

import json
from pathlib import Path
from typing import Any

from lomo_jax.errors import UserError


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
      UserError: The file is missing or does not contain a JSON object.
      OSError: The file cannot be read.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing") from None
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is not JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object: it starts with {str(value)[:20]!r}")
    return value


def write_json(path: Path, value: dict[str, Any]) -> None:
    """Writes a JSON object atomically: a reader never sees a part of it."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")
    partial.replace(path)
