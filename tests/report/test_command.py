"""`lomo-jax report` as users run it."""

import os
import resource
import subprocess
import sys

import pytest
from workdirs import evaluation, sample, step, write

from lomo_jax.report.__main__ import main
from lomo_jax.training.config import Config


@pytest.fixture
def run(tmp_path):
    return write(tmp_path / "runs" / "one", [step(1, 3.0), evaluation(1, 3.5)])


def _report(capsys, *arguments):
    status = main(["report", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_one_run_gets_its_page_in_its_folder(run, capsys):
    assert _report(capsys, run) == (0, f"{run / 'report.html'}\n", "")
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_several_runs_get_a_page_in_the_current_folder(run, tmp_path, capsys, monkeypatch):
    other = write(tmp_path / "runs" / "two", [step(1, 3.0)])
    monkeypatch.chdir(tmp_path)
    assert _report(capsys, run, other) == (0, "report.html\n", "")
    page = (tmp_path / "report.html").read_text(encoding="utf-8")
    assert "<title>one, two" in page
    assert not (run / "report.html").exists()


@pytest.mark.parametrize("before", [True, False])
def test_out_may_come_before_or_after_the_run(run, tmp_path, capsys, before):
    out = tmp_path / "page.html"
    arguments = ("--out", out, run) if before else (run, f"--out={out}")
    assert _report(capsys, *arguments) == (0, f"{out}\n", "")
    assert out.exists()


def test_errors_are_one_line(run, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    for arguments, message in (
        ((), "required: RUN"),
        ((tmp_path / "nowhere",), "nowhere is not the folder of a run: it has no run.json"),
        ((empty,), "empty is not the folder of a run: it has no run.json"),
        ((run, "--ou", "x"), "unrecognized arguments: --ou"),
        ((run, run), "given twice"),
        ((run / "metrics.jsonl",), "metrics.jsonl is not the folder of a run"),
        ((run, "--out", tmp_path / "nowhere" / "page.html"), "No such file or directory"),
    ):
        status, out, error = _report(capsys, *arguments)
        assert (status, out, error.count("\n")) == (1, "", 1), error
        assert error.startswith("error: ")
        assert message in error


def test_a_failed_write_leaves_the_earlier_page(run, capsys):
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


def test_a_link_that_the_folder_brings_is_not_followed(run, tmp_path, capsys):
    """A run of somebody else must not make the report overwrite another file."""
    (tmp_path / "precious").write_text("mine")
    (run / ".report.html.partial").symlink_to(tmp_path / "precious")
    assert _report(capsys, run)[0] == 0
    assert (tmp_path / "precious").read_text() == "mine"
    assert (run / "report.html").read_text(encoding="utf-8").startswith("<!DOCTYPE html>")


def test_times_that_go_to_and_fro(tmp_path, capsys):
    records = [step(n, 1.0, time=n % 2 * 6e10) for n in range(4000)]
    assert _report(capsys, write(tmp_path / "run", records))[0] == 0


def test_names_that_are_not_utf_8(tmp_path, capsys):
    config = Config(workdir="caf\udce9")
    run = write(tmp_path / "run", [step(1, 3.0), sample(1, "more")], config=config)
    assert _report(capsys, run)[0] == 0
    assert r"caf\udce9" in (run / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize("package", ["matplotlib", "jinja2"])
def test_a_missing_package_is_named(run, capsys, monkeypatch, package):
    monkeypatch.delitem(sys.modules, "lomo_jax.report.charts", raising=False)
    monkeypatch.delattr("lomo_jax.report.charts", raising=False)
    monkeypatch.setitem(sys.modules, package, None)
    status, _, error = _report(capsys, run)
    expected = f"error: a report needs {package}: pip install 'lomo_jax[plot]'\n"
    assert (status, error) == (1, expected)


@pytest.mark.parametrize("kind", ["folder", "pipe"])
def test_out_has_to_be_a_regular_file(run, tmp_path, capsys, kind):
    out = tmp_path / "out"
    (os.mkfifo if kind == "pipe" else os.mkdir)(out)
    status, _, error = _report(capsys, run, "--out", out)
    assert (status, error.count("\n")) == (1, 1)
    assert f"{out} is not a regular file" in error
    assert out.is_fifo() == (kind == "pipe")


def test_the_module_does_not_import_the_trainer(run):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:]\n"
        "try: runpy.run_module(sys.argv[0], run_name='__main__', alter_sys=True)\n"
        "except SystemExit as end: assert not end.code\n"
        "names = ('flax', 'orbax', 'transformers', 'lomo_jax.training')\n"
        "print([name for name in names if name in sys.modules])"
    )
    command = [sys.executable, "-c", code, "lomo_jax.report", str(run)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == f"{run / 'report.html'}\n[]\n"
