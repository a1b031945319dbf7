"""What the reader makes of the files."""

import pytest
from workdirs import evaluation, resumed, sample, step, write

from lomo_jax.report import read


def _losses(run):
    return {record["step"]: record["loss"] for record in run.train}


def test_each_kind_of_record_is_kept_apart(tmp_path):
    records = [evaluation(0, 4.0), sample(0, "a"), step(1, 3.5), step(2, 3.0), evaluation(2, 3.2)]
    (run,) = read([str(write(tmp_path / "one", records))])
    assert _losses(run) == {1: 3.5, 2: 3.0}
    assert [(record["step"], record["eval_loss"]) for record in run.evals] == [(0, 4.0), (2, 3.2)]
    assert [record["sample"] for record in run.samples] == ["a"]
    assert (run.name, run.resumes, run.times_resumed, run.unreadable) == ("one", [], 0, 0)
    assert run.config["model"]["path"] == run.facts["source"] == "/models/llama-7b"


def test_what_a_lost_process_wrote_is_superseded_also_twice(tmp_path):
    records = [
        *(step(1, 1.1), step(2, 1.2), step(3, 1.3), evaluation(3, 9.0), step(4, 1.4)),
        *(resumed(3), step(4, 2.4), step(5, 2.5), sample(5, "lost")),
        *(resumed(2), step(3, 3.3), step(4, 3.4)),
        *(resumed(4), step(5, 4.5)),
    ]
    (run,) = read([str(write(tmp_path, records))])
    assert _losses(run) == {1: 1.1, 2: 1.2, 3: 3.3, 4: 3.4, 5: 4.5}
    assert run.evals == run.samples == []
    assert run.resumes == [2, 4]  # the one from step 3 was lost, too
    assert run.times_resumed == 3


def test_a_run_that_was_lost_before_its_first_checkpoint_has_begun_again(tmp_path):
    records = [
        *(evaluation(0, 4.0, 5.0), step(1, 1.1, 9.0), step(2, None, 10.0)),
        *(resumed(0, 90.0), evaluation(0, 4.0, 100.0), step(1, 2.1, 103.0)),
    ]
    (run,) = read([str(write(tmp_path, records))])
    assert _losses(run) == {1: 2.1}
    assert (run.resumes, run.times_resumed) == ([], 0)
    assert (run.started, run.seconds) == (100, 3)


def test_records_of_the_step_of_the_checkpoint_stay(tmp_path):
    records = [step(2, 1.0), evaluation(2, 5.0), step(3, 9.0), resumed(2), evaluation(2, 4.0)]
    (run,) = read([str(write(tmp_path, records))])
    assert _losses(run) == {2: 1.0}
    assert [record["eval_loss"] for record in run.evals] == [4.0]  # the last one counts


def test_time_between_a_stop_and_a_resume_is_left_out(tmp_path):
    records = [
        *(evaluation(0, 4.0, 100.0), step(1, 3.0, 110.0), step(2, 3.0, 125.0)),
        *(resumed(1, 9000.0), step(2, 3.0, 9007.0)),
    ]
    (run,) = read([str(write(tmp_path, records))])
    assert run.seconds == 25 + 7
    assert run.started == 100


def test_records_without_time_leave_it_unknown(tmp_path):
    (run,) = read([str(write(tmp_path, [{"step": 1, "loss": 2.0}]))])
    assert run.seconds is None
    assert run.started is None


def test_a_torn_last_line_is_skipped_and_null_stays(tmp_path):
    folder = write(tmp_path, [step(1, 2.0), step(2, None)], end='\n{"step": 3, "lo')
    (run,) = read([str(folder)])
    assert _losses(run) == {1: 2.0, 2: None}
    assert run.unreadable == 0


@pytest.mark.parametrize("newline", ["\n", ""])
def test_a_torn_line_does_not_hide_the_resume_behind_it(tmp_path, newline):
    folder = write(tmp_path, [step(1, 1.0), step(2, 9.0)], end='\n{"step": 3, "lo' + newline)
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1, "time": 5.0, "resumed": true}\n')
    (run,) = read([str(folder)])
    assert _losses(run) == {1: 1.0}
    assert run.times_resumed == 1
    assert run.unreadable == 0


def test_other_lines_that_are_no_records_are_counted(tmp_path):
    folder = write(tmp_path, [step(1, 1.0)], end='\nnoise\n[3]\n{"loss": 2.0}\n\n')
    with (folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 2, "loss": NaN}\n')
    (run,) = read([str(folder)])
    assert _losses(run) == {1: 1.0, 2: None}
    assert run.unreadable == 3


@pytest.mark.parametrize(
    "line",
    [
        '{"step": 1, "time": "noon"}',
        f'{{"step": {10**400}}}',
        '{"step": -1}',
        '{"step": ' + "[" * 10**5,
    ],
)
def test_lines_that_no_trainer_writes_are_counted(tmp_path, line):
    end = f'\n{line}\n{{"step": 2, "loss": 0.5}}\n'
    (run,) = read([str(write(tmp_path, [step(1, 1.0)], end=end))])
    assert _losses(run) == {1: 1.0, 2: 0.5}
    assert run.unreadable == 1


def test_a_run_may_lack_config_and_facts(tmp_path):
    (run,) = read([str(write(tmp_path, [step(1, 1.0)], config=None, facts=None))])
    assert run.config == run.facts == {}


def test_names_are_the_shortest_ends_that_differ(tmp_path):
    folders = [tmp_path / "a" / "x" / "seed0", tmp_path / "b" / "x" / "seed0"]
    runs = read([str(write(folder, [step(1, 1.0)])) for folder in folders])
    assert [run.name for run in runs] == ["a/x/seed0", "b/x/seed0"]
    (run,) = read([str(folders[0])])
    assert run.name == "seed0"


def test_a_name_that_cannot_be_shown(tmp_path):
    (run,) = read([str(write(tmp_path / "a\x01\udce9b", [step(1, 1.0)]))])
    assert run.name == "a\ufffd\ufffdb"


def test_a_folder_named_twice_is_an_error(tmp_path):
    folder = str(write(tmp_path / "one", [step(1, 1.0)]))
    with pytest.raises(ValueError, match="named twice"):
        read([folder, folder + "/../one"])


@pytest.mark.parametrize("content", ["", "\n", '{"st', '{"step": 4, "resumed": true}\n'])
def test_a_run_without_records_is_an_error(tmp_path, content):
    (tmp_path / "metrics.jsonl").write_text(content)
    with pytest.raises(ValueError, match=r"metrics\.jsonl has no records yet"):
        read([str(tmp_path)])


def test_a_broken_config_is_an_error(tmp_path):
    folder = write(tmp_path, [step(1, 1.0)])
    (folder / "config.json").write_text('{"steps": ')
    with pytest.raises(ValueError, match=r"config\.json: not JSON"):
        read([str(folder)])
