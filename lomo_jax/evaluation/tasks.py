"""Tasks by name: those of SuperGLUE, one's own questions, and all of lm-evaluation-harness."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flax import nnx

from lomo_jax import models
from lomo_jax._schema import BOOLEAN, TEXT, check_regular, integer, list_of, record
from lomo_jax.errors import UserError
from lomo_jax.evaluation import superglue
from lomo_jax.evaluation.choices import Question, answer

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

_SUPERGLUE = "superglue/"
_INDEX = integer(0, 10**6)
_QUESTION = record(
    {"prompt": TEXT, "choices": list_of(TEXT)},
    {"answer": _INDEX, "answers": list_of(_INDEX), "with_end": BOOLEAN},
)


class Tasks:
    """Tasks, read once and evaluated as often as one likes.

    Args:
      names: Each is "superglue/NAME", as the authors of LOMO run it; a file of questions, one JSON
        object a line with `prompt`, `choices` and `answer` (an index) or `answers`, and perhaps
        `with_end`, whether an end of text belongs to each choice; or a task or group of
        lm-evaluation-harness, such as "boolq" or "mmlu".
      data: Folders with the data of tasks, see `datasets.find`; none: the Hugging Face Hub.
      limit: The largest number of examples of each task.
      num_fewshot: Examples before each question of the harness, instead of what the task says.

    Raises:
      UserError: There is no such task, lm_eval is needed and not installed, or data cannot be read.
    """

    def __init__(
        self,
        names: Sequence[str],
        *,
        data: Sequence[Path] = (),
        limit: int | None = None,
        num_fewshot: int | None = None,
    ) -> None:
        self.limit = limit
        self.cut = 0  # prompts of the last evaluation that lost their beginning
        self._questions: dict[str, list[Question]] = {}
        others = []
        for name in dict.fromkeys(names):
            if name.startswith(_SUPERGLUE):
                task = name.removeprefix(_SUPERGLUE)
                found = superglue.questions(task, "validation", data=data)
            elif name.endswith(".jsonl"):
                found = read_questions(Path(name).expanduser())
            else:
                others.append(name)
                continue
            self._questions[name] = found[:limit]
        by_name = {_short(name): name for name in self._questions}
        for name in (*self._questions, *others):
            if name != by_name.get(_short(name), name):
                raise UserError(
                    f"{name} and {by_name[_short(name)]} have the same name, and their metrics "
                    "would too: rename the file"
                )
        self._harness = None
        if others:
            from lomo_jax.evaluation.harness import HarnessTasks  # an extra, and slow to import

            self._harness = HarnessTasks(others, data=data, num_fewshot=num_fewshot)

    def evaluate(
        self,
        graphdef: nnx.GraphDef[models.Decoder],
        params: nnx.State,
        tokenizer: PreTrainedTokenizerBase,
        *,
        batch_size: int = 8,
        gen_kwargs: str | None = None,
        on_batch: Callable[[], None] | None = None,
    ) -> dict[str, Any]:
        """Evaluates a model on all tasks, under the mesh that its parameters are sharded over.

        Args:
          graphdef: The structure of a `models.Decoder`.
          params: Its parameters.
          tokenizer: Its tokenizer.
          batch_size: Prompts that are read or continued together.
          gen_kwargs: Settings of generation for the harness, "temperature=0.8,max_gen_toks=64".
          on_batch: Called before each batch; it may raise an exception to end the evaluation.

        Returns:
          The results in the form of lm-evaluation-harness; see `metrics` and `counts`.

        Raises:
          UserError: A task does not fit the model.
        """
        results: dict[str, Any] = {"results": {}, "n-samples": {}}
        self.cut = 0
        if self._harness is not None:
            from lomo_jax.evaluation.harness import LM

            options = {"batch_size": batch_size, "on_batch": on_batch}
            lm = LM(graphdef, params, tokenizer, **options)
            results = self._harness.evaluate(lm, limit=self.limit, gen_kwargs=gen_kwargs)
            self.cut = lm.cut
        for name, questions in self._questions.items():
            found = answer(
                *(graphdef, params, tokenizer, questions),
                batch_size=batch_size,
                on_batch=on_batch,
            )
            results["results"][name] = {"acc,none": found.accuracy}
            count = len(questions)
            results["n-samples"][name] = {"original": count, "effective": count}
        return results


def metrics(results: dict[str, Any]) -> dict[str, float]:
    """Returns the numbers of `Tasks.evaluate`, such as {"boolq_acc": 0.61}."""
    return {metric: value for metric, value, _ in _metrics(results)}


def lower_is_better(results: dict[str, Any]) -> frozenset[str]:
    """Returns those of `metrics` that are better if they are lower, such as a perplexity."""
    return frozenset(metric for metric, _, is_lower in _metrics(results) if is_lower)


def _metrics(results: dict[str, Any]) -> Iterator[tuple[str, float, bool]]:
    """Yields each metric, its value, and whether a lower one is better."""
    for task, values in {**results["results"], **results.get("groups", {})}.items():
        is_higher_better = results.get("higher_is_better", {}).get(task, {})
        for key, value in values.items():
            name, _, rule = key.partition(",")
            if isinstance(value, int | float) and not name.endswith("_stderr") and rule:
                suffix = "" if rule == "none" else f"_{rule.replace('-', '_')}"
                metric = f"{_short(task)}_{name}{suffix}"
                is_higher = is_higher_better.get(name)
                if is_higher is None:  # the harness does not know it
                    is_higher = not name.endswith(("loss", "perplexity"))
                yield metric, float(value), not is_higher


def _short(task: str) -> str:
    return Path(task).stem if task.endswith(".jsonl") else task


def counts(results: dict[str, Any]) -> dict[str, int]:
    """Returns the number of examples of each task of `Tasks.evaluate`."""
    return {task: each["effective"] for task, each in results.get("n-samples", {}).items()}


def read_questions(path: Path) -> list[Question]:
    """Reads a file of questions; see `Tasks`.

    Raises:
      UserError: It is missing, or a line is no question.
    """
    check_regular(path)
    try:
        # Not `str.splitlines`, which also cuts at separators that JSON leaves as they are.
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as questions ({error})") from None
    found = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{path}:{number} is not JSON ({error})") from None
        _QUESTION.check(row, f"{path}:{number}")
        answers = tuple(row.get("answers", [row["answer"]] if "answer" in row else []))
        if not answers or max(answers) >= len(row["choices"]):
            raise UserError(
                f"{path}:{number}: answers={list(answers)} must be indices of the "
                f"{len(row['choices'])} choices, from 0"
            )
        if not row["prompt"] or not all(row["choices"]):
            raise UserError(f"{path}:{number}: a prompt or a choice is empty; each needs text")
        try:
            "".join((row["prompt"], *row["choices"])).encode()
        except UnicodeEncodeError as error:
            half = error.object[error.start]
            raise UserError(
                f"{path}:{number} has half of a surrogate pair; remove {half!a}"
            ) from None
        choices, with_end = tuple(row["choices"]), row.get("with_end", False)
        found.append(Question(row["prompt"], choices, answers, with_end))
    if not found:
        raise UserError(f"{path} has no questions")
    return found
