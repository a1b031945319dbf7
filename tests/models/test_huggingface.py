import copy
import dataclasses
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from small_models import CONFIG, TIED, graphdef_of, random_params, word_tokenizer

from lomo_jax import models
from lomo_jax.errors import UserError

WEIGHTS = "model.safetensors"
Q0 = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def export(tmp_path):
    path = tmp_path / "export"
    models.save(path, graphdef_of(CONFIG), random_params(CONFIG, 0))
    return path


def rewrite(path, change):
    """Applies `change` to the dict of tensors of an export."""
    tensors = safetensors.numpy.load_file(path / WEIGHTS)
    change(tensors)
    safetensors.numpy.save_file(tensors, path / WEIGHTS, metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16, jnp.float16])
@pytest.mark.parametrize("config", [CONFIG, TIED])
def test_saved_weights_load_bit_for_bit(tmp_path, config, dtype):
    params = random_params(config, 0, dtype)
    models.save(tmp_path / "export", graphdef_of(config), params)
    graphdef, loaded = models.load(tmp_path / "export", dtype)
    assert nnx.merge(graphdef, loaded).config == config
    chex.assert_trees_all_equal(loaded, params)
    assert json.loads((tmp_path / "export/config.json").read_text())["torch_dtype"] == (
        jnp.dtype(dtype).name
    )


def test_weights_are_cast_on_saving_and_on_loading(tmp_path):
    params = random_params(CONFIG, 0)
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)
    models.save(tmp_path / "float32", graphdef_of(CONFIG), params)
    chex.assert_trees_all_equal(models.load(tmp_path / "float32", jnp.bfloat16)[1], rounded)
    models.save(tmp_path / "bfloat16", graphdef_of(CONFIG), params, dtype=jnp.bfloat16)
    chex.assert_trees_all_equal(models.load(tmp_path / "bfloat16", jnp.bfloat16)[1], rounded)


@pytest.mark.parametrize("with_index", [True, False])
def test_a_large_model_is_sharded(tmp_path, with_index):
    params = random_params(CONFIG, 0)
    models.save(tmp_path / "export", graphdef_of(CONFIG), params, max_shard_bytes=4096)
    files = sorted((tmp_path / "export").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05}.safetensors"
    assert all(file.stat().st_size < 4096 + 2048 for file in files)  # tensors and header
    index = tmp_path / "export/model.safetensors.index.json"
    total = sum(x.nbytes for x in jax.tree.leaves(params))
    assert json.loads(index.read_text())["metadata"]["total_size"] == total
    if not with_index:
        index.unlink()
    chex.assert_trees_all_equal(models.load(tmp_path / "export")[1], params)


def test_a_copied_output_head_and_old_rotary_tensors_are_skipped(tmp_path):
    params = random_params(TIED, 0)
    models.save(tmp_path / "export", graphdef_of(TIED), params)

    def add(tensors):
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.ones(2, np.float32)

    rewrite(tmp_path / "export", add)
    chex.assert_trees_all_equal(models.load(tmp_path / "export")[1], params)


def test_missing_files_are_named(export, tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist; give a model"):
        models.load(tmp_path / "nowhere")
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match=r"notes\.txt is no model; give a model directory"):
        models.load(tmp_path / "notes.txt")
    (export / WEIGHTS).unlink()
    with pytest.raises(UserError, match=r"export has no \.safetensors file"):
        models.load(export)
    (export / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json is missing"):
        models.load(export)


def test_a_missing_shard_is_named(tmp_path):
    models.save(
        tmp_path / "export", graphdef_of(CONFIG), random_params(CONFIG, 0), max_shard_bytes=4096
    )
    next(iter((tmp_path / "export").glob("model-00002-*"))).unlink()
    with pytest.raises(UserError, match=r"model-00002-of-.* is missing, but .*index"):
        models.load(tmp_path / "export")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "the key 'weight_map' is missing"),
        ('{"weight_map": ["model.safetensors"]}', "weight_map=.* must be an object"),
        ('{"weight_map": {"a": 1}}', r"weight_map\.a=1 must be the name of a \.safetensors file"),
        (
            '{"weight_map": {"a": "../other/x.safetensors"}}',
            "must be the name .* in the same folder",
        ),
        ('{"weight_map": {"a": "/other/x.safetensors"}}', "must be the name .* in the same folder"),
        ('{"weight_map": {"a\\nb": "x.bin"}}', r"weight_map\['a.nb'\]='x\.bin' must be the name"),
        ('{"weight_map": {"a": "b\\nc.safetensors"}}', r"weight_map\.a='b.nc\.safetensors'"),
        (f'{{"weight_map": {{"{"a" * 2000}": 1}}}}', r"weight_map\['a{59}\.\.\.\]=1 must be"),
        ("[" * 200_000, "is nested too deeply"),
        ('{"a": ' * 40 + "1" + "}" * 40, "is nested too deeply"),
    ],
)
def test_an_unusable_index_is_one_line(tmp_path, content, message):
    models.save(
        tmp_path / "export", graphdef_of(CONFIG), random_params(CONFIG), max_shard_bytes=4096
    )
    (tmp_path / "export/model.safetensors.index.json").write_text(content)
    with pytest.raises(UserError, match=rf"index\.json.*{message}") as caught:
        models.load(tmp_path / "export")
    assert "\n" not in str(caught.value)


def test_an_index_reads_no_other_folder(tmp_path):
    """The weights outside would load: the error comes before anything is read."""
    models.save(tmp_path / "other", graphdef_of(CONFIG), random_params(CONFIG))
    folder = tmp_path / "model"
    folder.mkdir()
    shutil.copy(tmp_path / "other/config.json", folder)
    names = safetensors.numpy.load_file(tmp_path / "other" / WEIGHTS)
    index = {"weight_map": dict.fromkeys(names, f"../other/{WEIGHTS}")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(UserError, match="in the same folder"):
        models.load(folder)


def test_a_tensor_that_is_there_twice_is_an_error(tmp_path):
    params = random_params(CONFIG, 0)
    models.save(tmp_path / "export", graphdef_of(CONFIG), params, max_shard_bytes=4096)
    first, second, *_ = sorted((tmp_path / "export").glob("*.safetensors"))
    name, tensor = next(iter(safetensors.numpy.load_file(first).items()))
    tensors = {**safetensors.numpy.load_file(second), name: tensor + 1}
    safetensors.numpy.save_file(tensors, second)
    with pytest.raises(UserError, match=f"{second.name}: the tensor {name} is in {first.name} too"):
        models.load(tmp_path / "export")


def test_a_config_with_more_layers_than_tensors_is_refused_at_once(export):
    config = json.loads((export / "config.json").read_text())
    (export / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 10_000}))
    with pytest.raises(UserError, match="has 30 tensors, too few for 10000 layers"):
        models.load(export)


@pytest.mark.parametrize("name", ["config.json", WEIGHTS, "tokenizer.json", "chat_template.jinja"])
def test_a_pipe_in_place_of_a_file_does_not_block(export, name):
    word_tokenizer().save_pretrained(export)
    (export / name).unlink(missing_ok=True)
    os.mkfifo(export / name)
    for read in (models.load, models.load_config, models.tokenizer):
        with pytest.raises(UserError, match=rf"{name} is not a regular file|has no tokenizer"):
            read(export)


TOKENIZER_FAULTS = [
    ("tokenizer.json", "", "is not JSON: Expecting value"),
    ("tokenizer.json", {}, "the key 'model' is missing"),
    ("tokenizer.json", {"model": {"vocab": {"a": -1}}, "added_tokens": []}, r"model\.vocab\.a=-1 "),
    ("tokenizer.json", {"model": {"vocab": 1}, "added_tokens": []}, r"model\.vocab=1 must be"),
    ("tokenizer.json", {"model": {}, "added_tokens": [{"id": 1}]}, "added_tokens.*content' is mis"),
    ("tokenizer.json", {"model": {}, "added_tokens": []}, "the tokenizer cannot be read"),
    (
        "tokenizer.json",
        {"model": {"type": "WordLevel", "vocab": {"a": 0}, "unk_token": "b"}, "added_tokens": []},
        r"cannot be read \(WordLevel error: Missing \[UNK\]",
    ),
    ("tokenizer_config.json", [1], "is not a JSON object"),
    ("tokenizer_config.json", {"tokenizer_class": 1}, "tokenizer_class=1 must be a string"),
    ("tokenizer_config.json", {"model_max_length": "x"}, "model_max_length='x' must be a number"),
    ("tokenizer_config.json", {"unk_token": {"a": 1}}, r"key 'unk_token\.content' is missing"),
    ("tokenizer_config.json", {"chat_template": [1]}, r"chat_template\[0\]=1 must be an object"),
    ("tokenizer_config.json", {"added_tokens_decoder": {"x": {}}}, "the key 'x' must be a token"),
    (
        "tokenizer_config.json",
        {"padding_side": "up"},
        "padding_side='up' must be 'left' or 'right'",
    ),
    ("tokenizer_config.json", {"self": 1}, "the tokenizer cannot be read"),
    ("special_tokens_map.json", {"unk_token": 1}, "unk_token=1 must be a string"),
    ("added_tokens.json", {"a": "b"}, "a='b' must be an integer"),
]


@pytest.mark.parametrize(("name", "content", "message"), TOKENIZER_FAULTS)
def test_a_fault_in_a_tokenizer_is_one_line(export, name, content, message):
    word_tokenizer().save_pretrained(export)
    (export / name).write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(UserError, match=message) as caught:
        models.tokenizer(export)
    assert str(caught.value).startswith(str(export))
    assert "cannot be read" in message or name in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("num_bytes", [0, 4, 100, 2000, -1])
def test_truncated_weights_are_reported(export, num_bytes):
    content = (export / WEIGHTS).read_bytes()
    (export / WEIGHTS).write_bytes(content[:num_bytes])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or not .*again"):
        models.load(export)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(Q0), f"lacks the tensor {Q0}; download"),
        (
            lambda t: (t.pop(Q0), t.pop("model.norm.weight")),
            f"lacks the tensor {Q0} and 1 more; download",
        ),
        (
            lambda t: t.update({"model.layers.3.mlp.up_proj.weight": np.ones(1, np.float32)}),
            r"has the tensor model\.layers\.3\.mlp\.up_proj\.weight, which a model of this",
        ),
        (
            lambda t: t.update({Q0: np.ones((16, 8), np.float32)}),
            rf"the tensor {Q0} has shape \[16, 8\], expected \[16, 16\]",
        ),
        (
            lambda t: t.update({Q0: np.ones((16, 16), np.int8)}),
            rf"the tensor {Q0} is stored as I8; supported: F32, BF16, F16",
        ),
    ],
)
def test_wrong_tensors_are_named(export, change, message):
    rewrite(export, change)
    with pytest.raises(UserError, match=message) as caught:
        models.load(export)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"architectures": ["MambaForCausalLM"]}', "json: architecture MambaForCausalLM is not"),
        ("{", r"config\.json is not JSON"),
        ('"llama"', r"config\.json is not a JSON object"),
    ],
)
def test_an_unusable_config_is_named(export, content, message):
    (export / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        models.load(export)


PEAK_OF_LOADING = """
import sys
import jax.numpy as jnp
from lomo_jax import models
from lomo_jax.errors import UserError

def status(field):
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))

models.load(sys.argv[1], jnp.bfloat16)  # imports modules and compiles
before = status("VmRSS")
_, params = models.load(sys.argv[2], jnp.bfloat16)
print(status("VmHWM") - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads peak memory from /proc")
def test_loading_needs_memory_for_one_copy_of_the_model(tmp_path):
    def saved(name, width, num_layers):
        config = dataclasses.replace(
            CONFIG, width=width, mlp_width=4 * width, num_layers=num_layers, head_dim=width // 4
        )
        _, params = models.abstract(config, jnp.bfloat16)
        params = jax.tree.map(lambda x: np.ones(x.shape, x.dtype), params)
        models.save(tmp_path / name, graphdef_of(config), params)
        return tmp_path / name, sum(x.nbytes for x in jax.tree.leaves(params))

    warm_up, _ = saved("small", 64, 24)
    large, model_bytes = saved("large", 512, 24)
    output = subprocess.run(
        [sys.executable, "-c", PEAK_OF_LOADING, warm_up, large],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    # The largest tensor is 1 % of the model. A second copy would give 2, one in float32 3.
    assert 0.95 < int(output) / model_bytes < 1.3


def saved_by_transformers(folder, **changes):
    """Writes config.json, generation_config.json and weights as transformers does, for `TIED`."""
    params = random_params(TIED)
    models.save(folder, graphdef_of(TIED), params)
    hf_config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(hf_config))
    return params


def test_a_stored_head_that_differs_unties_the_model(tmp_path):
    saved_by_transformers(tmp_path / "model")
    head = np.random.default_rng(5).normal(size=(31, 16)).astype(np.float32)
    rewrite(tmp_path / "model", lambda tensors: tensors.update({"lm_head.weight": head}))
    with pytest.warns(UserWarning, match="the stored head differs; they are untied"):
        graphdef, params = models.load(tmp_path / "model")
    model = nnx.merge(graphdef, params)
    np.testing.assert_array_equal(model.head(), head.T)
    models.save(tmp_path / "out", graphdef, params)
    assert not json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    chex.assert_trees_all_equal(models.load(tmp_path / "out")[1], params)


def test_a_head_alone_is_the_embedding_of_a_tied_model(tmp_path):
    params = saved_by_transformers(tmp_path / "model")

    def rename(tensors):
        tensors["lm_head.weight"] = tensors.pop("model.embed_tokens.weight")

    rewrite(tmp_path / "model", rename)
    chex.assert_trees_all_equal(models.load(tmp_path / "model")[1], params)


def test_old_names_and_harmless_extras(tmp_path):
    old = {"architectures": ["LLaMAForCausalLM"], "hidden_act": "swish"}
    params = saved_by_transformers(tmp_path / "model", **old)

    def add(tensors):
        tensors["model.layers.0.self_attn.rotary_emb.cos_cached"] = np.ones(2, np.float32)
        tensors["model.layers.0.self_attn.bias"] = np.ones((2, 2), bool)
        tensors["score.weight"] = np.ones((2, 16), np.float32)

    rewrite(tmp_path / "model", add)
    with pytest.warns(UserWarning, match=r"score\.weight belong to no part of the decoder"):
        _, loaded = models.load(tmp_path / "model")
    chex.assert_trees_all_equal(loaded, params)


def test_a_model_without_a_head_has_no_prefix(tmp_path):
    params = saved_by_transformers(tmp_path / "model")

    def strip(tensors):
        for name in list(tensors):
            tensors[name.removeprefix("model.")] = tensors.pop(name)

    rewrite(tmp_path / "model", strip)
    chex.assert_trees_all_equal(models.load(tmp_path / "model")[1], params)


def test_an_export_carries_what_stands_beside_the_weights(tmp_path):
    folder = tmp_path / "model"
    own = {"pad_token_id": 3, "our_field": {"deep": [1, 2]}, "transformers_version": "4.1"}
    saved_by_transformers(folder, **own)
    generation = {"eos_token_id": [1, 2], "temperature": 0.6, "do_sample": True, "pad_token_id": 3}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    (folder / "LICENSE.txt").write_text("Do as you like.")
    (folder / "chat_template.jinja").write_text("{{ messages }}")
    word_tokenizer().save_pretrained(folder)
    models.save(tmp_path / "out", *models.load(folder), dtype=jnp.bfloat16)
    for name in ("generation_config.json", "LICENSE.txt", "chat_template.jinja", "tokenizer.json"):
        assert (tmp_path / "out" / name).read_bytes() == (folder / name).read_bytes()
    before, after = (
        json.loads((f / "config.json").read_text()) for f in (folder, tmp_path / "out")
    )
    assert after == before | {"torch_dtype": "bfloat16"}
    assert not (tmp_path / "out" / "README.md").exists()


def test_an_export_has_the_chat_template_of_the_tokenizer(tmp_path):
    folder, tokenizer = tmp_path / "model", copy.copy(word_tokenizer())
    saved_by_transformers(folder)
    tokenizer.chat_template = "{{ messages }}"
    tokenizer.save_pretrained(folder)
    changed = models.tokenizer(folder)
    changed.chat_template = "another {{ messages }}"
    models.save(tmp_path / "out", *models.load(folder), tokenizer=changed)
    assert models.tokenizer(tmp_path / "out").chat_template == "another {{ messages }}"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        (["config.json", "pytorch_model.bin"], r"\.bin files, which can run code.*python -c"),
        (["params.json", "consolidated.00.pth"], r"Meta's format \(params\.json\)"),
        (["adapter_config.json", "adapter_model.safetensors"], "holds an adapter, not a model"),
    ],
)
def test_other_formats_are_one_line(export, tmp_path, files, message):
    folder = tmp_path / "other"
    folder.mkdir()
    for name in files:
        content = (export / name).read_bytes() if (export / name).exists() else b"{}"
        (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        models.load(folder)
    assert "\n" not in str(caught.value)
