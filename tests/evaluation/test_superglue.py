"""The prompts of the authors of LOMO, written out, and how they draw examples."""

import json
import random

import pytest

from lomo_jax.errors import UserError
from lomo_jax.evaluation import Question, superglue
from lomo_jax.evaluation.tasks import read_questions

# Task -> (an example that is made up, its prompt, its choices, the index of the answer).
EXAMPLES = {
    "boolq": (
        {"passage": "Oaks are trees.", "question": "is an oak a tree", "label": 1},
        "Oaks are trees. is an oak a tree\nAnswer: ",
        ("No", "Yes"),
        1,
    ),
    "rte": (
        {"premise": "It rained all day.", "hypothesis": "It was wet.", "label": 0},
        'It rained all day.\nDoes this mean that "It was wet." is true? Yes or No?\nAnswer: ',
        ("Yes", "No"),
        0,
    ),
    "wsc": (
        {"text": "Ann saw Eve as she left.", "span1_text": "Ann", "span2_text": "she", "label": 0},
        "Ann saw Eve as she left.\nIn the previous sentence, does the pronuon "
        '"she" refer to "Ann"? Yes or No?\nAnswer: ',
        ("No", "Yes"),
        0,
    ),
    "wic": (
        {"word": "bank", "sentence1": "The bank lent.", "sentence2": "A river bank.", "label": 0},
        'Does the word "bank" have the same meaning in these two sentences? Yes, No?\n'
        "The bank lent.\nA river bank.\nAnswer: ",
        ("No", "Yes"),
        0,
    ),
    "multirc": (
        {"paragraph": "Tom ran.", "question": "Who ran?", "answer": "Tom", "label": 1},
        "Tom ran.\nQuestion: Who ran?\n"
        'I found this answer "Tom". Is that correct? Yes or No?\nAnswer: ',
        ("No", "Yes"),
        1,
    ),
    "copa": (
        {
            **{"premise": "The cup fell.", "question": "effect", "choice1": "It broke."},
            **{"choice2": "It flew.", "label": 0},
        },
        "The cup fell. so ",
        ("It broke.", "It flew."),
        0,
    ),
    "record": (
        {
            "passage": "Ann met Bob.\n@highlight\nThey spoke.",
            "query": "@placeholder spoke to Bob.",
            "entities": ["Bob", "Ann", "Annie"],
            "answers": ["Ann", "Annie"],
        },
        "Ann met Bob.\n- They spoke.\n@placeholder spoke to Bob.\n"
        'Question: What is the "@placeholder"?\nAnswer: ',
        ("Bob", "Ann"),
        1,
    ),
}


def folder_of(tmp_path, task, rows):
    place = tmp_path / "super_glue" / task
    place.mkdir(parents=True)
    for split, part in rows.items():
        lines = "".join(json.dumps(row) + "\n" for row in part)
        (place / f"{split}.jsonl").write_text(lines)
    return tmp_path


@pytest.mark.parametrize("task", superglue.TASKS)
def test_prompts(task, tmp_path):
    row, prompt, choices, answer = EXAMPLES[task]
    data = folder_of(tmp_path, task, {"train": [row], "validation": [row]})
    for split in ("train", "validation"):
        (question,) = superglue.questions(task, split, data=[data])
        assert question.prompt == prompt
        assert question.choices == choices
        assert question.answers == (answer,)


def test_copa_asks_for_a_cause_too(tmp_path):
    row = EXAMPLES["copa"][0] | {"question": "cause", "label": 1}
    data = folder_of(tmp_path, "copa", {"validation": [row]})
    (question,) = superglue.questions("copa", "validation", data=[data])
    assert question.prompt == "The cup fell. because "
    assert question.answers == (1,)


def test_reading_data_shows_no_progress_bars(tmp_path, capfd):
    data = folder_of(tmp_path, "copa", {"validation": [EXAMPLES["copa"][0]]})
    superglue.questions("copa", "validation", data=[data])
    assert capfd.readouterr() == ("", "")


def test_boolq_may_be_its_own_files(tmp_path):
    row = {"passage": "Sky.", "question": "is it", "answer": True}
    data = folder_of(tmp_path, "boolq", {"validation": [row, row | {"answer": False}]})
    found = superglue.questions("boolq", "validation", data=[data])
    assert [question.answers for question in found] == [(1,), (0,)]


def test_a_thousand_examples_are_drawn_as_the_authors_draw_them(tmp_path):
    rows = [{"passage": str(n), "question": "q", "label": n % 2} for n in range(1200)]
    data = folder_of(tmp_path, "boolq", {"train": rows, "validation": rows[:900]})
    random.seed(0)  # as their code does
    expected = random.sample(list(range(1200)), 1000)
    found = superglue.questions("boolq", "train", data=[data])
    assert [int(question.prompt.split()[0]) for question in found] == expected
    whole = superglue.questions("boolq", "validation", data=[data])
    assert [int(question.prompt.split()[0]) for question in whole] == list(range(900))


def test_files_for_training_and_evaluation(tmp_path, capsys):
    row, prompt, choices, answer = EXAMPLES["boolq"]
    data = folder_of(tmp_path, "boolq", {"train": [row, row], "validation": [row]})
    out = tmp_path / "out"
    assert superglue.main(["", "boolq", str(out), "--data", str(data)]) == 0
    assert capsys.readouterr().out == f"{out}\n"
    train = [json.loads(line) for line in (out / "train.jsonl").read_text().splitlines()]
    assert train == [{"prompt": prompt, "completion": "Yes"}] * 2
    (held_out,) = read_questions(out / "boolq.jsonl")
    assert held_out == Question(prompt, choices, (answer,), with_end=True)
    assert held_out == superglue.questions("boolq", "validation", data=[data])[0]


def test_mistakes_are_one_line(tmp_path):
    with pytest.raises(UserError, match="'bolq' is no task of SuperGLUE here; did you mean 'boolq"):
        superglue.questions("bolq", "train")
    with pytest.raises(UserError, match="there is no super_glue/boolq or"):
        superglue.questions("boolq", "train", data=[tmp_path])
    data = folder_of(tmp_path, "boolq", {"train": [{"passage": "a", "text": "b"}]})
    with pytest.raises(UserError, match="have no column 'question'; they have passage, text"):
        superglue.questions("boolq", "train", data=[data])
    with pytest.raises(UserError, match="have no split validation; they have train"):
        superglue.questions("boolq", "validation", data=[data])
