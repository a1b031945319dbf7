"""Questions with choices: the answer is the choice that the model finds the likeliest."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from flax import nnx

from lomo_jax.errors import UserError, did_you_mean
from lomo_jax.evaluation.likelihood import Likelihood, log_likelihoods
from lomo_jax.models.decoder import Decoder

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

RANKINGS = ("sum", "token", "byte", "unconditional")


@dataclasses.dataclass(frozen=True)
class Question:
    """A prompt, the choices that may follow it, and which of them are right."""

    prompt: str
    choices: tuple[str, ...]
    answers: tuple[int, ...]  # index of each right choice, one in most tasks
    with_end: bool = False  # whether an end of text belongs to each choice


class Answers(NamedTuple):
    """What a model answers."""

    chosen: list[int]  # index of the choice, of each question
    accuracy: float  # share of the questions whose choice is right
    likelihoods: list[list[Likelihood]]  # of each choice of each question


def answer(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokenizer: PreTrainedTokenizerBase,
    questions: Sequence[Question],
    *,
    rank: str = "sum",
    batch_size: int = 8,
    on_batch: Callable[[], None] | None = None,
) -> Answers:
    """Answers questions by the likelihood of their choices.

    Args:
      graphdef: The structure of a `Decoder`.
      params: Its parameters; see `log_likelihoods`.
      tokenizer: The tokenizer of the model.
      questions: The questions.
      rank: "sum" ranks choices by the log-likelihood of all their tokens, "token" by its mean per
        token, "byte" per byte of UTF-8, "unconditional" by how much the prompt raises it.
      batch_size: See `log_likelihoods`.
      on_batch: See `log_likelihoods`.

    Raises:
      UserError: `rank` is unknown, there is no question, a prompt is too long, or the tokenizer has
        no end of text and a question asks for it.
    """
    if rank not in RANKINGS:
        raise UserError(
            f"rank={rank!r} is not one of {', '.join(RANKINGS)}{did_you_mean(rank, RANKINGS)}"
        )
    if not questions:
        raise UserError("there are no questions to answer")
    end: Any = tokenizer.eos_token_id
    if end is None and any(question.with_end for question in questions):
        raise UserError("the tokenizer has no end of text, which belongs to each choice")

    def score(prompts: Sequence[str]) -> list[list[Likelihood]]:
        groups = []
        for prompt, question in zip(prompts, questions, strict=True):
            ending = [end] if question.with_end else []
            pairs = (encode_pair(tokenizer, prompt, choice) for choice in question.choices)
            groups.append([(start, [*rest, *ending]) for start, rest in pairs])
        options = {"batch_size": batch_size, "on_batch": on_batch}
        return log_likelihoods_of_pairs(graphdef, params, groups, **options)

    found = score([question.prompt for question in questions])
    without = score([""] * len(questions)) if rank == "unconditional" else None
    chosen = []
    for number, (question, choices) in enumerate(zip(questions, found, strict=True)):
        values = []
        for index, (text, choice) in enumerate(zip(question.choices, choices, strict=True)):
            value = choice.log_likelihood
            if rank == "token":
                value /= choice.tokens
            elif rank == "byte":
                value /= max(len(text.encode()), 1)
            elif without is not None:
                value -= without[number][index].log_likelihood
            values.append(value)
        chosen.append(max(range(len(values)), key=values.__getitem__))
    right = [choice in question.answers for choice, question in zip(chosen, questions, strict=True)]
    return Answers(chosen, sum(right) / len(right), found)


Pair = tuple[Sequence[int], Sequence[int]]  # a prompt and a continuation, as tokens


def log_likelihoods_of_pairs(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    groups: Sequence[Sequence[Pair]],
    *,
    batch_size: int = 8,
    on_batch: Callable[[], None] | None = None,
) -> list[list[Likelihood]]:
    """Returns how likely each continuation is; pairs with the same prompt share a row.

    Args:
      graphdef: See `log_likelihoods`.
      params: See `log_likelihoods`.
      groups: Lists of (prompt, continuation), as tokens.
      batch_size: See `log_likelihoods`.
      on_batch: See `log_likelihoods`.
    """
    rows: dict[tuple[int, ...], dict[tuple[int, ...], None]] = {}
    for group in groups:
        for prompt, continuation in group:
            rows.setdefault(tuple(prompt), {})[tuple(continuation)] = None
    prompts = [(prompt, list(continuations)) for prompt, continuations in rows.items()]
    options = {"batch_size": batch_size, "on_batch": on_batch}
    found = log_likelihoods(graphdef, params, prompts, **options)
    by_text = {
        (prompt, continuation): likelihood
        for (prompt, continuations), likelihoods in zip(prompts, found, strict=True)
        for continuation, likelihood in zip(continuations, likelihoods, strict=True)
    }
    return [[by_text[tuple(p), tuple(c)] for p, c in group] for group in groups]


def encode_pair(
    tokenizer: PreTrainedTokenizerBase, prompt: str, continuation: str
) -> tuple[list[int], list[int]]:
    """Returns the tokens of a prompt and of its continuation, as lm-evaluation-harness does.

    Both are tokenised as one text. Spaces at the end of the prompt belong to the continuation. An
    empty prompt is the token that begins or ends a text.
    """
    if not prompt:
        tokens = encode(tokenizer, continuation, special=False)
        first = first_token(tokenizer)
        return ([first], tokens) if tokens[:1] != [first] else (tokens[:1], tokens[1:])
    spaces = len(prompt) - len(prompt.rstrip())
    if spaces:
        prompt, continuation = prompt[:-spaces], prompt[-spaces:] + continuation
    start = encode(tokenizer, prompt)
    return start, encode(tokenizer, prompt + continuation)[len(start) :]


def encode(tokenizer: PreTrainedTokenizerBase, text: str, *, special: bool = True) -> list[int]:
    """Returns the tokens of a text; without the end that some tokenizers append."""
    tokens = list(tokenizer(text, add_special_tokens=special)["input_ids"])
    return (
        tokens[:-1]
        if special
        and len(tokens) > 1
        and tokens[-1] == tokenizer.eos_token_id
        and (not text.endswith(str(tokenizer.eos_token)))
        else tokens
    )


def first_token(tokenizer: PreTrainedTokenizerBase) -> int:
    """Returns the token that begins a text, or if there is none the one that ends it."""
    ends: Any = (tokenizer.bos_token_id, tokenizer.eos_token_id)
    for token in ends:
        if token is not None:
            return int(token)
    raise UserError("the tokenizer has neither a begin nor an end of text, for an empty prompt")
