"""`models.save` replaces only an unchanged export, and replaces it completely or not at all."""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.numpy
from small_models import CONFIG, TIED, graphdef_of, random_params, word_tokenizer

from lomo_jax import models
from lomo_jax.errors import UserError

MANIFEST = "lomo_jax_export.json"
WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    path = tmp_path_factory.mktemp("made") / "export"
    models.save(
        path,
        graphdef_of(CONFIG),
        random_params(CONFIG),
        tokenizer=word_tokenizer(),
        card="# A card",
    )
    return path


@pytest.fixture
def export(made, tmp_path):
    return shutil.copytree(made, tmp_path / "export")


@pytest.fixture
def other_params():
    return random_params(CONFIG, 1)


def contents(path):
    return {
        file.relative_to(path).as_posix(): file.read_bytes()
        for file in path.rglob("*")
        if file.is_file()
    }


class BrokenTokenizer:
    chat_template = None

    def save_pretrained(self, path):
        (Path(path) / "tokenizer.json").write_text("{}")
        raise OSError("disk full")


def test_an_export_lists_its_files(export):
    manifest = json.loads((export / MANIFEST).read_text())
    files = contents(export)
    del files[MANIFEST]
    assert manifest["files"] == {
        name: {"size": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in files.items()
    }
    assert files.keys() >= {"README.md", "config.json", "tokenizer.json", WEIGHTS}


def test_a_save_replaces_every_file_of_the_earlier_export(export, other_params):
    models.save(export, graphdef_of(CONFIG), other_params, max_shard_bytes=8192)
    names = set(contents(export))
    assert names.isdisjoint({"README.md", "tokenizer.json", WEIGHTS})
    assert "model.safetensors.index.json" in names
    assert set(json.loads((export / MANIFEST).read_text())["files"]) == names - {MANIFEST}
    models.save(export, graphdef_of(CONFIG), other_params)
    assert set(contents(export)) == {"config.json", "generation_config.json", WEIGHTS, MANIFEST}
    assert list(export.parent.iterdir()) == [export]


@pytest.mark.parametrize("is_empty", [False, True])
def test_a_new_or_empty_folder_is_filled(tmp_path, other_params, is_empty):
    path = tmp_path / "a" / "b"
    if is_empty:
        path.mkdir(parents=True)
    models.save(path, graphdef_of(CONFIG), other_params)
    assert models.load_config(path) == CONFIG


def test_a_link_to_a_folder_is_followed(export, other_params):
    link = export.parent / "link"
    link.symlink_to(export)
    models.save(link, graphdef_of(TIED), random_params(TIED))
    assert link.is_symlink()
    assert models.load_config(export) == TIED


def test_another_model_is_not_replaced(tmp_path, other_params):
    """Another program wrote the model; its files have the names of an export."""
    path = tmp_path / "model"
    path.mkdir()
    (path / "config.json").write_text("{}")
    (path / "README.md").write_text("# Years of work")
    safetensors.numpy.save_file({}, path / WEIGHTS)
    before = contents(path)
    message = rf"model exists and is not an export of lomo_jax \(it has no {MANIFEST}\); choose"
    for attempt in (
        lambda: models.check_save_path(path),
        lambda: models.save(path, graphdef_of(CONFIG), other_params),
    ):
        with pytest.raises(UserError, match=message):
            attempt()
    assert contents(path) == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_is_not_replaced(tmp_path, other_params):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="file exists and is not an export of lomo_jax"):
        models.save(tmp_path / "file", graphdef_of(CONFIG), other_params)


@pytest.mark.parametrize("name", ["README.md", WEIGHTS, "config.json", "tokenizer.json"])
def test_a_changed_file_of_an_export_is_not_replaced(export, other_params, name):
    content = bytearray((export / name).read_bytes())
    content[-1] ^= 1  # the size is unchanged
    (export / name).write_bytes(content)
    before = contents(export)
    with pytest.raises(UserError, match=rf"export/{name} was changed after its export and would"):
        models.save(export, graphdef_of(CONFIG), other_params)
    assert contents(export) == before


def test_an_export_with_a_deleted_file_can_be_replaced(export, other_params):
    (export / "README.md").unlink()
    models.save(export, graphdef_of(CONFIG), other_params)
    assert models.load_config(export) == CONFIG


FOREIGN = [
    "vocab_thesis.tex",
    "tokenizer_training_data/corpus.txt",
    "model-00009-of-00009.safetensors",
    "notes/.hidden",
]


def test_user_files_in_an_export_stay(export, other_params):
    for name in FOREIGN:
        (export / name).parent.mkdir(exist_ok=True)
        (export / name).write_text(f"years of work: {name}")
    (export / "link").symlink_to("nowhere")
    (export / "empty").mkdir()
    inodes = [(export / name).stat().st_ino for name in FOREIGN]
    for _ in range(2):
        models.save(export, graphdef_of(CONFIG), other_params)
        assert [(export / name).read_text() for name in FOREIGN] == [
            f"years of work: {name}" for name in FOREIGN
        ]
    assert [(export / name).stat().st_ino for name in FOREIGN] == inodes
    assert (export / "link").is_symlink()
    assert (export / "empty").is_dir()
    assert not (export / "tokenizer.json").exists()
    assert list(export.parent.iterdir()) == [export]


def test_a_user_file_in_a_subfolder_of_the_export_stays(tmp_path, other_params):
    """A tokenizer with several chat templates saves them in a subfolder."""

    class Tokenizer:
        chat_template = None

        def save_pretrained(self, path):
            folder = Path(path) / "additional_chat_templates"
            folder.mkdir()
            (folder / "tool_use.jinja").write_text("ours")

    path = tmp_path / "export"
    models.save(path, graphdef_of(CONFIG), other_params, tokenizer=Tokenizer())
    (path / "additional_chat_templates" / "mine.jinja").write_text("mine")
    models.save(path, graphdef_of(CONFIG), other_params)
    assert [file.name for file in (path / "additional_chat_templates").iterdir()] == ["mine.jinja"]


def test_a_user_file_is_not_replaced_by_a_new_file_of_the_export(tmp_path, other_params):
    path = tmp_path / "export"
    models.save(path, graphdef_of(CONFIG), other_params)
    (path / "tokenizer.json").write_text("mine")
    before = contents(path)
    with pytest.raises(UserError, match=r"export/tokenizer\.json is not part of the earlier expor"):
        models.save(path, graphdef_of(CONFIG), other_params, tokenizer=word_tokenizer())
    assert contents(path) == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize(
    "manifest",
    [
        *("{", "[]", '{"format": 2}', '{"format": 1, "files": {"../x": {}}}'),
        *('{"format": 1, "files": []}', '{"format": 1, "files": {"config.json": 3}}'),
        '{"format": 1, "files": {"config.json": {"size": "3", "sha256": ""}}}',
    ],
)
def test_a_damaged_manifest_is_reported(export, other_params, manifest):
    (export / MANIFEST).write_text(manifest)
    before = contents(export)
    with pytest.raises(UserError, match=MANIFEST) as caught:
        models.save(export, graphdef_of(CONFIG), other_params)
    assert "\n" not in str(caught.value)
    assert contents(export) == before


def test_a_failed_save_leaves_the_earlier_export(export, other_params):
    (export / "thesis.tex").write_text("mine")
    before = contents(export)
    with pytest.raises(OSError, match="disk full"):
        models.save(export, graphdef_of(CONFIG), other_params, tokenizer=BrokenTokenizer())
    assert contents(export) == before
    assert list(export.parent.iterdir()) == [export]


def test_of_two_exports_to_one_place_the_second_is_refused(export, other_params):
    class Tokenizer:
        """Starts a second export inside the first one."""

        chat_template = None

        def save_pretrained(self, path):
            with pytest.raises(
                UserError, match=f"another program is writing an export to {export}"
            ):
                models.save(export, graphdef_of(CONFIG), other_params, card="# The second one")

    models.save(
        export, graphdef_of(CONFIG), other_params, tokenizer=Tokenizer(), card="# The first one"
    )
    assert (export / "README.md").read_text() == "# The first one"
    assert list(export.parent.iterdir()) == [export]
    models.save(export, graphdef_of(CONFIG), other_params, card="# The third one")
    assert (export / "README.md").read_text() == "# The third one"


def test_exports_of_many_processes_to_one_place(tmp_path):
    """One at least wins and is whole; each of the others wins too or says why not."""
    script = """
import sys
from small_models import CONFIG, graphdef_of, random_params
from lomo_jax import models
from lomo_jax.errors import UserError
params = random_params(CONFIG)
print("ready", flush=True)
sys.stdin.readline()
for _ in range(20):
    try:
        models.save(sys.argv[1], graphdef_of(CONFIG), params)
        print("won")
    except UserError as error:
        print(error)
"""
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    path = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path)}
    command = [sys.executable, "-c", script, str(tmp_path / "out")]
    running = [subprocess.Popen(command, **pipes, env=environment) for _ in range(3)]
    for process in running:
        assert process.stdout.readline() == "ready\n"
    for process in running:
        process.stdin.write("\n")
        process.stdin.flush()
    lines = [line for process in running for line in process.communicate()[0].splitlines()]
    assert [process.returncode for process in running] == [0, 0, 0]
    assert len(lines) == 60
    lost = f"another program is writing an export to {tmp_path / 'out'}; wait for it"
    assert "won" in lines
    assert all(line == "won" or line.startswith(lost) for line in lines)
    assert models.load_config(tmp_path / "out") == CONFIG
    models.check_save_path(tmp_path / "out")
    assert list(tmp_path.iterdir()) == [tmp_path / "out"]


@pytest.mark.parametrize("killed", ["before the swap", "in the swap", "after the swap"])
def test_a_killed_save_loses_nothing(made, export, other_params, killed):
    """The next save, even if it fails, completes or undoes the swap."""
    (export / "thesis.tex").write_text("mine")
    aside = export.parent / ".export.writing"
    aside.mkdir()
    expected = contents(export)
    if killed != "before the swap":
        export.rename(aside / "old")
    if killed == "after the swap":
        models.save(export, graphdef_of(CONFIG), other_params, card="# The new one")
        # This save removed the folder of the killed one.
        expected = contents(export)
        shutil.copytree(made, aside / "old")
        (aside / "old" / "notes.txt").write_text("mine")
        expected["notes.txt"] = b"mine"
    else:
        shutil.copytree(made, aside / "new")
    with pytest.raises(OSError, match="disk full"):
        models.save(export, graphdef_of(CONFIG), other_params, tokenizer=BrokenTokenizer())
    assert contents(export) == expected
    assert list(export.parent.iterdir()) == [export]


def test_files_have_the_usual_permissions(made, tmp_path):
    """Whoever can read other files of this user can read an export."""
    (tmp_path / "usual").touch()
    usual = (tmp_path / "usual").stat().st_mode
    assert {file.name for file in made.iterdir() if file.stat().st_mode != usual} == set()
