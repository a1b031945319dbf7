"""What a person sees on a terminal; off one, see test_loop.py."""

import os
import pty
import re
import subprocess
import sys
from pathlib import Path

from lomo_jax.training.display import Display

_PROGRAM = """
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


def test_a_terminal_gets_a_bar_below_the_lines():
    main, terminal = pty.openpty()
    environment = os.environ | {"TERM": "xterm-256color", "COLUMNS": "100"}
    process = subprocess.run(
        [sys.executable, "-c", _PROGRAM], stdout=terminal, env=environment, check=False
    )
    os.close(terminal)
    shown = os.read(main, 1 << 16).decode()
    os.close(main)
    assert process.returncode == 0
    text = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert "sample    one" in text
    assert "          two [bold]x" in text
    assert re.search(r"step 5/5 ━+ loss 0\.2000  lr 1\.00e-03  1,23[45] tok/s", text)
