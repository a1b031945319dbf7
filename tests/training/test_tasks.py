"""Tasks that a run evaluates while it trains, and `lomo-jax eval` on its checkpoint."""

import json
import os
import signal
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import runs

from lomo_jax import evaluation
from lomo_jax.errors import ConfigError, UserError
from lomo_jax.evaluation.__main__ import main
from lomo_jax.evaluation.tasks import Tasks, lower_is_better, metrics, read_questions
from lomo_jax.training import MeshConfig, loop

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


@pytest.fixture(scope="module")
def questions(tmp_path_factory):
    """Twenty questions whose right answer has the letters of the training text."""
    rng = np.random.default_rng(0)
    words = ["the", "cat", "sat", "on", "a", "mat", "dog", "house", "sea"]
    lines = []
    for number in range(20):
        wrong = ["".join(rng.choice(list("#QZ7%xv"), 4)) for _ in range(2)]
        answer = int(rng.integers(0, 3))
        choices = [*wrong[:answer], f" {rng.choice(words)}", *wrong[answer:]]
        prompt = f"{number} {' '.join(rng.choice(words, 4))}"
        lines.append(json.dumps({"prompt": prompt, "choices": choices, "answer": answer}))
    path = tmp_path_factory.mktemp("questions") / "own.jsonl"
    path.write_text("\n".join(lines))
    return path


@pytest.fixture(scope="module")
def trained(text, questions, tmp_path_factory, mixed_dtypes):
    workdir = tmp_path_factory.mktemp("trained") / "run"
    config = runs.make_config(
        text, workdir, eval_tasks=str(questions), keep_best="own_acc", prompt="the", prompt_tokens=4
    )
    loop.train(config)
    return workdir


def test_accuracy_is_recorded_at_each_evaluation(trained):
    accuracy = runs.column(trained, "eval_own_acc")
    assert list(accuracy) == [0, 5, 10, 12]
    assert accuracy[0] < 0.6 < accuracy[12]
    loss, perplexity = (runs.column(trained, f"eval_{name}") for name in ("loss", "perplexity"))
    np.testing.assert_allclose(list(perplexity.values()), np.exp(list(loss.values())))
    assert "own_acc" in (trained / "log.txt").read_text()


def test_eval_on_the_checkpoint_finds_the_same(trained, questions, capsys, tmp_path):
    out = tmp_path / "results.json"
    arguments = ["lomo-jax eval", str(trained), "--tasks", str(questions), "--json", str(out)]
    assert main(arguments) == 0
    printed = capsys.readouterr().out
    expected = runs.column(trained, "eval_own_acc")[12]
    assert f"own_acc  {expected:.4f}" in printed
    assert "after 12 steps" in printed
    assert "20 examples" in printed
    assert json.loads(out.read_text())["results"][str(questions)]["acc,none"] == expected
    line = json.loads((trained / "evaluations.jsonl").read_text().splitlines()[-1])
    assert line["metrics"] == {"own_acc": expected}
    assert (line["step"], line["examples"]) == (12, 20)


def test_python_finds_the_same_without_a_mesh(trained, questions):
    found = evaluation.load(str(trained))
    asked = read_questions(questions)
    answers = evaluation.answer(found.graphdef, found.params, found.tokenizer, asked)
    assert answers.accuracy == pytest.approx(runs.column(trained, "eval_own_acc")[12])
    assert all(x.sharding == jnp.zeros(()).sharding for x in jax.tree.leaves(found.params))


def test_the_report_shows_both(trained, questions):
    from lomo_jax import report

    assert main(["lomo-jax eval", str(trained), "--tasks", str(questions), "--limit", "5"]) == 0
    page = report.render(report.read([trained]))
    assert "<h2>Tasks</h2>" in page
    assert "at step 12, at most 5 examples" in page
    assert "<h3>Tasks</h3>" in page


def test_the_best_checkpoint_is_that_of_the_metric(trained):
    accuracy = runs.column(trained, "eval_own_acc")
    best = max((value, -step) for step, value in accuracy.items() if step > 0)
    metadata = json.loads((trained / "checkpoints/12/metadata/metadata").read_text())
    assert metadata["progress"]["best"] == best[0]
    assert metadata["progress"]["best_step"] == -best[1]


def test_all_devices_find_the_same(text, questions, trained, tmp_path):
    config = runs.make_config(
        text, tmp_path / "run", eval_tasks=str(questions), mesh=MeshConfig(fsdp=4)
    )
    loop.train(config)
    expected = runs.column(trained, "eval_own_acc")
    assert runs.column(tmp_path / "run", "eval_own_acc") == pytest.approx(expected, abs=0.11)
    assert runs.column(tmp_path / "run", "eval_own_acc")[0] == expected[0]


@pytest.mark.parametrize("batch", [1, 2])
def test_a_stop_in_the_middle_of_the_tasks_postpones_them(
    batch, text, questions, trained, tmp_path, monkeypatch
):
    """Of the second evaluation, after step 5, which has several batches."""
    seen = []
    evaluate = Tasks.evaluate

    def interrupted(*args, on_batch, **options):
        def check():
            seen.append(runs.last_step(tmp_path))
            if seen.count(5) == batch:
                signal.raise_signal(signal.SIGTERM)
            on_batch()

        return evaluate(*args, on_batch=check, **options)

    monkeypatch.setattr(Tasks, "evaluate", interrupted)
    config = runs.make_config(
        text,
        tmp_path,
        eval_tasks=str(questions),
        keep_best="own_acc",
        prompt="the",
        prompt_tokens=4,
    )
    loop.train(config)
    assert list(runs.column(tmp_path, "eval_own_acc")) == [0]
    monkeypatch.undo()
    loop.train(config)
    runs.assert_same_run(tmp_path, trained)
    assert runs.column(tmp_path, "eval_own_acc") == runs.column(trained, "eval_own_acc")


@pytest.mark.slow
def test_a_run_killed_in_the_middle_of_the_tasks_resumes(text, questions, trained, tmp_path):
    config = runs.make_config(
        text,
        tmp_path / "run",
        eval_tasks=str(questions),
        keep_best="own_acc",
        prompt="the",
        prompt_tokens=4,
    )
    code = (
        "import os; from lomo_jax.evaluation import tasks\n"
        "calls, answer = [], tasks.answer\n"
        "def killed(*args, on_batch, **options):\n"
        "    calls.append(0)\n"
        "    end = lambda: os.kill(os.getpid(), 9) if len(calls) == 3 else on_batch()\n"
        "    return answer(*args, on_batch=end, **options)\n"
        "tasks.answer = killed\n"
        "import sys; from lomo_jax.training.__main__ import main; sys.exit(main(sys.argv))"
    )
    path = runs.write_config(config, tmp_path / "config.json")
    command = [sys.executable, "-c", code, "--config", str(path)]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, env=environment, cwd=runs.ROOT, capture_output=True, text=True)
    assert done.returncode == -9, done.stdout + done.stderr
    assert list(runs.column(tmp_path / "run", "eval_own_acc")) == [0, 5]
    loop.train(config)
    runs.assert_same_run(tmp_path / "run", trained)
    assert runs.column(tmp_path / "run", "eval_own_acc") == runs.column(trained, "eval_own_acc")


def test_an_unknown_metric_is_one_line(text, tmp_path):
    config = runs.make_config(text, tmp_path / "run", keep_best="acc")
    with pytest.raises(ConfigError, match=r"keep_best: 'acc' is no metric .*; they are loss, acc"):
        loop.train(config)


def test_questions_may_have_blank_lines_and_any_separators(tmp_path):
    rows = [{"prompt": f"a\u2028b{n}", "choices": ["c\x85"], "answer": 0} for n in (1, 2)]
    lines = [json.dumps(row, ensure_ascii=False) for row in rows]
    (tmp_path / "q.jsonl").write_text("\n\n".join(lines) + "\n\n", encoding="utf-8-sig")
    found = read_questions(tmp_path / "q.jsonl")
    assert [(q.prompt, q.choices) for q in found] == [(f"a\u2028b{n}", ("c\x85",)) for n in (1, 2)]


def test_files_of_one_name_are_refused(tmp_path):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
        path = tmp_path / folder / "q.jsonl"
        path.write_text(json.dumps({"prompt": "a", "choices": ["b"], "answer": 0}))
    names = [str(tmp_path / folder / "q.jsonl") for folder in ("a", "b")]
    with pytest.raises(UserError, match=r"q\.jsonl and .* have the same name"):
        Tasks(names)
    assert list(Tasks([names[0], names[0]])._questions) == names[:1]


def test_which_metrics_are_better_if_they_are_lower():
    results = {
        "results": {
            "wikitext": {"word_perplexity,none": 9.0, "bits_per_byte,none": 1.0},
            "mt": {"ter,none": 3.0, "chrf,strict-match": 2.0, "ter_stderr,none": 0.1},
            "own.jsonl": {"acc,none": 0.5},
            "new": {"loss,none": 1.0, "acc,none": 1.0},
        },
        "higher_is_better": {
            "wikitext": {"word_perplexity": False, "bits_per_byte": False},
            "mt": {"ter": False, "chrf": True},
        },
    }
    expected = {"wikitext_word_perplexity", "wikitext_bits_per_byte", "mt_ter", "new_loss"}
    assert lower_is_better(results) == expected
    assert set(metrics(results)) == expected | {"mt_chrf_strict_match", "own_acc", "new_acc"}


def test_a_step_of_a_run(trained, questions, capsys):
    arguments = ["lomo-jax eval", str(trained), "--tasks", str(questions), "--step"]
    assert main([*arguments, "12"]) == 0
    assert "after 12 steps" in capsys.readouterr().out
    assert main([*arguments, "11"]) == 1
    assert "has no checkpoint of step 11: there is " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--step=x", "--step: 'x' must be a number or best"),
        ("--num_fewshot=-1", "--num_fewshot: -1 must be 0 or more"),
        ("--json=/missing/a.json", "--json: there is no folder /missing; make it"),
    ],
)
def test_bad_arguments_are_one_line(trained, questions, capsys, argument, message):
    assert main(["lomo-jax eval", str(trained), "--tasks", str(questions), argument]) == 1
    assert capsys.readouterr().err == f"error: {message}\n"


def test_bad_questions_are_one_line(tmp_path):
    path = tmp_path / "q.jsonl"
    for line, message in (
        ("{", "q.jsonl:1 is not JSON"),
        ('{"prompt": "a"}', "q.jsonl:1: the key 'choices' is missing"),
        ('{"prompt": "a", "choices": ["b"], "answer": 1}', "must be indices of the 1 choices"),
        ('{"prompt": "a", "choices": ["b", ""], "answer": 0}', "q.jsonl:1: a prompt or a choice"),
        ('{"prompt": "\\ud800", "choices": ["b"], "answer": 0}', "q.jsonl:1 has half of a surro"),
        ("", "has no questions"),
    ):
        path.write_text(line)
        with pytest.raises(UserError, match=message):
            read_questions(path)
    with pytest.raises(UserError, match="cannot be read as questions"):
        Tasks([str(tmp_path / "missing.jsonl")])
