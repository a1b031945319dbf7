"""Kinds of example: what a record becomes as text, and which part of it the loss is on.

* text: the column `text`. The loss is on all of it.
* instruction: `instruction`, `input` (or none) and `output`, in the two prompts of Alpaca. The loss
  is on the output.
* prompt: `prompt` and `completion`, `query` and `response`, or `question` and `answer`, joined as
  they are. The loss is on the second.
* chat: `messages` with roles and contents, or `conversations` of ShareGPT, in the tokenizer's chat
  template. The loss is on what the assistant writes, from behind the generation prompt to the end
  of the turn.
* template: any columns, in a Jinja template of one's own. The loss is on what it marks with
  `{% generation %}`.
"""

import functools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lomo_jax._schema import short
from lomo_jax.data import templates
from lomo_jax.data.sources import Record
from lomo_jax.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

FORMATS = ("text", "instruction", "prompt", "chat")
TRAIN_ON = ("answers", "all")

_ALPACA = (
    "Below is an instruction that describes a task{}. Write a response that appropriately "
    "completes the request.\n\n### Instruction:\n{}\n\n{}### Response:"
)
_PAIRS = (("prompt", "completion"), ("query", "response"), ("question", "answer"))
_CHATS = ("messages", "conversations")
_ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT = {"human": "user", "gpt": "assistant", "observation": "tool"}

Span = tuple[int, int]  # start and end, in characters


class Example(NamedTuple):
    """A text to train on."""

    text: str
    answers: Sequence[Span] | None  # the parts with loss; None: all
    key: str  # equal for repeated examples, whatever the model
    is_rendered: bool = False  # whether a chat template wrote all special tokens


Kind = Callable[[Record], Example]


def find_kind(record: Record, text_key: str, has_template: bool) -> str:
    """Returns the kind that the columns of a record tell.

    Raises:
      UserError: They are those of no kind.
    """
    columns = record.columns
    pair = _find_pair(columns)
    has_pair = set(pair) <= columns.keys()
    if any(name in columns for name in _CHATS) or (has_pair and isinstance(columns[pair[0]], list)):
        return "chat"
    if has_template:
        return "template"
    if "instruction" in columns and "output" in columns:
        return "instruction"
    if has_pair:
        return "prompt"
    if text_key in columns:
        return "text"
    raise UserError(
        f"{record.where} has no {text_key!r} (found: {_names(columns)}), and is no instruction, "
        "prompt or chat: set data.text_key, or data.template to a template of these columns"
    )


def make_kind(
    name: str,
    tokenizer: "PreTrainedTokenizerBase",
    *,
    text_key: str = "text",
    template: str | None = None,
    train_on: str = "answers",
) -> Kind:
    """Returns the function from a record to its example.

    Args:
      name: The kind.
      tokenizer: The tokenizer, whose chat template renders conversations.
      text_key: The column of a text.
      template: Jinja source, from `read_template`. For a chat in place of the tokenizer's.
      train_on: "answers", or "all": the loss is on every token.

    Raises:
      UserError: There is no template, or it marks no answers.
    """
    match name:
        case "text":
            return functools.partial(_text, key=text_key)
        case "instruction":
            kind = _instruction
        case "prompt":
            kind = _prompt
        case "chat":
            source = template or tokenizer.chat_template
            if not source:
                raise UserError(
                    "the tokenizer has no chat template: set data.template to a file with one"
                )
            if isinstance(source, dict):
                source = None  # several by name; transformers chooses
            renderer = _Renderer(tokenizer, source and templates.with_fixed_date(source))
            return functools.partial(_chat, renderer, with_answers=train_on == "answers")
        case _:
            assert template is not None
            if train_on == "answers" and not templates.MARK.search(template):
                raise UserError(
                    "data.template marks no answer: put {% generation %} and {% endgeneration %} "
                    "around it, or set data.train_on=all"
                )
            kind = functools.partial(_own, templates.Template(template))
    if train_on == "answers":
        return kind
    return lambda record: kind(record)._replace(answers=None)


def read_template(template: str | None) -> str | None:
    """Returns the source of a template, given as a file or as Jinja source.

    Raises:
      UserError: The file cannot be read.
    """
    if template is None or "{" in template:
        return template
    try:
        return Path(template).expanduser().read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"data.template: {template!r} cannot be read: {error}") from error


def _text(record: Record, *, key: str) -> Example:
    text = _column(record, key)
    return Example(text, None, text)


def _instruction(record: Record) -> Example:
    instruction, output = _column(record, "instruction"), _answer(record, "output")
    given = record.columns.get("input")
    given = _column(record, "input") if given is not None else ""
    has_input = ", paired with an input that provides further context" if given else ""
    section = f"### Input:\n{given}\n\n" if given else ""
    return _pair(_ALPACA.format(has_input, instruction, section), output)


def _prompt(record: Record) -> Example:
    prompt, completion = _pair_names(record)
    return _pair(_column(record, prompt), _answer(record, completion))


def _find_pair(columns: dict[str, Any]) -> tuple[str, str]:
    """Returns the first pair that the columns have, or have a part of."""
    return max(_PAIRS, key=lambda pair: len(columns.keys() & {*pair}))


def _pair_names(record: Record) -> tuple[str, str]:
    pair = _find_pair(record.columns)
    for name in pair:
        if name not in record.columns:
            raise _missing(record, name)
    return pair


def _pair(prompt: str, answer: str) -> Example:
    text = prompt + answer
    return Example(text, [(len(prompt), len(text))], json.dumps([prompt, answer]))


def _own(template: templates.Template, record: Record) -> Example:
    if missing := sorted(template.required - record.columns.keys()):
        raise UserError(
            f"{record.where} has no {missing[0]!r} (found: {_names(record.columns)}), which "
            f"data.template uses: change it, or write {{% if {missing[0]} is defined %}} there"
        )
    try:
        text, answers = template.render(record.columns)
    except Exception as error:  # a template may raise anything
        raise _template_error(record, error) from error
    _check_unicode(record.where, text)
    if not text.strip() or any(not text[start:end].strip() for start, end in answers):
        raise UserError(f"{record.where}: data.template gives an empty text or answer")
    return Example(text, answers, json.dumps(record.columns, sort_keys=True, default=str))


class _Renderer(NamedTuple):
    """A tokenizer's chat template, or another."""

    tokenizer: "PreTrainedTokenizerBase"
    template: str | None

    def text(self, record: Record, messages: Any, tools: Any, prompt: bool = False) -> str:
        try:
            return str(
                self.tokenizer.apply_chat_template(
                    messages,
                    tools=tools,
                    chat_template=self.template,
                    add_generation_prompt=prompt,
                    tokenize=False,
                )
            )
        except Exception as error:  # a template may raise anything
            raise _template_error(record, error) from error

    def answers(
        self, record: Record, messages: list[Any], tools: Any, text: str, first: int
    ) -> Iterator[Span]:
        """Yields the parts of `text` that the assistant wrote, from the message `first` on."""
        if self.template and not first and templates.MARK.search(self.template):
            special = self.tokenizer.special_tokens_map
            yield from _marked(self.template, record, messages, tools=tools, **special)
            return
        for turn, message in enumerate(messages[first:], first):
            if message["role"] != "assistant":
                continue
            after = self.text(record, messages[: turn + 1], tools)
            if turn:
                before = self.text(record, messages[:turn], tools, prompt=True)
            else:  # nothing comes before the answer: what does not depend on it
                other = self.text(record, [{**message, "content": "\0"}], tools)
                before = os.path.commonprefix([after, other])  # noqa: RUF071 (text, not paths)
            if not (text.startswith(after) and after.startswith(before)):
                raise UserError(
                    f"{record.where}: the chat template renders turn {turn + 1} otherwise when "
                    "more turns follow, so its answer cannot be told: set data.template to one "
                    "that does not, or that marks answers with {% generation %}, or "
                    "data.train_on=all"
                )
            yield len(before), len(after)


def _chat(renderer: _Renderer, record: Record, *, with_answers: bool) -> Example:
    messages, first = _messages(record)
    tools = record.columns.get("tools")
    if isinstance(tools, str):
        try:
            tools = json.loads(tools) if tools.strip() else None
        except ValueError as error:
            raise UserError(f"{record.where}: 'tools' is not JSON: {error}") from error
    text = renderer.text(record, messages, tools or None)
    _check_unicode(record.where, text)
    answers = None
    if with_answers:
        answers = list(renderer.answers(record, messages, tools or None, text, first))
    if answers == []:
        raise UserError(
            f"{record.where} has no turn of the assistant, so there is nothing to learn from it: "
            "remove the record, or set data.train_on=all"
        )
    key = json.dumps([messages, tools], sort_keys=True, default=str)
    return Example(text, answers, key, is_rendered=True)


def _messages(record: Record) -> tuple[list[dict[str, Any]], int]:
    """Returns the messages of a record, and the first that the loss may be on."""
    name = next((name for name in _CHATS if name in record.columns), None)
    if name is None:
        parts = [_turns(record, name) for name in _pair_names(record)]
        return parts[0] + parts[1], len(parts[0])
    messages = _turns(record, name)
    system = record.columns.get("system")
    if isinstance(system, str) and system and messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": system})
    return messages, 0


def _turns(record: Record, name: str) -> list[dict[str, Any]]:
    turns = record.columns[name]
    if not isinstance(turns, list) or not turns:
        found = "an empty list" if turns == [] else type(turns).__name__
        raise UserError(f"{record.where}: {name!r} is {found}, not a list of messages")
    return [_message(record, number, turn) for number, turn in enumerate(turns, 1)]


def _message(record: Record, number: int, turn: Any) -> dict[str, Any]:
    where = f"{record.where}: turn {number}"
    if not isinstance(turn, dict):
        raise UserError(f"{where} is {type(turn).__name__}, not a message with role and content")
    if "from" in turn and "role" not in turn:
        turn = {"role": turn["from"], "content": turn.get("value")}
    role = turn.get("role")
    if role == "function_call":
        turn = {"role": "assistant", "tool_calls": _calls(where, turn.get("content"))}
    role = _SHAREGPT.get(str(turn.get("role")), turn.get("role"))
    if role not in _ROLES:
        raise UserError(
            f"{where} has the role {short(role)}: the roles are {', '.join((*_ROLES, *_SHAREGPT))}"
        )
    message = {**turn, "role": role}
    content = message.get("content")
    if isinstance(content, list) and all(
        isinstance(part, dict) and isinstance(part.get("text"), str) for part in content
    ):
        content = message["content"] = "".join(part["text"] for part in content)
    has_calls = role == "assistant" and message.get("tool_calls")
    if content is None and has_calls:
        message["content"] = ""  # most templates write it
    elif not isinstance(content, str):
        raise UserError(f"{where} has a content of {type(content).__name__}, not text")
    elif role == "assistant" and not content.strip() and not has_calls:
        raise UserError(f"{where} is an empty answer: remove it, or write one")
    _check_unicode(where, message["content"])
    return message


def _calls(where: str, text: Any) -> list[dict[str, Any]]:
    """Returns the calls of a ShareGPT turn, which are JSON."""
    try:
        calls = json.loads(text)
    except (TypeError, ValueError) as error:
        raise UserError(f"{where} is a function call that is not JSON: {error}") from error
    calls = calls if isinstance(calls, list) else [calls]
    return [{"type": "function", "function": call} for call in calls]


def _answer(record: Record, name: str) -> str:
    text = _column(record, name)
    if not text.strip():
        raise UserError(f"{record.where}: {name!r} is an empty answer: remove the record")
    return text


def _column(record: Record, name: str) -> str:
    text = record.columns.get(name)
    if text is None and name not in record.columns:
        raise _missing(record, name)
    if not isinstance(text, str):
        raise UserError(
            f"{record.where}: {name!r} is {type(text).__name__}, not text: set data.text_key, or "
            "data.template to a template of the columns"
        )
    _check_unicode(f"{record.where}: {name!r}", text)
    return text


def _missing(record: Record, name: str) -> UserError:
    return UserError(
        f"{record.where} has no {name!r} (found: {_names(record.columns)}): add it, or set "
        "data.format or data.text_key"
    )


def _names(columns: dict[str, Any]) -> str:
    return ", ".join(map(str, columns)) or "nothing"


def _check_unicode(where: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise UserError(
            f"{where} has half of a surrogate pair: remove {error.object[error.start]!a}"
        ) from error


def _marked(template: str, record: Record, messages: Sequence[Any], **variables: Any) -> list[Span]:
    """Returns the parts of a conversation that its template marks as generation."""
    from transformers.utils.chat_template_utils import render_jinja_template

    try:
        _, spans = render_jinja_template(  # pyright: ignore
            [messages],  # pyright: ignore
            chat_template=template,
            return_assistant_tokens_mask=True,
            **variables,
        )
    except Exception as error:  # a template may raise anything
        raise _template_error(record, error) from error
    return list(spans[0])  # pyright: ignore


def _template_error(record: Record, error: Exception) -> UserError:
    what = " ".join(str(error).split()) or type(error).__name__
    return UserError(f"{record.where}: the template fails: {what[:300]}")
