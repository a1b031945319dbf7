"""Whole runs of a tiny model: results, metrics, output, and errors at the start."""

import contextlib
import dataclasses
import functools
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import optax
import pytest
import runs
from flax import nnx
from helpers import before_release

import lomo_jax
from lomo_jax import data, models
from lomo_jax.errors import NonFiniteError, UserError
from lomo_jax.training import (
    Config,
    DataConfig,
    LoraConfig,
    MeshConfig,
    ModelConfig,
    loop,
    planning,
)
from lomo_jax.training import model as model_lib
from lomo_jax.training.step import make_schedule, optimizers
from lomo_jax.training.validation import warnings

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def _config(text: str, folder: Path, **changes) -> Config:
    return dataclasses.replace(runs.make_config(text, folder, log_every=4), **changes)


def _batches(config: Config):
    model = model_lib.abstract(config.model, config.param_dtype, config.sequence_length)
    params = model_lib.load_params(config.model, model, seed=config.seed)
    assert config.data.path is not None
    train, held_out, *_ = data.text_dataset(
        config.data.path,
        model_lib.load_tokenizer(None, model.config),
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        eval_fraction=config.data.eval_fraction,
    )
    return model, params, train, list(held_out)


def _plain_loss(model: model_lib.Model, params: nnx.State, batch: Any):
    """Returns the loss, from unchunked logits, and the weighted number of correct predictions."""
    logits = nnx.merge(model.graphdef, params)(
        batch["tokens"], batch["positions"], batch["segments"]
    )
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch["targets"])
    right = (logits.argmax(-1) == batch["targets"]) * batch["weights"]
    return (losses * batch["weights"]).sum() / batch["weights"].sum(), right.sum()


class _Run(NamedTuple):
    config: Config
    workdir: Path
    output: str


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> _Run:
    """A finished run with SGD."""
    workdir = tmp_path_factory.mktemp("run") / "new" / "folder"
    config = _config(
        text, workdir, optimizer="sgd", learning_rate=0.5, prompt="the cat", prompt_tokens=5
    )
    with contextlib.redirect_stdout(io.StringIO()) as output:
        loop.train(config)
    return _Run(config, workdir, output.getvalue())


def test_metrics_contain_the_logged_steps_and_the_evaluations(finished):
    workdir = finished.workdir
    assert list(runs.column(workdir, "loss")) == [1, 4, 8, 12]
    assert list(runs.column(workdir, "eval_loss")) == [0, 5, 10, 12]
    assert list(runs.column(workdir, "eval_accuracy")) == [0, 5, 10, 12]
    assert all(speed > 0 for speed in runs.column(workdir, "tokens_per_second").values())
    schedule = make_schedule("cosine", 0.5, 12, 0.03)
    for step, rate in runs.column(workdir, "learning_rate").items():
        np.testing.assert_allclose(rate, np.asarray(schedule(step - 1)), rtol=1e-5)


def test_losses_equal_a_plain_loop(finished):
    model, params, train, held_out = _batches(finished.config)
    schedule = make_schedule("cosine", 0.5, 12, 0.03)
    plain_loss = functools.partial(_plain_loss, model)
    evaluate = jax.jit(plain_loss)
    value_and_grad = jax.jit(jax.value_and_grad(plain_loss, has_aux=True))
    losses, eval_losses, accuracies = {}, {}, {}
    for step in range(13):
        if step in (0, 5, 10, 12):
            weights = np.array([batch["weights"].sum() for batch in held_out])
            results = [evaluate(params, batch) for batch in held_out]
            loss, right = np.array(results, dtype=np.float64).T
            eval_losses[step] = loss @ weights / weights.sum()
            accuracies[step] = right.sum() / weights.sum()
        (loss, _), grads = value_and_grad(params, next(train))
        if step + 1 in (1, 4, 8, 12):
            losses[step + 1] = float(loss)
        rate = np.asarray(schedule(step))
        params = jax.tree.map(lambda p, g, rate=rate: p - rate * g, params, grads)

    workdir = finished.workdir
    assert runs.column(workdir, "loss") == pytest.approx(losses, rel=1e-5)
    assert runs.column(workdir, "eval_loss") == pytest.approx(eval_losses, rel=1e-5)
    assert runs.column(workdir, "eval_accuracy") == pytest.approx(accuracies, rel=1e-5)
    assert eval_losses[12] < 0.9 * eval_losses[0]


def test_the_export_has_the_loss_of_the_trained_model(finished):
    again = dataclasses.replace(
        finished.config,
        model=ModelConfig(str(finished.workdir / "export")),
        workdir=str(finished.workdir.parent / "again"),
        steps=1,
    )
    loop.train(again)
    first = runs.column(Path(again.workdir), "eval_loss")[0]
    assert first == pytest.approx(runs.column(finished.workdir, "eval_loss")[12], rel=1e-6)


@pytest.mark.slow
def test_the_reference_step_gives_the_same_losses(text, tmp_path):
    for fused in (True, False):
        loop.train(_config(text, tmp_path / str(fused), fused=fused))
    fused_losses, losses = (
        runs.column(tmp_path / str(fused), "eval_loss") for fused in (True, False)
    )
    assert fused_losses == pytest.approx(losses, rel=1e-5)
    assert losses[12] < losses[0]


@pytest.mark.slow
@pytest.mark.exhaustive
def test_microbatches_give_the_same_losses(text, tmp_path):
    for microbatches in (1, 4):
        workdir = tmp_path / str(microbatches)
        loop.train(_config(text, workdir, microbatches=microbatches, clip_norm=0.1))
    for key in ("loss", "eval_loss", "accuracy", "grad_norm"):
        one, four = (runs.column(tmp_path / str(microbatches), key) for microbatches in (1, 4))
        assert len(one) == 4
        assert four == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
def test_offloading_gives_the_same_losses(text, tmp_path):
    for on in (False, True):
        offload = lomo_jax.Offload(params=on, activations=on, state=on)
        workdir = tmp_path / str(on)
        loop.train(_config(text, workdir, offload=offload, steps=3, prompt="the", prompt_tokens=3))
    for key in ("loss", "eval_loss", "accuracy"):
        here, there = (runs.column(tmp_path / str(on), key) for on in (False, True))
        assert there == pytest.approx(here, rel=1e-5)
    # A run that loads the export straight into host memory starts with the same loss.
    config = _config(
        text,
        tmp_path / "again",
        model=ModelConfig(str(tmp_path / "True" / "export")),
        offload=lomo_jax.Offload(params=True),
        steps=1,
    )
    loop.train(config)
    first = runs.column(tmp_path / "again", "eval_loss")[0]
    assert first == pytest.approx(runs.column(tmp_path / "True", "eval_loss")[3], rel=1e-6)


@pytest.mark.slow
def test_float16_learns_with_a_loss_scale_and_stochastic_rounding(text, tmp_path):
    config = _config(
        text, tmp_path, param_dtype="float16", dynamic_loss_scale=True, rounding="stochastic"
    )
    loop.train(config)
    losses = runs.column(tmp_path, "eval_loss")
    assert losses[12] < losses[0]


def test_stdout_shows_the_memory_of_the_step(finished):
    (line,) = (line for line in finished.output.splitlines() if line.startswith("memory"))
    number = r"\d+\.\d"
    parts = "weights N, optimizer state N, layer inputs N, other temporaries N"
    pattern = f"memory    N GiB planned for the step: {parts}".replace("N", number)
    assert re.fullmatch(pattern, line)


def test_without_a_terminal_stdout_gets_plain_lines(finished):
    lines = finished.output.splitlines()
    assert [line[:9].rstrip() for line in lines if line[:9].strip()] == [
        *("model", "dataset", "step", "memory", "held out", "sample"),
        *("step 1", "step 4", "held out", "sample", "step 8", "held out", "sample"),
        *("step 12", "held out", "sample", "exported"),
    ]
    assert sum(line.startswith("sample    the cat") for line in lines) == 4
    assert "\x1b" not in finished.output


@pytest.fixture
def export(tmp_path) -> dict[str, bytes]:
    """The files of an earlier export in the workdir, by name."""
    config = models.DecoderConfig(32, 8, 8, 1, 1, 1, 8)
    models.save(tmp_path / "export", *models.init(config, 0))
    return {path.name: path.read_bytes() for path in (tmp_path / "export").iterdir()}


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (9, r"^loss is (nan|inf) at step [23]: .*$"),
        (1, r"^held-out loss is (nan|inf) at step 1: .*$"),
    ],
)
def test_a_nonfinite_loss_stops_the_run(text, tmp_path, export, steps, message):
    config = _config(
        text, tmp_path, optimizer="sgd", learning_rate=1e30, schedule="constant", steps=steps
    )
    with pytest.raises(NonFiniteError, match=message):
        loop.train(config)
    aside = tmp_path / "earlier-1" / "export"
    assert {path.name: path.read_bytes() for path in aside.iterdir()} == export
    assert not (tmp_path / "export").exists()
    assert 1 in runs.column(tmp_path, "loss")


def test_nonfinite_parameters_are_never_saved(text, tmp_path):
    config = _config(text, tmp_path, optimizer="sgd", learning_rate=1e20, schedule="constant")
    config.param_dtype = "float16"  # overflows above 65504
    with pytest.raises(NonFiniteError, match=r"^a parameter .* is not finite after step 1: "):
        loop.train(dataclasses.replace(config, checkpoint_every=1))
    assert not list((tmp_path / "checkpoints").iterdir())


def test_too_many_skipped_steps_stop_the_run(text, tmp_path):
    config = _config(text, tmp_path, optimizer="sgd", learning_rate=1e30, schedule="constant")
    message = "^gradient is not finite at step 5, after 3 steps in a row were skipped: "
    with pytest.raises(NonFiniteError, match=message):
        loop.train(dataclasses.replace(config, skip_nonfinite=3, log_every=1))
    assert list(runs.column(tmp_path, "skipped").values())[-1] == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sequence_length": 65}, "sequence_length: 65 is longer than the model allows, 64 tokens"),
        ({"data": DataConfig("missing.txt")}, "missing.txt does not exist"),
        ({"data": DataConfig("package://no_such_package/x")}, "'no_such_package' is not installed"),
        ({"model": ModelConfig("missing")}, "missing does not exist"),
        ({"workdir": f"{__file__}/runs"}, "workdir: '.*' cannot be written: Not a directory"),
        (
            {
                "model": ModelConfig(
                    init="random",
                    architecture=models.DecoderConfig(200, 8, 8, 1, 1, 1, 8, max_length=64),
                )
            },
            r"text.jsonl:\d+ has the token 2\d\d \(.*\), but the model only 200 tokens, from 0",
        ),
    ],
)
def test_a_run_that_cannot_start_raises_a_one_line_error(text, tmp_path, changes, message):
    with pytest.raises(UserError, match=f"^[^\n]*{message}[^\n]*$"):
        loop.train(_config(text, tmp_path, **changes))
    assert not (tmp_path / "metrics.jsonl").exists()


def test_lomo_without_clipping_gets_a_warning(text, tmp_path):
    """docs/learning.md has runs in which it destroyed the model."""
    base = LoraConfig(rank=1, base="lomo")
    config = _config(text, tmp_path, optimizer="adamw", lora=base, steps=1, eval_every=0)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        loop.train(config)
    assert "set clip_norm=1.0" in output.getvalue()
    for fields, warns in (
        ({"optimizer": "lomo"}, True),
        ({"optimizer": "lomo", "clip_norm": 1.0}, False),
        ({"optimizer": "lomo", "optimizer_kwargs": {"clip_value": 0.1}}, False),
        ({"optimizer": "adalomo"}, False),
    ):
        assert bool(warnings(_config(text, tmp_path, **fields))) == warns


def test_adamw_that_rounds_bfloat16_to_nearest_gets_a_warning(text, tmp_path):
    """docs/learning.md has runs in which the model learns less."""
    adamw = {"optimizer": "adamw", "param_dtype": "bfloat16"}
    [message] = warnings(_config(text, tmp_path, **adamw))
    assert message.endswith("set rounding=stochastic")
    for fields in (
        adamw | {"rounding": "stochastic"},
        adamw | {"param_dtype": "float32"},
        adamw | {"optimizer": "adalomo"},
        adamw | {"lora": LoraConfig(rank=2)},  # its adapters are in float32
    ):
        assert not warnings(_config(text, tmp_path, **fields))


def test_muon_learns(text, tmp_path):
    """It multiplies weights that the trainer's mesh shards; a warning would be an error here."""
    config = _config(text, tmp_path, optimizer="muon", learning_rate=0.03, eval_every=12)
    loop.train(config)
    before, *_, after = runs.column(tmp_path, "eval_loss").values()
    assert after < 0.9 * before


@pytest.mark.filterwarnings("ignore:Specifying a key will be required")
@pytest.mark.filterwarnings("ignore:`optimistic_adam` is deprecated")
@pytest.mark.parametrize("name", [before_release(name) for name in sorted(optimizers())])
def test_every_optimizer_of_optax_trains_or_gets_one_line(text, tmp_path, name):
    # On two busy cores, XLA's collectives between eight CPU devices sometimes lock up.
    mesh = MeshConfig(fsdp=2)
    config = _config(text, tmp_path, optimizer=name, mesh=mesh, batch_size=8, eval_every=0)
    refusal = None
    try:
        loop.train(dataclasses.replace(config, learning_rate=1e-3, steps=2))
    except UserError as error:
        refusal = str(error)
    if refusal is None:
        assert np.isfinite(list(runs.column(tmp_path, "loss").values())).all()
    else:
        assert re.fullmatch("optimizer.*", refusal)


@pytest.mark.parametrize(
    ("usable_gib", "remat"), [(1000.0, "products"), (1e-6, "full"), before_release(None, "full")]
)
def test_remat_auto_recomputes_as_little_as_the_device_allows(
    text, tmp_path, monkeypatch, usable_gib, remat
):
    monkeypatch.setattr(planning, "_usable_gib", lambda: usable_gib)  # a CPU does not say
    config = _config(text, tmp_path, remat="auto", steps=1, eval_every=0)
    with contextlib.redirect_stdout(io.StringIO()) as output:
        loop.train(config)
    assert f"adalomo, remat={remat}, compiled in" in output.getvalue()
