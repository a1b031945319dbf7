"""Reading the files of runs."""

import json
import math
import os

import numpy as np
import pytest
from workdirs import INFO, evaluation, resumed, sample, step, write

from lomo_jax import run_files
from lomo_jax._json import read_json
from lomo_jax.errors import UserError
from lomo_jax.report import read


def _losses(run):
    return {record["step"]: record["loss"] for record in run.logged}


def test_kinds_of_records_are_read_separately(tmp_path):
    records = [evaluation(0, 4.0), sample(0, "a"), step(1, 3.5), step(2, 3.0), evaluation(2, 3.2)]
    (run,) = read([str(write(tmp_path / "one", records))])
    assert _losses(run) == {1: 3.5, 2: 3.0}
    assert [(record["step"], record["eval_loss"]) for record in run.evaluations] == [
        (0, 4.0),
        (2, 3.2),
    ]
    assert [record["sample"] for record in run.samples] == ["a"]
    assert (run.name, run.resumes, run.unreadable) == ("one", [], 0)
    assert run.config["steps"] == 30
    assert run.info == INFO


def test_a_resume_supersedes_later_steps(tmp_path):
    records = [
        *(step(1, 1.1), step(2, 1.2), step(3, 1.3), evaluation(3, 9.0), step(4, 1.4)),
        *(resumed(3), step(4, 2.4), step(5, 2.5), sample(5, "lost")),
        *(resumed(2), step(3, 3.3), step(4, 3.4)),
        *(resumed(4), step(5, 4.5)),
    ]
    (run,) = read([str(write(tmp_path, records))])
    assert _losses(run) == {1: 1.1, 2: 1.2, 3: 3.3, 4: 3.4, 5: 4.5}
    assert run.evaluations == run.samples == []
    assert run.resumes == [3, 2, 4]


def test_a_resume_at_step_0_supersedes_every_step(tmp_path):
    records = [
        *(evaluation(0, 4.0, 5.0), step(1, 1.1, 9.0), step(2, None, 10.0)),
        *(resumed(0, 90.0), evaluation(0, 4.0, 100.0), step(1, 2.1, 103.0)),
    ]
    (run,) = read([str(write(tmp_path, records))])
    assert _losses(run) == {1: 2.1}
    assert [record["time"] for record in run.evaluations] == [100.0]
    assert run.resumes == [0]
    assert (run.started, run.seconds) == (5, 5 + 13)


def test_records_at_the_step_of_the_checkpoint_count(tmp_path):
    records = [step(2, 1.0), evaluation(2, 5.0), step(3, 9.0), resumed(2), evaluation(2, 4.0)]
    (run,) = read([str(write(tmp_path, records))])
    assert _losses(run) == {2: 1.0}
    assert [record["eval_loss"] for record in run.evaluations] == [4.0]  # the last one counts


def test_time_between_a_stop_and_a_resume_is_not_training_time(tmp_path):
    records = [
        *(evaluation(0, 4.0, 100.0), step(1, 3.0, 110.0), step(2, 3.0, 125.0)),
        *(resumed(1, 9000.0), step(2, 3.0, 9007.0)),
    ]
    (run,) = read([str(write(tmp_path, records))])
    assert run.seconds == 25 + 7
    assert run.started == 100


def test_an_unfinished_last_line_is_skipped_and_null_is_read(tmp_path):
    folder = write(tmp_path, [step(1, 2.0), step(2, None)], end='{"step": 3, "lo')
    (run,) = read([str(folder)])
    assert _losses(run) == {1: 2.0, 2: None}
    assert run.unreadable == 0


@pytest.mark.parametrize("newline", ["\n", ""])
def test_an_unfinished_line_does_not_hide_the_resume_after_it(tmp_path, newline):
    folder = write(tmp_path, [step(1, 1.0), step(2, 9.0)], end='{"step": 3, "lo' + newline)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "time": 5.0, "resumed": true}\n')
    (run,) = read([str(folder)])
    assert _losses(run) == {1: 1.0}
    assert run.resumes == [1]
    assert run.unreadable == len(newline)  # a record that ends an unfinished line is read


def test_unreadable_lines_are_counted(tmp_path):
    folder = write(tmp_path, [step(1, 1.0)], end='noise\n[3]\n{"loss": 2.0}\n\n')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "time": 5.0, "loss": NaN}\n')
    (run,) = read([str(folder)])
    assert _losses(run) == {1: 1.0, 2: None}
    assert run.unreadable == 3


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "loss": 0.5}',
        '{"step": 1, "time": "noon"}',
        f'{{"step": {10**400}, "time": 5.0}}',
        '{"step": -1, "time": 5.0}',
        '{"step": 1, "time": 1e999}',
        '{"step": ' + "[" * 10**5,
        '{"step": ' * 10**5,
        '{"step": 1, "time": 5.0, "loss": ' + "1" * 400 + "}",
        '{"step": 1, "time": 5.0, "loss": "low"}',
        '{"step": 1, "time": 5.0, "loss": 1.0, "accuracy": [1]}',
        '{"step": 1, "time": 5.0, "loss": 1e300}',
        '{"step": 1, "time": 5.0, "sample": 3, "prompt": "a"}',
        '{"step": true, "time": 5.0, "loss": 1.0}',
    ],
)
def test_invalid_records_are_counted(tmp_path, line):
    end = f'{line}\n{{"step": 2, "time": 5.0, "loss": 0.5}}\n'
    (run,) = read([str(write(tmp_path, [step(1, 1.0)], end=end))])
    assert _losses(run) == {1: 1.0, 2: 0.5}
    assert run.unreadable == 1


@pytest.mark.parametrize("name", ["run.json", "config.json", "metrics.jsonl"])
def test_a_missing_file_is_named(tmp_path, name):
    folder = write(tmp_path, [step(1, 1.0)])
    (folder / name).unlink()
    with pytest.raises((UserError, OSError), match=name):
        read([folder])


def test_a_name_is_the_path_below_the_common_folder(tmp_path):
    folders = [tmp_path / "a" / "x" / "seed0", tmp_path / "b" / "x" / "seed0"]
    runs = read([str(write(folder, [step(1, 1.0)])) for folder in folders])
    assert [run.name for run in runs] == ["a/x/seed0", "b/x/seed0"]
    runs = read([write(folder, [step(1, 1.0)]) for folder in (tmp_path / "a", folders[0])])
    assert [run.name for run in runs] == ["a", "a/x/seed0"]
    (run,) = read([str(folders[0])])
    assert run.name == "seed0"


def test_a_folder_named_twice_is_an_error(tmp_path):
    folder = str(write(tmp_path / "one", [step(1, 1.0)]))
    with pytest.raises(UserError, match="given twice"):
        read([folder, folder + "/../one"])


@pytest.mark.parametrize(
    "content", ["", "\n", '{"st', '{"step": 4, "time": 5.0, "resumed": true}\n']
)
def test_a_run_without_records_is_an_error(tmp_path, content):
    write(tmp_path, [], end=content)
    with pytest.raises(UserError, match=r"metrics\.jsonl has no records yet"):
        read([str(tmp_path)])
    (tmp_path / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"metrics\.jsonl has no records yet"):
        read([str(tmp_path)])


def test_a_broken_config_is_an_error(tmp_path):
    folder = write(tmp_path, [step(1, 1.0)])
    (folder / "config.json").write_text('{"steps": ')
    with pytest.raises(UserError, match=r"config\.json is not JSON"):
        read([str(folder)])


@pytest.mark.parametrize(
    ("name", "path", "value", "message"),
    [
        ("run.json", "memory", None, "memory=None must be an object"),
        ("run.json", "memory.total_gib", "14", r"memory\.total_gib='14' must be a number"),
        ("run.json", "parameters", 10**400, r"parameters=10{59}\.\.\. must be an integer"),
        ("run.json", "versions", ["jax"], r"versions=\['jax'\] must be an object"),
        ("run.json", "devices", 0, "devices=0 must be an integer from 1"),
        ("config.json", "steps", "30", "steps='30' must be an integer"),
        ("config.json", "model", 3, "model=3 must be an object"),
    ],
)
def test_an_edited_file_is_one_line(tmp_path, name, path, value, message):
    folder = write(tmp_path, [step(1, 1.0)])
    content = node = read_json(folder / name)
    *parents, last = path.split(".")
    for key in parents:
        node = node[key]
    node[last] = value
    (folder / name).write_text(json.dumps(content))
    with pytest.raises(UserError, match=rf"{name}: {message}") as caught:
        read([folder])
    assert "\n" not in str(caught.value)


def test_a_pipe_in_place_of_the_metrics_does_not_block(tmp_path):
    folder = write(tmp_path, [step(1, 1.0)])
    (folder / "metrics.jsonl").unlink()
    os.mkfifo(folder / "metrics.jsonl")
    with pytest.raises(UserError, match=r"metrics\.jsonl is not a regular file"):
        read([folder])


def test_null_is_nan(tmp_path):
    (run,) = read([write(tmp_path, [step(n, loss) for n, loss in enumerate([2.0, None])])])
    steps, values = run.series("loss")
    np.testing.assert_array_equal(steps, [0, 1])
    np.testing.assert_array_equal(values, [2.0, np.nan])


def test_twenty_thousand_resumes_are_read_in_linear_time(tmp_path):
    records = [record for n in range(20_000) for record in (step(n, 1.0), resumed(n + 1))]
    (run,) = read([write(tmp_path, records)])
    assert len(run.logged) == len(run.resumes) == 20_000


def test_an_evaluation_that_is_not_finite_or_was_cut_off(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text('{"step": 1, "time": 1, "metr')
    run_files.append_evaluation(tmp_path, {"step": 2, "time": 2.0, "metrics": {"a": math.nan}})
    run_files.append_evaluation(tmp_path, {"step": 3, "time": 3.0, "metrics": {"a": 0.5}})
    found = [(each["step"], each["metrics"]) for each in run_files.read_evaluations(tmp_path)]
    assert found == [(2, {"a": None}), (3, {"a": 0.5})]
