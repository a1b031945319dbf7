"""Templates of columns: Jinja as in `transformers`; a null is empty, and answers are marked."""

import datetime
import json
import re
import uuid
from collections.abc import Mapping
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, parser, sandbox

from lomo_jax.errors import UserError

MARK = re.compile(r"{%-?\s*generation\s*-?%}")
_DATE = datetime.date(2024, 7, 26)  # the default of the templates of Llama 3
_TODAY = re.compile(r"""strftime_now\(\s*(["'])(.*?)\1\s*\)""")
_START, _END = (f"<{uuid.uuid4().hex}>" for _ in range(2))  # around answers, in no record


class Template:
    """A template of the columns of a record."""

    def __init__(self, source: str) -> None:
        """Compiles a template.

        Raises:
          UserError: It is not Jinja.
        """
        try:
            names = meta.find_undeclared_variables(_ENVIRONMENT.parse(source))
            self._template = _ENVIRONMENT.from_string(source)
        except jinja2.TemplateError as error:
            raise UserError(f"data.template is not a template: {error}") from error
        optional = re.findall(r"(\w+) is (?:not )?defined", source)
        self.required = frozenset(names.difference(optional))  # columns that it needs

    def render(self, columns: Mapping[str, Any]) -> tuple[str, list[tuple[int, int]]]:
        """Returns the text of a record, and the start and end of what is marked in it."""
        marks = re.split(f"({_START}|{_END})", self._template.render(columns))
        text, start, spans = "", 0, []
        for part in marks:
            if part == _START:
                start = len(text)
            elif part == _END:
                spans.append((start, len(text)))
            else:
                text += part
        return text, spans


def with_fixed_date(source: str) -> str:
    """Returns a template that writes a fixed date for today's, so that tokens stay the same."""
    return _TODAY.sub(lambda match: repr(_DATE.strftime(match[2])), source)


class _Generation(ext.Extension):
    """The tag `{% generation %}`."""

    tags = {"generation"}  # noqa: RUF012 (as its base class)

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("_mark"), [], [], body).set_lineno(line)

    def _mark(self, caller: Any) -> str:
        return f"{_START}{caller()}{_END}"


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)


_ENVIRONMENT = sandbox.ImmutableSandboxedEnvironment(
    trim_blocks=True,
    lstrip_blocks=True,
    extensions=[_Generation, ext.loopcontrols],
    finalize=lambda value: "" if value is None else value,
)
_ENVIRONMENT.filters["tojson"] = lambda value, **options: json.dumps(
    value, **{"ensure_ascii": False, **options}
)
_ENVIRONMENT.globals |= {"raise_exception": _raise, "strftime_now": _DATE.strftime}
