"""Mistakes of users: the command prints a one-line error for each.

`{tmp}` is the test's folder. It contains text.jsonl, a finished run of two steps in `run`, and a
copy of its export in `model`.
"""

import json
import shutil
from pathlib import Path

import jax
import numpy as np
import pytest
import runs
import safetensors.numpy

from lomo_jax.training import loop, resume
from lomo_jax.training.__main__ import main

# Flags added to a valid command -> the error.
CONFIGS = {
    "--config.modle.init=random": "modle: no such field; did you mean 'model'?",
    "--config.steps=many": "steps: 'many' is not a whole number",
    "--config.batch_size=0": (
        "batch_size: 0 is not allowed; it must be a positive number up to 2**20"
    ),
    "--config.batch_size=1000000000": (
        "batch_size: 1000000000 is not allowed; it must be a positive number up to 2**20"
    ),
    "--config.steps=100000000000": (
        "steps: 100000000000 is not allowed; it must be a positive number up to 10**8"
    ),
    "--config.optimizer=adamv": (
        "optimizer: 'adamv' is not adalomo, lomo or an optimizer of optax, such as adamw; did you "
        "mean 'adam' or 'radam' or 'adamw'?"
    ),
    "--config.optimizer_kwargs={'weight_decy': 0.1}": (
        "optimizer_kwargs: adalomo takes no 'weight_decy'; did you mean 'weight_decay'?"
    ),
    "--config.microbatches=3": "microbatches: 3 does not divide batch_size=4",
    "--config.warmup=12": (
        "warmup: 12 is 12 of 12 steps, it must be shorter than the run; below 1 it is a fraction "
        "of `steps`, from 1 on a number of steps"
    ),
    "--config.resume=maybe": "resume: 'maybe' is not allowed; it must be one of auto, must, never",
    "--config.keep_checkpoints=0": (
        "keep_checkpoints: 0 is not allowed; it must be a positive number"
    ),
    "--config.sequence_length=65": (
        "sequence_length: 65 is longer than the model allows, 64 tokens; lower it"
    ),
    "--config.mesh.fsdp=3": (
        "batch_size: 4 must be a multiple of mesh.data=1 * mesh.fsdp=3 = 3 devices; use "
        "--config.batch_size=6, or raise mesh.tensor"
    ),
    "--config.resume=must": (
        "resume: 'must', but '{tmp}/new' has no checkpoint; set --config.workdir to that of the "
        "run, or --config.resume=auto to start one"
    ),
    "--config.optimizer=noisy_sgd --config.optimizer_kwargs={'key': 0}": (
        "optimizer: 'noisy_sgd' keeps a random key in its state, which a checkpoint cannot hold; "
        "choose another"
    ),
    "--config.optimizer=lbfgs": (
        "optimizer: 'lbfgs' cannot be used here: scale_by_zoom_linesearch.<locals>.update_fn() "
        "missing 2 required keyword-only arguments: 'grad' and 'value_fn'"
    ),
    "--config.optimizer=sophia": (
        "optimizer: 'sophia' cannot be used here: obj_fn must be provided to hutchinson update "
        "function."
    ),
    "--config.optimizer=prodigy": (
        "optimizer: 'prodigy' cannot be used here: tx updates parameter embedding/value from "
        "output/kernel/value: a transformation that mixes parameters needs all their gradients at "
        "once, and the fused step never has them; to clip by the global norm use clip_norm"
    ),
    "--config.prompt=the --config.prompt_tokens=62": (
        "prompt: its 3 tokens and prompt_tokens=62 are more than the model allows, 64; shorten it"
    ),
    "--config.wandb=": "wandb: '' is not allowed; it must be the name of a project",
}


def _write(name: str, content: str | bytes):
    def prepare(tmp: Path) -> None:
        (tmp / name).write_bytes(content.encode() if isinstance(content, str) else content)

    return prepare


def _edit_config(tmp: Path) -> None:
    path = tmp / "model" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"architectures": ["MambaLM"]}))


def _truncate_weights(tmp: Path) -> None:
    path = tmp / "model" / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _break_weights(tmp: Path) -> None:
    path = tmp / "model" / "model.safetensors"
    tensors = safetensors.numpy.load_file(path)
    tensors["model.norm.weight"][0] = np.nan
    safetensors.numpy.save_file(tensors, path)


def _remove_tokenizer(tmp: Path) -> None:
    for path in (tmp / "model").glob("tokenizer*"):
        path.unlink()


def _nothing(tmp: Path) -> None:
    pass


_TEXT, _MODEL = "--config.data.path={tmp}/", "--config.model.init=checkpoint --config.model.path="
_RUN = "--config.workdir={tmp}/run --config.steps=20"
# Name -> (change of the files, added flags, the error).
INPUTS = {
    "no text": (
        *(_nothing, _TEXT + "none.txt"),
        "{tmp}/none.txt does not exist: give a file, a folder or a glob, or OWNER/NAME of a "
        "dataset on the Hugging Face Hub",
    ),
    "empty text": (
        *(_write("a.txt", ""), _TEXT + "a.txt"),
        "{tmp}/a.txt has no text, it is empty or blank: add text",
    ),
    "text in Latin-1": (
        *(_write("a.txt", b"caf\xe9 " * 99), _TEXT + "a.txt"),
        "{tmp}/a.txt is not UTF-8 text (byte 0xe9): convert it, or select the files to read with a "
        "glob",
    ),
    "a line that is no JSON": (
        *(_write("a.jsonl", '{"text": "one"}\n{"text": '), _TEXT + "a.jsonl"),
        "{tmp}/a.jsonl:2 is not JSON: Expecting value; fix the line",
    ),
    "JSON without the text": (
        *(_write("a.jsonl", '{"body": "one"}\n'), _TEXT + "a.jsonl"),
        "{tmp}/a.jsonl:1 has no 'text' (found: body), and is no instruction, prompt or chat: set "
        "data.text_key, or data.template to a template of these columns",
    ),
    "a few words": (
        *(_write("a.txt", "One more time."), _TEXT + "a.txt"),
        "the training split has 12 tokens to predict, less than one sequence of 32: add text or "
        "lower sequence_length",
    ),
    "no model": (
        *(_nothing, _MODEL + "{tmp}/none"),
        "{tmp}/none does not exist; give a model directory, a .gguf file or the id of a model on "
        "the hub",
    ),
    "a model of another kind": (
        *(_edit_config, _MODEL + "{tmp}/model"),
        "{tmp}/model/config.json: architecture MambaLM is not supported; python -m "
        "lomo_jax.models prints those that are",
    ),
    "weights that were not downloaded to the end": (
        *(_truncate_weights, _MODEL + "{tmp}/model"),
        "{tmp}/model/model.safetensors is truncated or not a safetensors file (Error while "
        "deserializing header: incomplete metadata, file not fully covered); download it again",
    ),
    "weights that are not finite": (
        *(_break_weights, _MODEL + "{tmp}/model"),
        "held-out loss is nan before the first step: the weights of the model are damaged; "
        "download it again",
    ),
    "a model without its tokenizer": (
        *(_remove_tokenizer, _MODEL + "{tmp}/model"),
        "{tmp}/model has no tokenizer (tokenizer.json, tokenizer.model, vocab.json); copy the "
        "tokenizer of the original model there",
    ),
    "a workdir that is a file": (
        *(_nothing, "--config.workdir={tmp}/text.jsonl"),
        "workdir: '{tmp}/text.jsonl' cannot be written: File exists; set --config.workdir",
    ),
    "a workdir with other things in it": (
        *(_write("config.json", "{{}}"), "--config.workdir={tmp}"),
        "workdir: '{tmp}' is not that of a run, and a run would overwrite model, config.json "
        "there; set another --config.workdir",
    ),
    "text that has changed since": (
        *(_write("text.jsonl", "".join(f'{{"text": "document {n}"}}\n' for n in range(99))), _RUN),
        "data.path: '{tmp}/text.jsonl' is another dataset than '{made}/text.jsonl' of the "
        "checkpoint in '{tmp}/run', and the position of the run in it is lost; restore the "
        "dataset, or start another run in another --config.workdir with "
        "--config.model.path={tmp}/run --config.model.init=checkpoint",
    ),
    "a checkpoint of another optimizer": (
        *(_nothing, f"{_RUN} --config.optimizer=lomo"),
        "optimizer: 'lomo', but the checkpoint in '{tmp}/run' is of a run with 'adalomo'; set it "
        "back, or use another --config.workdir",
    ),
    "a checkpoint of another model": (
        *(_nothing, f"{_RUN} --config.model.architecture.width=16"),
        "model.architecture.width: 16, but the checkpoint in '{tmp}/run' is of a run with 32; set "
        "it back, or use another --config.workdir",
    ),
    "a checkpoint of a later step": (
        *(_nothing, "--config.workdir={tmp}/run --config.steps=1"),
        "steps: 1, but the checkpoint in '{tmp}/run' is of step 2; raise it, or export that step "
        "with lomo-jax export",
    ),
    "its own export": (
        *(_nothing, f"--config.resume=never --config.workdir={{tmp}}/run {_MODEL}{{tmp}}/run"),
        "model.path: '{tmp}/run' is in the workdir of this run, which starts anew and moves the "
        "earlier files aside; set another --config.workdir",
    ),
}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    tmp = tmp_path_factory.mktemp("made")
    text = runs.write_text(tmp / "text.jsonl")
    config = runs.make_config(text, tmp / "run", steps=2)
    with jax.numpy_dtype_promotion("standard"):
        loop.train(config)
    shutil.copytree(tmp / "run" / "export", tmp / "model")
    return tmp


@pytest.fixture
def answer(made, tmp_path, capsys):
    """Returns a function that runs the command with more flags and returns its stderr."""
    shutil.copytree(made, tmp_path, dirs_exist_ok=True)
    config = runs.make_config(tmp_path / "text.jsonl", tmp_path / "new")
    runs.write_config(config, tmp_path / "made.json")

    def run(flags: str) -> str:
        flags = flags.replace("{tmp}", str(tmp_path))
        argv = ["train.py", f"--config={tmp_path}/made.json", *flags.split(" --")]
        argv[3:] = [f"--{flag}" for flag in argv[3:]]
        with jax.numpy_dtype_promotion("standard"):
            assert main(argv) == 1
        error = capsys.readouterr().err
        return error.replace(str(tmp_path), "{tmp}").replace(str(made), "{made}")

    return run


@pytest.mark.parametrize("flags", CONFIGS)
def test_a_bad_config_gets_one_line(answer, flags):
    assert answer(flags) == f"error: {CONFIGS[flags]}\n"


@pytest.mark.parametrize("mistake", INPUTS)
def test_a_bad_input_gets_one_line(answer, tmp_path, mistake):
    prepare, flags, message = INPUTS[mistake]
    prepare(tmp_path)
    run = {
        path: path.stat().st_mtime_ns for path in (tmp_path / "run").rglob("*") if path.is_file()
    }
    assert answer(flags) == f"error: {message}\n"
    for path, time in run.items():
        if path.name != ".lock":
            assert path.stat().st_mtime_ns == time
    metrics = tmp_path / "new" / "metrics.jsonl"
    assert not metrics.exists() or not metrics.read_text()


def test_a_folder_in_use_gets_one_line(answer, made, tmp_path):
    with resume.open_workdir(str(tmp_path / "run")):
        message = answer("--config.workdir={tmp}/run")
    assert message.startswith("error: workdir: '{tmp}/run' is in use by process ")
    assert message.endswith("; wait for that run or stop it, or set another --config.workdir\n")
    assert message.count("\n") == 1
