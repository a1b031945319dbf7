"""The tasks of SuperGLUE as the authors of LOMO prompt, sample and score them.

A prompt's parts end with a line break each, and then comes "Answer: "; that of COPA is a sentence
to continue. At most 1000 examples of each split are drawn, always the same. A model is trained on
prompt, answer and end of text, with the loss on the answer and the end. The choice with the
largest log-likelihood of its tokens, the end of text included, is its answer.

    python -m lomo_jax.evaluation.superglue boolq OUT [--data DIR]

writes OUT/train.jsonl, with `prompt` and `completion`, and OUT/boolq.jsonl, also with `choices` and
`answers`.

References:
  Lv et al., Full Parameter Fine-tuning for Large Language Models with Limited Resources,
  arXiv 2306.09782.
  Wang et al., SuperGLUE, arXiv 1905.00537.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lomo_jax.errors import ArgumentParser, UserError, did_you_mean
from lomo_jax.evaluation.choices import Question

SAMPLES = 1000  # examples of a split
_SEED = 0
_HUB = "aps/super_glue"

Row = Mapping[str, Any]
_NO_YES = ("No", "Yes")


def _boolq(row: Row) -> Question:
    if "answer" in row:  # as BoolQ's own files call it
        row = {**row, "label": row["answer"]}
    return _asked(f"{row['passage']} {row['question']}", _NO_YES, row)


def _rte(row: Row) -> Question:
    question = f'Does this mean that "{row["hypothesis"]}" is true? Yes or No?'
    return _asked(f"{row['premise']}\n{question}", ("Yes", "No"), row)


def _wic(row: Row) -> Question:
    question = (
        f'Does the word "{row["word"]}" have the same meaning in these two sentences? Yes, No?'
    )
    return _asked(f"{question}\n{row['sentence1']}\n{row['sentence2']}", _NO_YES, row)


def _wsc(row: Row) -> Question:
    # "pronuon" is how the authors spell it.
    question = (
        f'In the previous sentence, does the pronuon "{row["span2_text"]}" refer to '
        f'"{row["span1_text"]}"? Yes or No?'
    )
    return _asked(f"{row['text']}\n{question}", _NO_YES, row)


def _multirc(row: Row) -> Question:
    question = f'I found this answer "{row["answer"]}". Is that correct? Yes or No?'
    return _asked(f"{row['paragraph']}\nQuestion: {row['question']}\n{question}", _NO_YES, row)


def _copa(row: Row) -> Question:
    link = "so" if row["question"] == "effect" else "because"
    choices = (row["choice1"], row["choice2"])
    return Question(f"{row['premise']} {link} ", choices, (int(row["label"]),), with_end=True)


def _record(row: Row) -> Question:
    # Of several right answers the first one stays.
    answers = row["answers"]
    choices = tuple(entity for entity in row["entities"] if entity not in answers[1:])
    passage = row["passage"].replace("@highlight\n", "- ")
    prompt = f'{passage}\n{row["query"]}\nQuestion: What is the "@placeholder"?\nAnswer: '
    return Question(prompt, choices, (choices.index(answers[0]),), with_end=True)


def _asked(text: str, choices: tuple[str, ...], row: Row) -> Question:
    return Question(f"{text}\nAnswer: ", choices, (int(row["label"]),), with_end=True)


TASKS: dict[str, Callable[[Row], Question]] = {
    "boolq": _boolq,
    "rte": _rte,
    "wsc": _wsc,
    "wic": _wic,
    "multirc": _multirc,
    "copa": _copa,
    "record": _record,
}


def questions(
    task: str, split: str, *, data: Sequence[Path] = (), samples: int = SAMPLES
) -> list[Question]:
    """Returns the examples that the authors use.

    Args:
      task: One of `TASKS`.
      split: "train" or "validation".
      data: Folders with the data, see `datasets.find`; none: the Hugging Face Hub.
      samples: The largest number of examples to draw.

    Raises:
      UserError: There is no such task, its data cannot be read, or have other columns.
    """
    from lomo_jax.evaluation import datasets as files

    check(task)
    names = (f"super_glue/{task}", f"{_HUB}/{task}", f"superglue/{task}", task)
    found = files.read_any(_HUB, task, names, data)
    if split not in found:
        raise UserError(f"the data of {task} have no split {split}; they have {', '.join(found)}")
    rows = found[split]
    numbers = list(range(len(rows)))
    if len(numbers) > samples:
        numbers = random.Random(_SEED).sample(numbers, samples)
    try:
        return [TASKS[task](rows[number]) for number in numbers]
    except KeyError as error:
        raise UserError(
            f"the data of {task} have no column {error}; they have {', '.join(rows.column_names)}"
        ) from None
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the data of {task} are not as on the hub, where a label is a number: {error}"
        ) from None


def check(task: str) -> None:
    """Raises UserError if there is no such task."""
    if task not in TASKS:
        hint = did_you_mean(task, TASKS) or f"; the tasks are {', '.join(TASKS)}"
        raise UserError(f"{task!r} is no task of SuperGLUE here{hint}")


def write(task: str, out: Path, *, data: Sequence[Path] = ()) -> None:
    """Writes the examples of a task, to train on and to evaluate.

    Args:
      task: One of `TASKS`.
      out: The folder of train.jsonl and of a file of questions, named after the task.
      data: See `questions`.

    Raises:
      UserError: See `questions`.
      OSError: The files cannot be written.
    """
    found = {name: questions(task, name, data=data) for name in ("train", "validation")}
    out.mkdir(parents=True, exist_ok=True)
    train = [{"prompt": q.prompt, "completion": q.choices[q.answers[0]]} for q in found["train"]]
    held_out = [
        {"prompt": q.prompt, "completion": q.choices[q.answers[0]]}
        | {"choices": q.choices, "answers": q.answers, "with_end": q.with_end}
        for q in found["validation"]
    ]
    for name, rows in {"train": train, task: held_out}.items():
        text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (out / f"{name}.jsonl").write_text(text, encoding="utf-8")


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    parser = ArgumentParser(
        prog="python -m lomo_jax.evaluation.superglue",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("task", help=", ".join(TASKS))
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="DIR")
    try:
        options = parser.parse_args(argv[1:])
        write(options.task, options.out, data=options.data)
    except (UserError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(options.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv))
