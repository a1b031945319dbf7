"""`python -m lomo_jax.report` as a person uses it."""

import resource
import subprocess
import sys

import pytest
from workdirs import CONFIG, evaluation, sample, step, write

from lomo_jax.report.__main__ import main


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "runs" / "one", [step(1, 3.0), evaluation(1, 3.5)])


def _report(capsys, *arguments):
    status = main(["report", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_one_run_gets_its_page_in_its_folder(run, capsys):
    assert _report(capsys, run) == (0, f"{run / 'report.html'}\n", "")
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_several_runs_get_theirs_in_the_current_folder(run, tmp_path, capsys, monkeypatch):
    other = write(tmp_path / "runs" / "two", [step(1, 3.0)])
    monkeypatch.chdir(tmp_path)
    assert _report(capsys, run, other) == (0, "report.html\n", "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>one, two" in page
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("before", [True, False])
def test_out(run, tmp_path, capsys, before):
    out = tmp_path / "page.html"
    arguments = ("--out", out, run) if before else (run, f"--out={out}")
    assert _report(capsys, *arguments) == (0, f"{out}\n", "")
    assert out.exists()


def test_errors_are_one_line(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, said in (
        ((), "no run: name the workdir"),
        ((tmp_path / "nowhere",), "no such folder"),
        ((empty,), "has no metrics.jsonl: give the workdir of a run of train.py"),
        ((run, "--ou", "x"), "'ou'"),
        ((run, run), "named twice"),
        ((run / "metrics.jsonl",), "metrics.jsonl: is a file; give the workdir"),
        ((run, "--out", tmp_path / "nowhere" / "page.html"), "No such file or directory"),
    ):
        status, out, error = _report(capsys, *arguments)
        assert (status, out, error.count("\n")) == (1, "", 1), error
        assert error.startswith("error: ")
        assert said in error


def test_an_earlier_page_stays_where_a_new_one_cannot_be_written(run, capsys):
    (run / "report.html").write_text("earlier")
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, before[1]))
    try:
        status, _, error = _report(capsys, run)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert status == 1
    assert "File too large" in error
    assert (run / "report.html").read_text() == "earlier"
    assert not (run / ".report.html.partial").exists()


def test_names_that_are_not_utf_8(tmp_path, capsys):
    config = CONFIG | {"prompt": "caf\udce9"}
    run = write(tmp_path / "run", [step(1, 3.0), sample(1, "more")], config=config)
    assert _report(capsys, run)[0] == 0
    assert r"caf\udce9" in (run / "report.html").read_text(encoding="utf-8")


def test_without_matplotlib_the_error_says_what_to_install(run, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    status, _, error = _report(capsys, run)
    assert (status, error) == (
        1,
        "error: a report needs matplotlib: pip install 'lomo_jax[plot]'\n",
    )


def test_help_and_module(run):
    command = [sys.executable, "-m", "lomo_jax.report"]
    asked = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "python -m lomo_jax.report runs/quickstart" in asked.stdout
    assert "--out" in asked.stdout
    made = subprocess.run([*command, str(run)], capture_output=True, text=True, check=False)
    assert (made.returncode, made.stderr) == (0, "")
    assert (run / "report.html").exists()


def test_the_report_does_not_load_the_trainer():
    code = (
        "import sys, lomo_jax.report.__main__; "
        "print([m for m in ('flax', 'orbax', 'transformers', 'lomo_jax.training', 'matplotlib') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "[]\n"
