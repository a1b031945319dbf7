"""Runs of two and four processes on one machine, connected by gloo."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = """
from lomo_jax.models import DecoderConfig
from lomo_jax.training import Config, DataConfig, MeshConfig, ModelConfig

def get_config():
    shape = DecoderConfig(
        vocab_size=258, width=32, mlp_width=64, num_layers=2, num_heads=4, num_kv_heads=2,
        head_dim=8, max_length=64,
    )
    return Config(
        model=ModelConfig(init="random", architecture=shape),
        data=DataConfig({text!r}, eval_fraction=0.1),
        learning_rate=3e-2, batch_size=8, sequence_length=32, steps=10, eval_every=5, log_every=1,
        param_dtype="float32", prompt="the", prompt_tokens=4, mesh=MeshConfig(tensor=2),
        eval_tasks={tasks!r}, keep_best="own_acc",
    )
"""


def free_port():
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def start(commands):
    pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "cwd": ROOT}
    return [subprocess.Popen([sys.executable, *map(str, command)], **pipe) for command in commands]


def finish(processes, seconds=300):
    try:
        return [process.communicate(timeout=seconds)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()


def worker(processes, first, last, restore="-", save="-"):
    """Runs some steps; checks that all processes print the same losses; returns them."""
    where, path = f"localhost:{free_port()}", Path(__file__).with_name("worker.py")
    running = start(
        [path, where, processes, i, first, last, restore, save] for i in range(processes)
    )
    outputs = finish(running)
    assert [p.returncode for p in running] == [0] * processes, outputs
    printed = [[line for line in o.splitlines() if line.startswith("loss")] for o in outputs]
    assert all(lines == printed[0] for lines in printed)
    return [float(line.split()[1]) for line in printed[0]]


@pytest.mark.exhaustive
def test_a_checkpoint_of_four_processes_resumes_on_one_and_on_two(tmp_path):
    expected = worker(1, 0, 5)
    first = worker(4, 0, 2, save=tmp_path / "checkpoint")
    np.testing.assert_allclose(first, expected[:3], rtol=1e-5)
    for processes in (1, 2):
        rest = worker(processes, 3, 5, restore=tmp_path / "checkpoint")
        np.testing.assert_allclose(rest, expected[3:], rtol=1e-5)


def train(folder, processes, *flags, code=""):
    """Starts `train.py` in some processes; the last one runs `code` first."""
    config, text = folder / "config.py", folder / "text.jsonl"
    words = np.random.default_rng(0).choice(["the", "cat", "sat", "on", "a", "mat"], (60, 60))
    text.write_text("\n".join(json.dumps({"text": " ".join(row)}) for row in words))
    tasks = folder / "own.jsonl"
    questions = (
        {"prompt": f"the cat sat {n}", "choices": [" on a", " mat", " cat"]} for n in range(9)
    )
    tasks.write_text("\n".join(json.dumps({**each, "answer": 1}) for each in questions))
    config.write_text(CONFIG.format(text=str(text), tasks=str(tasks)))
    # Four devices in all.
    devices = f"import jax; jax.config.update('jax_num_cpu_devices', {4 // processes}); "
    devices += "import sys, train; "
    run = "sys.exit(train.main(['train.py', *sys.argv[1:]]))"
    command = ["--config", config, f"--config.workdir={folder / f'run{processes}'}", *flags]
    port = free_port()
    ids = range(processes) if processes > 1 else [None]
    joined = lambda i: [  # noqa: E731
        f"--coordinator=localhost:{port}",
        f"--num_processes={processes}",
        f"--process_id={i}",
    ]
    return start(
        [
            *("-c", devices + (f"exec({code!r}); " if i == processes - 1 else "") + run),
            *(*command, *(joined(i) if processes > 1 else [])),
        ]
        for i in ids
    )


def wait_for_steps(workdir):
    """Waits until a run has more than twenty lines of metrics."""
    log = workdir / "metrics.jsonl"
    deadline = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 20):
        assert time.monotonic() < deadline
        time.sleep(0.05)


@pytest.fixture(autouse=True)
def _on_cpu(monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")


def test_several_processes_train_like_one(tmp_path):
    """Same losses, written by the first process alone; exports equal up to rounding."""
    from safetensors.numpy import load_file

    found = {}
    for processes in (1, 2):
        running = train(tmp_path, processes)
        outputs = finish(running)
        assert [p.returncode for p in running] == [0] * processes, outputs
        folder = tmp_path / f"run{processes}"
        lines = (folder / "metrics.jsonl").read_text().splitlines()
        records = list(map(json.loads, lines))
        losses = [r.get("loss", r.get("eval_loss")) for r in records if "sample" not in r]
        losses += [r["eval_own_acc"] for r in records if "eval_own_acc" in r]
        found[processes] = losses, load_file(folder / "export" / "model.safetensors")
        # The export leaves no temporary folder.
        assert [path.name for path in folder.glob(".*")] == [".lock"]
        # Only the first process prints.
        assert "step 10" in outputs[0]
        assert all("loss" not in output for output in outputs[1:])
    assert len(found[1][0]) == 16
    losses, weights = found[2]
    np.testing.assert_allclose(losses, found[1][0], rtol=1e-5)
    for name, weight in found[1][1].items():
        np.testing.assert_allclose(weights[name], weight, rtol=0, atol=1e-5 * abs(weight).max())


def test_two_processes_evaluate_a_run_like_one(tmp_path):
    (process,) = train(tmp_path, 1)
    (output,) = finish([process])
    assert process.returncode == 0, output
    lines = (tmp_path / "run1" / "metrics.jsonl").read_text().splitlines()
    accuracy = [r["eval_own_acc"] for r in map(json.loads, lines) if "eval_own_acc" in r][-1]
    command = ["-m", "lomo_jax", "eval", tmp_path / "run1", "--tasks", tmp_path / "own.jsonl"]
    command += [f"--coordinator=localhost:{free_port()}", "--num_processes=2"]
    running = start([*command, f"--process_id={i}"] for i in range(2))
    outputs = finish(running)
    assert [p.returncode for p in running] == [0, 0], outputs
    assert f"own_acc  {accuracy:.4f}" in outputs[0]
    assert "own_acc" not in outputs[1]


def test_processes_stop_after_the_same_step_and_one_process_resumes(tmp_path):
    """One of two processes gets SIGTERM; both save after the same step."""
    fields = ["--config.steps=200", "--config.eval_every=0", "--config.prompt="]
    fields += ["--config.checkpoint_every=10", "--config.keep_checkpoints=2"]
    fields += ["--config.schedule=constant", "--config.warmup=0"]  # whatever the number of steps
    running = train(tmp_path, 2, *fields)
    wait_for_steps(tmp_path / "run2")
    running[1].send_signal(signal.SIGTERM)
    outputs = finish(running)
    assert [p.returncode for p in running] == [0, 0], outputs
    (stopped,) = re.findall(r"stopped   after step (\d+), saved", outputs[0])
    assert 20 <= int(stopped) < 200
    checkpoints = tmp_path / "run2" / "checkpoints"
    before, last = sorted(int(path.name) for path in checkpoints.iterdir())
    assert (before, last) == (int(stopped) // 10 * 10, int(stopped))

    # If one process cannot read a checkpoint, both treat it as damaged.
    of_second = checkpoints / stopped / "params" / "ocdbt.process_1" / "d"
    largest = max(of_second.iterdir(), key=lambda path: path.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])
    running = train(tmp_path, 2, *fields, f"--config.steps={last + 5}")
    outputs = finish(running)
    assert [p.returncode for p in running] == [0, 0], outputs
    assert f"{stopped} is damaged" in outputs[0]
    assert f"resumed   after step {before} of {last + 5}" in outputs[0]
    stopped = last + 5

    until = stopped + 10  # later, differences in rounding between the meshes have grown
    fields.append(f"--config.steps={until}")
    (process,) = train(tmp_path, 1, *fields, f"--config.workdir={tmp_path / 'run2'}")
    (output,) = finish([process])
    assert process.returncode == 0, output
    assert f"resumed   after step {stopped} of {until}" in output
    (process,) = train(tmp_path, 1, *fields)
    (output,) = finish([process])
    assert process.returncode == 0, output
    losses = []
    for name in ("run2", "run1"):
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        of_steps = {r["step"]: r["loss"] for r in map(json.loads, lines) if "loss" in r}
        assert list(of_steps) == list(range(1, until + 1))
        losses.append(list(of_steps.values()))
    np.testing.assert_allclose(*losses, rtol=1e-5)


@pytest.mark.parametrize(
    ("code", "message"),
    [
        (
            "sys.argv.append('--config.learning_rate=0.5')",
            "error: learning_rate: 0.03 in process 0, but 0.5 in process 1; start all processes "
            "alike",
        ),
        ("import lomo_jax; lomo_jax.__version__ = '0'", "error: the version of lomo_jax: "),
        (
            "from lomo_jax import data; read = data.text_dataset\n"
            "data.text_dataset = lambda **kwargs: read(**kwargs)._replace(fingerprint='other')",
            "error: the fingerprint of the dataset: ",
        ),
    ],
)
def test_processes_that_differ_do_not_start(tmp_path, code, message):
    running = train(tmp_path, 2, code=code)
    outputs = finish(running, seconds=150)
    assert [process.returncode for process in running] == [1, 1], outputs
    for output in outputs:
        assert message in output
        assert "Traceback" not in output
    assert not (tmp_path / "run2" / "metrics.jsonl").exists()


def test_processes_that_do_not_meet_end_with_a_line(tmp_path):
    first, second = train(tmp_path, 2, "--connect_timeout=5")
    second.kill()
    output, _ = finish([first, second], seconds=100)
    assert first.returncode == 1
    *_, line = output.splitlines()
    assert line.startswith("error: --coordinator: process 1 of 2 did not come to localhost:")


def test_a_killed_process_ends_the_others(tmp_path):
    running = train(tmp_path, 2, "--config.steps=1000000", "--config.eval_every=0")
    wait_for_steps(tmp_path / "run2")
    running[1].send_signal(signal.SIGKILL)
    output, _ = finish(running, seconds=150)
    assert running[0].returncode != 0
    assert "has lost another one" in output or "another task died" in output


def test_an_error_in_one_process_ends_all_processes(tmp_path):
    """Even while a save is in progress, before the processes have agreed on its result."""
    code = """
from lomo_jax.training import log

record = log.Recorder.step

def step(self, number, *outputs):
    record(self, number, *outputs)
    if number == 8:
        raise OSError("no such luck")

log.Recorder.step = step
"""
    running = train(tmp_path, 2, "--config.checkpoint_every=4", code=code)
    first, second = finish(running, seconds=150)
    assert running[0].returncode != 0, first
    assert running[1].returncode == 1, second
    assert "OSError: no such luck" in second
    assert "has lost another one" in first or "another task died" in first
