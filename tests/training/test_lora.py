"""Runs with adapters: alone on a frozen base, or beside a base that LOMO trains."""

import dataclasses
import json
import shutil

import chex
import jax
import numpy as np
import pytest
import runs
from flax import nnx
from safetensors.numpy import load_file, save_file

from lomo_jax import lora, models, peft_files
from lomo_jax.errors import ConfigError, UserError
from lomo_jax.training import LoraConfig, MeshConfig, ModelConfig, export, loop
from lomo_jax.training.checkpoint import Checkpoints
from lomo_jax.training.config import set_fields

pytestmark = pytest.mark.usefixtures("mixed_dtypes")


def _config(text, workdir, base_model=None, *, base="frozen", **changes):
    fields = {
        "lora": LoraConfig(rank=2, targets=("q", "v"), base=base, base_learning_rate=0.1),
        **{"optimizer": "adamw", "learning_rate": 1e-2, "schedule": "linear", "steps": 6},
        **{"checkpoint_every": 3, "keep_checkpoints": 2, "eval_every": 3},
    }
    if base_model is not None:
        fields["model"] = ModelConfig(str(base_model))
    return runs.make_config(text, workdir, **fields | changes)


@pytest.fixture(scope="module")
def base(text, tmp_path_factory):
    """The folder of a model."""
    folder = tmp_path_factory.mktemp("base")
    loop.train(runs.make_config(text, folder / "run", steps=2))
    return folder / "run" / "export"


@pytest.fixture(scope="module")
def frozen(text, base, tmp_path_factory):
    """The workdir of a run on a frozen base."""
    workdir = tmp_path_factory.mktemp("frozen") / "run"
    loop.train(_config(text, workdir, base))
    return workdir


@pytest.fixture(scope="module")
def beside_lomo(text, base, tmp_path_factory):
    """The workdir of a run with a base that LOMO trains."""
    workdir = tmp_path_factory.mktemp("lomo") / "run"
    loop.train(_config(text, workdir, base, base="lomo"))
    return workdir


def _logits(folder):
    graphdef, params = models.load(folder)
    return nnx.merge(graphdef, params)(np.arange(40).reshape(2, 20))


def _names(workdir):
    config = models.load_config(workdir / "model")
    graphdef, shapes = lora.abstract(*models.abstract(config), lora.LoRA(2, 16, ("q", "v")))
    with Checkpoints(workdir / "checkpoints", read_only=True) as checkpoints:
        return checkpoints.metadata(6), graphdef, shapes


def test_a_checkpoint_of_a_frozen_base_holds_the_adapters_alone(frozen, beside_lomo):
    metadata, _, shapes = _names(frozen)
    assert len(metadata.checksums["params"]) == 4
    assert len(metadata.base) == len(jax.tree.leaves(shapes)) - 4
    sizes = [
        sum(file.stat().st_size for file in (run / "checkpoints" / "6").rglob("*"))
        for run in (frozen, beside_lomo)
    ]
    assert sizes[1] - sizes[0] > 100_000  # the model has 35,000 parameters of 4 bytes


def test_a_run_is_learning(frozen, beside_lomo):
    for workdir in (frozen, beside_lomo):
        losses = runs.column(workdir, "eval_loss")
        assert losses[6] < losses[0]


def test_the_export_of_a_frozen_base_is_for_peft(frozen, base):
    assert {path.name for path in (frozen / "export").iterdir()} == {
        *("README.md", "adapter_config.json", "adapter_model.safetensors", "lomo_jax_export.json")
    }
    config = json.loads((frozen / "export" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == str(base)
    assert config["target_modules"] == ["q_proj", "v_proj"]
    assert "library_name: peft" in (frozen / "export" / "README.md").read_text()
    names = load_file(frozen / "export" / "adapter_model.safetensors")
    assert len(names) == 2 * 2 * 2  # layers, targets, matrices


def test_merging(frozen, base, tmp_path, capsys):
    assert export.main(["export", str(frozen), str(tmp_path / "out"), "--merge"]) == 0
    assert "exported  step 6" in capsys.readouterr().out
    config = models.load_config(base)
    adapters, trained = peft_files.load(frozen / "export", config)
    graphdef, params = models.load(base)
    graphdef, _ = lora.abstract(graphdef, params, adapters)
    model = nnx.merge(graphdef, nnx.merge_state(trained, params))
    expected = model(np.arange(40).reshape(2, 20))
    chex.assert_trees_all_close(_logits(tmp_path / "out"), expected, rtol=1e-4, atol=1e-5)
    assert np.abs(_logits(base) - expected).max() > 1e-3


def test_a_trained_base_is_exported_whole(beside_lomo, base):
    assert (beside_lomo / "export" / "model.safetensors").is_file()
    before, after = (load_file(f / "model.safetensors") for f in (base, beside_lomo / "export"))
    assert before.keys() == after.keys()
    assert all(not np.array_equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("kind", ["frozen", "lomo"])
def test_a_stopped_run_resumes_bit_for_bit(kind, frozen, beside_lomo, text, base, tmp_path):
    expected = {"frozen": frozen, "lomo": beside_lomo}[kind]
    config = _config(text, tmp_path / "run", base, base=kind)
    loop.train(config)
    for name in ("export", "checkpoints/6"):
        shutil.rmtree(tmp_path / "run" / name)
    loop.train(config)
    metadata = [_names(workdir)[0] for workdir in (expected, tmp_path / "run")]
    assert metadata[0].checksums == metadata[1].checksums
    assert metadata[0].base == metadata[1].base


def test_adapters_to_start_from(frozen, text, base, tmp_path):
    config = set_fields(
        _config(text, tmp_path / "run", base, steps=1), {"lora.path": str(frozen / "export")}
    )
    loop.train(config)
    found, expected = (runs.column(w, "eval_loss") for w in (tmp_path / "run", frozen))
    assert found[0] == pytest.approx(expected[6], rel=1e-6)
    with pytest.raises(ConfigError, match=r"^lora.path: .*of rank 2, alpha 16 and .* on q, v; set"):
        loop.train(set_fields(config, {"lora.rank": 3, "workdir": str(tmp_path / "other")}))


def test_four_devices_as_one(frozen, text, base, tmp_path):
    mesh = MeshConfig(data=2, fsdp=2)
    loop.train(_config(text, tmp_path / "run", base, mesh=mesh))
    found, expected = (runs.column(w, "eval_loss") for w in (tmp_path / "run", frozen))
    assert found == pytest.approx(expected, rel=1e-4)


def test_dropout(frozen, text, base, tmp_path):
    config = set_fields(_config(text, tmp_path / "run", base), {"lora.dropout": 0.5})
    loop.train(config)
    assert runs.column(tmp_path / "run", "loss")[6] != runs.column(frozen, "loss")[6]
    adapter_config = json.loads((tmp_path / "run/export/adapter_config.json").read_text())
    assert adapter_config["lora_dropout"] == 0.5
    # An evaluation drops nothing.
    fields = {"lora.path": str(tmp_path / "run" / "export")}
    loop.train(set_fields(_config(text, tmp_path / "again", base, steps=1), fields))
    found, expected = (runs.column(tmp_path / name, "eval_loss") for name in ("again", "run"))
    assert found[0] == pytest.approx(expected[6], rel=1e-6)
    # A resumed run drops the same inputs, and so do four devices.
    before = _names(tmp_path / "run")[0]
    for name in ("export", "checkpoints/6"):
        shutil.rmtree(tmp_path / "run" / name)
    loop.train(config)
    assert _names(tmp_path / "run")[0].checksums == before.checksums
    mesh = MeshConfig(data=2, fsdp=2)
    loop.train(set_fields(config, {"workdir": str(tmp_path / "four"), "mesh": mesh}))
    found = runs.column(tmp_path / "four", "eval_loss")
    assert found == pytest.approx(expected, rel=1e-4)


def test_another_base_is_refused(text, base, tmp_path, capsys):
    shutil.copytree(base, tmp_path / "base")
    config = _config(text, tmp_path / "run", tmp_path / "base", steps=1)
    loop.train(config)
    weights = load_file(base / "model.safetensors")
    weights["model.norm.weight"] += 1
    save_file(weights, tmp_path / "base" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ConfigError, match="are not those that the run started from"):
        loop.train(set_fields(config, {"steps": 2}))
    assert export.main(["export", config.workdir, str(tmp_path / "out"), "--merge"]) == 1
    assert "are not those that the run started from" in capsys.readouterr().err
    shutil.rmtree(tmp_path / "base")
    assert export.main(["export", config.workdir, str(tmp_path / "out"), "--merge"]) == 1
    assert f"{tmp_path / 'base'} does not exist" in capsys.readouterr().err
    assert export.main(["export", config.workdir, str(tmp_path / "adapters")]) == 0


def test_a_base_in_four_bits(text, tmp_path):
    """The adapters of a quantised base go onto the original weights."""
    shape = dataclasses.replace(runs.make_config(text, "x").model.architecture, width=64)
    shape = dataclasses.replace(shape, mlp_width=128, head_dim=16)
    model = ModelConfig(init="random", architecture=shape)
    config = _config(text, tmp_path / "run", steps=6, model=model)
    config = set_fields(config, {"lora.quantize": "nf4", "lora.targets": ("q", "down")})
    loop.train(config)
    losses = runs.column(tmp_path / "run", "eval_loss")
    assert losses[6] < losses[0]
    found = {path: path.read_bytes() for path in (tmp_path / "run" / "export").glob("*.saf*")}
    for name in ("export", "checkpoints/6"):
        shutil.rmtree(tmp_path / "run" / name)
    loop.train(config)
    assert found == {path: path.read_bytes() for path in found}
    assert export.main(["export", config.workdir, str(tmp_path / "out"), "--merge"]) == 0
    params = models.init_layer_by_layer(shape, config.seed, "float32")
    adapters, trained = peft_files.load(tmp_path / "run" / "export", shape)
    graphdef, _ = lora.abstract(*models.abstract(shape), adapters)
    expected = nnx.merge(graphdef, nnx.merge_state(trained, params))(np.arange(20)[None])
    graphdef, params = models.load(tmp_path / "out")
    found = nnx.merge(graphdef, params)(np.arange(20)[None])
    chex.assert_trees_all_close(found, expected, rtol=1e-4, atol=1e-5)


def test_mistakes_are_one_line(frozen, text, tmp_path, capsys):
    whole = _config(text, tmp_path / "run", frozen)
    with pytest.raises(UserError, match="is a run with adapters; start from a whole model"):
        loop.train(whole)
    assert export.main(["export", str(frozen.parent), str(tmp_path / "out"), "--merge"]) == 1
    assert "is not the folder of a run" in capsys.readouterr().err
