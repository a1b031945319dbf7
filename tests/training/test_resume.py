"""Resuming a run, starting from another run, and the files that a run writes."""

import dataclasses
import json
import shutil
import struct
from pathlib import Path

import jax
import pytest
import runs
from helpers import before_release

import lomo_jax
from lomo_jax import models
from lomo_jax.errors import CheckpointError, ConfigError, UserError
from lomo_jax.training import Config, DataConfig, ModelConfig, loop, resume, to_dict
from lomo_jax.training.checkpoint import Checkpoints, read_params
from lomo_jax.training.config import set_fields
from lomo_jax.training.model import find_run
from lomo_jax.training.resume import IDENTITY_FIELDS
from lomo_jax.training.validation import leaves

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


@pytest.fixture(scope="module")
def made(text, tmp_path_factory):
    """The workdir of a run of six steps from a model folder, with checkpoints 3 and 6."""
    folder = tmp_path_factory.mktemp("made")
    loop.train(runs.make_config(text, folder / "model", steps=1))
    config = _config(text, folder / "run", folder / "model" / "export")
    loop.train(config)
    shutil.rmtree(folder / "model")  # a resumed run does not need it
    return folder / "run"


def _config(text, workdir, model, **changes):
    fields = {
        **{"steps": 6, "checkpoint_every": 3, "keep_checkpoints": 2, "eval_every": 3},
        **{"model": ModelConfig(str(model)), "schedule": "constant", "optimizer": "adamw"},
    }
    return runs.make_config(text, workdir, **fields | changes)


@pytest.fixture
def again(text, made, tmp_path):
    """Copies the run, and returns a function from changes to the config of the copy."""
    shutil.copytree(made, tmp_path / "run")

    def config(**changes):
        model = made.parent / "model" / "export"
        return dataclasses.replace(_config(text, tmp_path / "run", model), **changes)

    return config


def _lines(text: str, label: str) -> list[str]:
    return [line[10:] for line in text.splitlines() if line.startswith(f"{label:<9} ")]


def test_a_finished_run_is_exported_again(again, made, tmp_path, capsys):
    shutil.rmtree(tmp_path / "run" / "export")
    before = runs.records(tmp_path / "run")
    loop.train(again())
    assert _lines(capsys.readouterr().out, "resumed") == ["after step 6 of 6"]
    *kept, resumed = runs.records(tmp_path / "run")
    assert kept == before
    assert (resumed["step"], resumed["resumed"]) == (6, True)
    runs.assert_same_run(tmp_path / "run", made)


def test_a_changed_export_is_refused_before_the_training(again, tmp_path):
    (tmp_path / "run" / "export" / "README.md").write_text("notes")
    with pytest.raises(UserError, match=r"export/README\.md was changed after its export"):
        loop.train(again(steps=7))
    assert 7 not in runs.column(tmp_path / "run", "loss")


def test_changes_of_other_fields_are_allowed_and_logged(again, tmp_path, capsys):
    loop.train(again(steps=7, learning_rate=1e-3, microbatches=2, rounding="stochastic"))
    assert _lines(capsys.readouterr().out, "changed") == [
        "learning_rate: 0.03 until step 6, now 0.001",
        "microbatches: 1 until step 6, now 2",
        "rounding: 'nearest' until step 6, now 'stochastic'",
        "steps: 6 until step 6, now 7",
    ]
    assert runs.column(tmp_path / "run", "learning_rate")[7] == pytest.approx(1e-3)
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == 7


@pytest.mark.slow
def test_skip_nonfinite_may_be_switched_on_in_a_resumed_run(again, tmp_path):
    loop.train(again(steps=7, dynamic_loss_scale=True))
    assert runs.column(tmp_path / "run", "loss_scale") == {7: 2.0**16}
    loop.train(again(steps=8, skip_nonfinite=2))
    plain = again(steps=8, workdir=str(tmp_path / "plain"))
    shutil.copytree(tmp_path / "run" / "checkpoints", tmp_path / "plain" / "checkpoints")
    shutil.rmtree(tmp_path / "plain" / "checkpoints" / "8")
    shutil.copytree(tmp_path / "run" / "model", tmp_path / "plain" / "model")
    loop.train(plain)
    skipping, plain = (runs.column(tmp_path / name, "loss") for name in ("run", "plain"))
    assert skipping[8] == pytest.approx(plain[8], rel=1e-6)


# Another value for each field in IDENTITY_FIELDS.
_ANOTHER = {
    "optimizer": "lomo",
    "optimizer_kwargs": {"b1": 0.5},
    "decay_mask": "all",
    "lora.rank": 3,
    "lora.alpha": 3.0,
    "lora.targets": "q",
    "lora.rank_stabilized": True,
    "lora.quantize": "int8",
    "lora.base": "lomo",
    "lora.base_kwargs": {"clip_value": 1.0},
    "param_dtype": "bfloat16",
    "seed": 1,
    "batch_size": 8,
    "sequence_length": 16,
    "data.eval_fraction": 0.2,
    "data.eval_documents": 3,
    "data.packing": False,
    "data.too_long": "leave_out",
    "data.repeated": "keep",
    "model.path": "elsewhere",
    "model.init": "checkpoint",
    **{
        f"model.architecture.{name}": value
        for name, value in {
            **{"vocab_size": 258, "width": 64, "mlp_width": 32, "num_layers": 3, "num_heads": 2},
            **{"num_kv_heads": 4, "head_dim": 16, "max_length": 128, "rope_theta": 5e5},
            **{"norm_eps": 1e-5, "tie_embeddings": True, "bos_id": 1, "eos_id": 2},
            "rope_scaling": models.RopeScaling("llama3", 8.0, 64),
            **{"family": "qwen3", "activation": "gelu", "norm_places": "after", "qk_norm": "head"},
            **dict.fromkeys(("gated_mlp", "normalize_experts", "norm_scale"), False),
            **dict.fromkeys(("attention_bias", "output_bias", "mlp_bias", "norm_bias"), True),
            **dict.fromkeys(("parallel", "layer_norm"), True),
            **dict.fromkeys(("sliding_layers", "rope_layers"), (True, False)),
            **dict.fromkeys(("window", "rotary_dim", "num_experts", "experts_per_token"), 4),
            **dict.fromkeys(("router_loss", "norm_offset", "query_growth"), 0.5),
            **dict.fromkeys(("local_rope_theta", "attention_scale", "attention_cap"), 0.5),
            "logit_cap": 0.5,
            **{f"{name}_multiplier": 2.0 for name in ("embedding", "residual", "logit")},
        }.items()
    },
}


def test_all_identity_fields_are_tested():
    fields = {name for name, _, _ in leaves(Config())}
    identity = {
        name
        for name in fields
        if any(name == own or name.startswith(f"{own}.") for own in IDENTITY_FIELDS)
    }
    assert set(_ANOTHER) == identity


@pytest.mark.parametrize("name", _ANOTHER)
def test_another_value_of_an_identity_field_is_refused(text, name):
    experts = {"model.architecture.num_experts": 8, "model.architecture.experts_per_token": 2}
    config = set_fields(runs.make_config(text, Path("workdir")), experts)
    changed = set_fields(config, {name: _ANOTHER[name]})
    resume.check_same_run(to_dict(config), to_dict(config))
    with pytest.raises(ConfigError, match=rf"^{name}: .*, but the checkpoint in 'workdir' is of a"):
        resume.check_same_run(to_dict(config), to_dict(changed))


def test_a_config_of_another_run_is_refused(again):
    with pytest.raises(ConfigError, match=r"^seed: 1, but the checkpoint in .* is of a run with 0"):
        loop.train(again(seed=1))


@pytest.mark.parametrize("kind", [str, lambda path: (str(path),)])
def test_the_dataset_may_move_but_not_change(again, text, tmp_path, kind):
    moved = shutil.copy(text, tmp_path / "moved.jsonl")
    loop.train(again(steps=7, data=DataConfig(kind(moved), eval_fraction=0.1)))
    runs.write_text(moved, documents=61)
    with pytest.raises(ConfigError, match="has changed since the checkpoint"):
        loop.train(again(steps=8, data=DataConfig(kind(moved), eval_fraction=0.1)))


def test_a_run_that_ended_before_its_first_checkpoint_leaves_no_model(text, tmp_path):
    config = runs.make_config(text, tmp_path / "run", steps=1)
    loop.train(config)
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    shutil.rmtree(tmp_path / "run" / "export")
    template = tmp_path / "run" / "model" / "chat_template.jinja"  # another tokenizer had one
    template.write_text("{{ messages }}")
    loop.train(config)
    assert not template.exists()
    loop.train(dataclasses.replace(config, steps=2))


def test_a_folder_named_like_a_checkpoint_is_no_run(made, tmp_path):
    (tmp_path / "checkpoints" / "500").mkdir(parents=True)
    assert find_run(str(tmp_path / "checkpoints" / "500")) is None
    assert find_run(str(made / "checkpoints" / "6")) == (made, 6)


def test_resume_set_to_never_moves_the_earlier_run_aside(again, text, made, tmp_path, capsys):
    loop.train(runs.make_config(text, tmp_path / "run", resume="never", steps=1))
    assert "to earlier-1" in capsys.readouterr().out
    runs.assert_same_run(tmp_path / "run" / "earlier-1", made)
    assert runs.last_step(tmp_path / "run") == 1
    # The earlier run resumes in its new folder.
    aside = dataclasses.replace(again(), workdir=str(tmp_path / "run" / "earlier-1"), steps=7)
    loop.train(aside)
    assert runs.last_step(tmp_path / "run" / "earlier-1") == 7


@pytest.mark.parametrize("renamings", [4, before_release(1)])
def test_a_kill_while_moving_an_earlier_run_aside_loses_nothing(
    again, text, made, tmp_path, monkeypatch, renamings
):
    rename, left = Path.rename, iter(range(renamings))

    def rename_until_killed(path, target):
        if path.parent == tmp_path / "run" and next(left, None) is None:
            raise SystemExit
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", rename_until_killed)
    with pytest.raises(SystemExit):
        loop.train(runs.make_config(text, tmp_path / "run", resume="never", steps=1))
    monkeypatch.undo()
    loop.train(runs.make_config(text, tmp_path / "run", steps=1))
    assert runs.last_step(tmp_path / "run") == 1
    runs.assert_same_run(tmp_path / "run" / "earlier-1", made)
    names = {path.name for path in made.iterdir()} - {".lock"}
    assert {path.name for path in (tmp_path / "run" / "earlier-1").iterdir()} == names
    assert {path.name for path in (tmp_path / "run").iterdir()} == names | {".lock", "earlier-1"}


def test_a_checkpoint_removed_during_the_read(again, made, tmp_path, monkeypatch):
    """A run that is still training removes it; the checkpoint that remains is read."""
    folder, metadata = tmp_path / "run" / "checkpoints", Checkpoints.metadata
    _, params = models.load(made / "export")

    def metadata_of_the_last(checkpoints, step):
        found = metadata(checkpoints, step)
        shutil.rmtree(folder / "6", ignore_errors=True)
        return found

    monkeypatch.setattr(Checkpoints, "metadata", metadata_of_the_last)
    _, found = read_params(tmp_path / "run", None, params)
    assert found.progress.step == 3
    with pytest.raises(CheckpointError, match="has no checkpoint of step 6: there is 3"):
        read_params(tmp_path / "run", 6, params)


@pytest.mark.parametrize(("place", "step"), [("", 6), ("checkpoints/6", 6), ("checkpoints/3", 3)])
def test_a_run_may_start_from_a_checkpoint(text, made, tmp_path, place, step):
    config = _config(text, tmp_path, made / place, steps=1, optimizer="lomo")
    loop.train(config)
    first = runs.column(tmp_path, "eval_loss")[0]
    assert first == pytest.approx(runs.column(made, "eval_loss")[step], rel=1e-6)


@pytest.mark.slow
def test_a_run_may_start_from_a_checkpoint_in_another_dtype(text, made, tmp_path):
    loop.train(_config(text, tmp_path, made, steps=1, param_dtype="bfloat16"))
    first = runs.column(tmp_path, "eval_loss")[0]
    assert first == pytest.approx(runs.column(made, "eval_loss")[6], rel=1e-2)


@pytest.mark.slow
def test_offloading_may_be_switched_on_and_off(again, made, text, tmp_path):
    """A run that offloads for some steps equals a run without offloading.

    Both round differently, and this small model doubles a difference several times in each step.
    """
    offload = lomo_jax.Offload(params=True, state=True)
    loop.train(again(steps=8, offload=offload))
    loop.train(again(steps=10))
    shutil.copytree(made, tmp_path / "plain")
    loop.train(dataclasses.replace(again(steps=10), workdir=str(tmp_path / "plain")))
    found, expected = (runs.column(tmp_path / name, "loss") for name in ("run", "plain"))
    assert found == pytest.approx(expected, rel=1e-5)


def test_checkpoint_minutes_saves_at_the_next_step(text, tmp_path):
    options = {"checkpoint_every": 0, "checkpoint_minutes": 1e-6, "keep_best": False}
    config = runs.make_config(text, tmp_path, steps=3, log_every=50, **options)
    loop.train(dataclasses.replace(config, keep_checkpoints=9))
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"1", "2", "3"}


def test_contents_of_run_info_log_and_model_card(made):
    run = json.loads((made / "run.json").read_text())
    size = sum(leaf.size for leaf in runs.weights(made).values())
    assert (run["parameters"], run["device"], run["devices"]) == (size, "cpu", 1)
    assert run["memory"]["total_gib"] > run["memory"]["weights_gib"] > 0
    log = (made / "log.txt").read_text()
    for words in (f"{size:,} parameters", "step 6", "held out", "exported"):
        assert words in log
    config = models.load_config(made / "export")
    assert config.width == 32
    card = (made / "export" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert "| steps | 6 of 6, 768 tokens |" in card


def test_tensorboard_has_the_losses(made):
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in (made / "tensorboard").iterdir():
        content = path.read_bytes()
        while content:
            (size,) = struct.unpack("<Q", content[:8])
            event = Event.FromString(content[12 : 12 + size])
            content = content[16 + size :]
            found |= {(v.tag, event.step): v.simple_value for v in event.summary.value}
    for name in ("loss", "learning_rate", "eval_loss"):
        for step, value in runs.column(made, name).items():
            assert found[name, step] == pytest.approx(value, rel=1e-6)


def test_the_loop_makes_no_implicit_transfers(text, tmp_path, monkeypatch):
    make_steps = loop._make_steps

    def guarded(*args):
        with jax.transfer_guard("disallow"):
            return make_steps(*args)

    monkeypatch.setattr(loop, "_make_steps", guarded)
    loop.train(runs.make_config(text, tmp_path))
    assert runs.last_step(tmp_path) == 12


@pytest.mark.slow
def test_weights_and_biases_continues_its_run_after_a_resume(text, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    for steps in (2, 4):
        loop.train(runs.make_config(text, tmp_path, steps=steps, wandb="lomo_jax"))
    offline = list((tmp_path / "wandb").glob("offline-run-*"))
    assert len({path.name.rpartition("-")[2] for path in offline}) == 1
    assert len(offline) == 2


def test_the_files_in_the_workdir(made):
    assert {path.name for path in Path(made).iterdir()} == {
        *(".lock", "checkpoints", "config.json", "export", "log.txt", "metrics.jsonl", "model"),
        *("run.json", "tensorboard"),
    }
