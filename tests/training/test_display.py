"""What a person sees on a terminal; off one, see test_loop.py."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from lomo_jax.training.display import Display

_PROGRAM = """
import pytest

from lomo_jax.training.display import Display
with Display(5) as display:
    display.status("reading the model")
    display.line("sample", "one\\ntwo [bold]x")
    for step in range(1, 6):
        metrics = {"loss": 1 / step, "learning_rate": 1e-3, "tokens_per_second": 1234.5}
        display.step(step, metrics, logged=False)
"""


def test_a_full_disk_takes_the_log_and_not_the_run(capsys):
    with Display(1) as display:
        display.line("model", "small")
        display.log_to(Path("/dev/full"))
        display.line("text", "short")
    assert capsys.readouterr().out == "model     small\ntext      short\n"


@pytest.mark.parametrize("closed", [False, True])
def test_output_that_nobody_takes_ends_no_run(tmp_path, closed):
    """A full disk and a closed pipe."""
    log = tmp_path / "log.txt"
    program = _PROGRAM.replace(
        'status("reading the model")', f"log_to(__import__('pathlib').Path({str(log)!r}))"
    )
    if closed:
        end, output = os.pipe()
        os.close(end)
    else:
        output = os.open("/dev/full", os.O_WRONLY)
    process = subprocess.run(
        [sys.executable, "-c", program], stdout=output, stderr=subprocess.PIPE, check=False
    )
    os.close(output)
    assert (process.returncode, process.stderr) == (0, b"")
    assert "two [bold]x" in log.read_text(encoding="utf-8")


def test_what_a_model_writes_moves_no_cursor(tmp_path, capsys):
    with Display(1) as display:
        display.log_to(tmp_path / "log.txt")
        display.line("sample", "one\x1b[2J\x07\ttwo\x9b \N{HEAVY BLACK HEART}")
    shown = "one\ufffd[2J\ufffd\ttwo\ufffd \N{HEAVY BLACK HEART}\n"
    assert capsys.readouterr().out == f"sample    {shown}".expandtabs(8)
    assert (tmp_path / "log.txt").read_text(encoding="utf-8").endswith(f"sample    {shown}")


def test_the_log_has_the_error_that_ends_the_run(tmp_path):
    def run():
        with Display(1) as display:
            display.log_to(tmp_path / "log.txt")
            raise OSError("the disk is gone")

    with pytest.raises(OSError, match="gone"):
        run()
    assert (tmp_path / "log.txt").read_text().endswith(" error     the disk is gone\n")


def _on_a_terminal(columns: int, program: str = _PROGRAM) -> str:
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": str(columns)}
    process = subprocess.run(
        [sys.executable, "-c", program], stdout=terminal, env=environment, check=False
    )
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert process.returncode == 0
    return re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)


def test_a_terminal_gets_a_bar_below_the_lines():
    text = _on_a_terminal(100)
    assert "sample    one" in text
    assert "          two [bold]x" in text
    assert re.search(r"step 5/5 ━+ loss 0\.2000  lr 1\.00e-03  1,23[45] tok/s", text)


def test_a_narrow_terminal_gets_a_second_line_and_loses_nothing():
    program = _PROGRAM.replace("Display(5)", "Display(5000)").replace(
        '{"loss"', '{"eval_loss": 3.2, "seconds_left": 75, "loss"'
    )
    text = _on_a_terminal(80, program)
    *_, last = re.findall(r"step +5/5000 ━+ (.*?left)", text, re.DOTALL)
    words = " ".join(last.split())
    assert re.fullmatch(
        r"loss 0\.2000 held out 3\.2000 lr 1\.00e-03 1,23[45] tok/s 0:01:15 left", words
    )
