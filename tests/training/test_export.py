"""`lomo-jax export`: exporting any checkpoint of a run as a Hugging Face directory."""

import json
import shutil

import jax
import numpy as np
import pytest
import runs
from huggingface_hub import ModelCard
from safetensors.numpy import load_file

from lomo_jax import models
from lomo_jax.training import export, loop


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The folder of a run with the checkpoints 4, 8 (the best) and 12."""
    folder = tmp_path_factory.mktemp("made")
    text = runs.write_text(folder / "text.jsonl")
    fields = {"keep_checkpoints": 3, "eval_every": 4, "learning_rate": 0.3, "schedule": "constant"}
    with jax.numpy_dtype_promotion("standard"):
        loop.train(runs.make_config(text, folder / "run", **fields))
    return folder / "run"


def _export(*arguments) -> int:
    return export.main(["lomo-jax export", *map(str, arguments)])


def test_exporting_the_last_checkpoint_equals_the_export_of_the_run(made, tmp_path, capsys):
    assert _export(made, tmp_path / "out") == 0
    assert capsys.readouterr().out == f"exported  step 12 of {made} to {tmp_path / 'out'}\n"
    of_run, files = made / "export", {path.name for path in (tmp_path / "out").iterdir()}
    assert files == {path.name for path in of_run.iterdir()}
    assert ModelCard.load(tmp_path / "out" / "README.md").data.tags == ["lomo_jax", "adalomo"]
    assert files >= {"README.md", "config.json", "generation_config.json", "tokenizer.json"}
    for name in files - {"model.safetensors"}:
        assert (tmp_path / "out" / name).read_text() == (of_run / name).read_text()
    found, expected = (
        load_file(folder / "model.safetensors") for folder in (tmp_path / "out", of_run)
    )
    assert found.keys() == expected.keys()
    for name, weight in expected.items():
        np.testing.assert_array_equal(found[name], weight)


def test_the_card_names_the_licence_of_the_original(made, tmp_path):
    original = tmp_path / "original"
    shutil.copytree(made / "export", original)
    licence = {"license": "other", "license_name": "ours", "license_link": "LICENSE"}
    lines = "".join(f"{key}: {value}\n" for key, value in licence.items())
    (original / "README.md").write_text(f"---\n{lines}tags: [theirs]\n---\n# Theirs\n")
    with jax.numpy_dtype_promotion("standard"):
        config = runs.make_config(made.parent / "text.jsonl", tmp_path / "run", steps=1)
        config.model.init, config.model.path = "checkpoint", str(original)
        loop.train(config)
    shutil.rmtree(original)
    assert _export(tmp_path / "run", tmp_path / "out") == 0
    for folder in (tmp_path / "run" / "export", tmp_path / "out"):
        data = ModelCard.load(folder / "README.md").data.to_dict()
        assert licence.items() <= data.items()
        assert data["tags"] == ["lomo_jax", "adalomo"]


def test_exporting_an_earlier_checkpoint(made, tmp_path):
    assert _export(made, tmp_path / "out", "--step", 4) == 0
    card = (tmp_path / "out" / "README.md").read_text()
    assert "| steps | 4 of 12, 512 tokens |" in card
    text = runs.column(made, "eval_loss")
    with jax.numpy_dtype_promotion("standard"):
        config = runs.make_config(made.parent / "text.jsonl", tmp_path / "again", steps=1)
        config.model.init, config.model.path = "checkpoint", str(tmp_path / "out")
        loop.train(config)
    assert runs.column(tmp_path / "again", "eval_loss")[0] == pytest.approx(text[4], rel=1e-6)


def test_exporting_the_best_checkpoint(made, tmp_path, capsys):
    losses = runs.column(made, "eval_loss")
    best = min((4, 8, 12), key=losses.get)
    assert _export(made, tmp_path / "out", "--step", "best") == 0
    assert f"step {best} " in capsys.readouterr().out


def test_large_exports_have_several_files(made, tmp_path):
    graphdef, params = models.load(made / "export")
    models.save(tmp_path / "out", graphdef, params, card="# A card", max_shard_bytes=50_000)
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) > 1
    assert (tmp_path / "out" / "README.md").read_text() == "# A card"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("{made}", "{tmp}/out", "--step=5"), "{made} has no checkpoint of step 5: there is 12, "),
        (("{tmp}", "{tmp}/out"), "{tmp} is not the folder of a run: it has no folder model"),
        (("{made}", "{tmp}"), "{tmp} exists and is not an export of lomo_jax (it has no"),
        (("{made}", "{made}"), "{made} would replace files of the run in {made}; choose another"),
        (("{made}", "{made}/model"), "{made}/model would replace files of the run in {made}; "),
        (
            ("{made}", "{made}/checkpoints/5"),
            "{made}/checkpoints/5 would replace files of the run ",
        ),
        (("{made}", "{tmp}/out", "--step=\u00b2"), "--step: '\u00b2' must be a number or best"),
        (("{made}",), "the following arguments are required: OUT; lomo-jax export --help shows"),
        (("{made}", "{tmp}/out", "--ste=4"), "unrecognized arguments: --ste=4; lomo-jax export"),
    ],
)
def test_a_mistake_gets_one_line(made, tmp_path, capsys, arguments, message):
    (tmp_path / "file").touch()
    names, before = {"made": made, "tmp": tmp_path}, sorted(made.rglob("*"))
    assert _export(*(argument.format(**names) for argument in arguments)) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.format(**names)}")
    assert error.count("\n") == 1
    assert sorted(made.rglob("*")) == before


def test_the_export_of_the_run_may_be_replaced(made, tmp_path):
    shutil.copytree(made, tmp_path / "run")
    assert _export(tmp_path / "run", tmp_path / "run" / "export", "--step=4") == 0
    assert "| steps | 4 of 12" in (tmp_path / "run" / "export" / "README.md").read_text()


def test_another_model_is_not_replaced(made, tmp_path, capsys):
    """The command refuses before it reads the checkpoint."""
    shutil.copytree(made / "export", tmp_path / "model")
    (tmp_path / "model" / "lomo_jax_export.json").unlink()
    before = {path: path.read_bytes() for path in (tmp_path / "model").iterdir()}
    assert _export(made, tmp_path / "model") == 1
    error = capsys.readouterr().err
    assert error.startswith(f"error: {tmp_path}/model exists and is not an export of lomo_jax")
    assert error.count("\n") == 1
    assert {path: path.read_bytes() for path in (tmp_path / "model").iterdir()} == before
