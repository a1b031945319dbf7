"""Configs and command lines: parsing, validation, and one-line errors."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import jax.numpy as jnp
import pytest

from lomo_jax import Offload
from lomo_jax.errors import ConfigError
from lomo_jax.models import DecoderConfig, RopeScaling
from lomo_jax.training import Config, DataConfig, LoraConfig, ModelConfig
from lomo_jax.training.config import to_dict
from lomo_jax.training.config_reader import parse, read_config, shipped_configs
from lomo_jax.training.validation import validate

_FILE = """
from lomo_jax.models import DecoderConfig
from lomo_jax.training import Config, DataConfig, ModelConfig

def get_config():
    config = Config(
        model=ModelConfig(path="model"), data=DataConfig(path="text"), optimizer="adamw",
        optimizer_kwargs={"b1": 0.8}, steps=50,
    )
    BODY
    return config
"""


@pytest.fixture
def config_file(tmp_path: Path):
    """Writes a config file with `body` as a line of `get_config()`."""

    def write(body: str = "") -> str:
        path = tmp_path / "config.py"
        path.write_text(_FILE.replace("BODY", body))
        return str(path)

    return write


def _valid(**changes) -> Config:
    fields = {"model": ModelConfig(path="model"), "data": DataConfig(path="text")}
    return Config(**fields | changes)


def test_flags_set_nested_fields(config_file):
    config = parse(
        [
            "train.py",
            f"--config={config_file()}",
            "--config.model.init=random",
            "--config.model.architecture.num_layers=2",
            "--config.learning_rate=2",
            "--config.optimizer_kwargs={'b1': 0.7, 'nesterov': True}",
            "--config.eval_batches=3",
            "--noconfig.fused",
            "--config.workdir",
            "elsewhere",
        ]
    )
    assert config == Config(
        model=ModelConfig(path="model", init="random", architecture=config.model.architecture),
        data=DataConfig(path="text"),
        optimizer="adamw",
        optimizer_kwargs={"b1": 0.7, "nesterov": True},
        learning_rate=2.0,
        steps=50,
        eval_batches=3,
        fused=False,
        workdir="elsewhere",
    )
    assert config.model.architecture.num_layers == 2
    assert isinstance(config.learning_rate, float)


_OPTIONAL = {
    "model.path": "x",
    "data.path": "x",
    "data.validation_path": "x",
    "data.eval_documents": 3,
    "data.format": "chat",
    "data.template": "x",
    "epochs": 2.0,
    "clip_norm": 1.0,
    "lora.rank": 4,
    "lora.path": "x",
    "lora.base_schedule": "linear",
    "lora.base_warmup": 0.1,
    "eval_batches": 3,
    "eval_tasks": "boolq",
    "eval_data": "x",
    "wandb": "x",
    "model.architecture.rope_scaling": RopeScaling("llama3", 8.0, 8192),
    "model.architecture.rotary_dim": 64,
    "model.architecture.window": 4096,
    "model.architecture.local_rope_theta": 10000.0,
    "model.architecture.attention_scale": 0.1,
    "model.architecture.attention_cap": 50.0,
    "model.architecture.logit_cap": 30.0,
    "model.architecture.bos_id": 1,
    "model.architecture.eos_id": (1, 2),
}


def leaves(node, prefix=""):
    for name, value in vars(node).items():
        if dataclasses.is_dataclass(value) and not isinstance(value, RopeScaling):
            yield from leaves(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


def test_all_optional_fields_are_tested():
    default = dict(leaves(Config()))
    assert {name for name, value in default.items() if value is None} == set(_OPTIONAL)


@pytest.mark.parametrize("name", _OPTIONAL)
@pytest.mark.parametrize("form", ["--config.{}=None", "--config.{} None"])
def test_every_optional_field_can_be_set_to_none(tmp_path, name, form):
    config = Config(
        model=ModelConfig(
            path="x",
            architecture=DecoderConfig(
                **{
                    key.rpartition(".")[2]: value
                    for key, value in _OPTIONAL.items()
                    if key.startswith("model.architecture.")
                },
            ),
        ),
        data=DataConfig("x", validation_path="x", eval_documents=3, format="chat", template="x"),
        epochs=2.0,
        eval_tasks="boolq",
        eval_data="x",
        clip_norm=1.0,
        eval_batches=3,
        wandb="x",
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    flags = ["train.py", "--config", str(path), *form.format(name).split()]
    found = dict(leaves(parse(flags, for_plan=True)))
    assert found == _OPTIONAL | dict(leaves(config)) | {name: None}


def test_none_is_a_word_where_a_field_is_not_optional(config_file):
    config = parse(["train.py", "--config", config_file(), "--config.workdir=None"])
    assert config.workdir == "None"
    with pytest.raises(ConfigError, match=r"^steps: 'None' is not a whole number$"):
        parse(["train.py", "--config", config_file(), "--config.steps=None"])


def test_sizes_that_depend_on_each_other_can_be_set_together(config_file):
    sizes = {"num_heads": 6, "num_kv_heads": 3}  # not a multiple of LLaMA-7B's 32
    flags = [f"--config.model.architecture.{name}={value}" for name, value in sizes.items()]
    config = parse(["train.py", "--config", config_file(), *flags])
    assert config.model.architecture == DecoderConfig(**sizes)
    with pytest.raises(ConfigError, match=r"^model\.architecture: num_heads=6 must be a multiple"):
        parse(["train.py", "--config", config_file(), flags[0]])


def test_the_config_json_of_a_run_is_a_config(tmp_path):
    config = _valid(
        model=ModelConfig(
            path="model",
            architecture=DecoderConfig(
                rope_scaling=RopeScaling("llama3", 8.0, 8192), eos_id=(1, 2)
            ),
        ),
        optimizer="adamw",
        optimizer_kwargs={"b1": 0.5},
        offload=Offload(state=True),
        prompt="a 'b'\n",
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps(to_dict(config)))
    assert read_config(str(path)) == config
    path.write_text(json.dumps(to_dict(config) | {"stepz": 3}))
    with pytest.raises(ConfigError, match=r"^stepz: no such field; did you mean 'steps'\?$"):
        read_config(str(path))


def test_a_config_that_ships_with_the_package_is_found_by_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert read_config("llama7b") == read_config(str(shipped_configs() / "llama7b.py"))
    with pytest.raises(ConfigError, match=r"^--config: 'llama7' does not exist; did you mean 'll"):
        read_config("llama7")
    (tmp_path / "llama7b").write_text("")  # a file of that name takes precedence
    with pytest.raises(ConfigError, match=r"^--config llama7b: a config file ends in"):
        read_config("llama7b")


def test_a_config_may_have_an_argument(tmp_path):
    assert read_config("superglue:copa").eval_tasks == "data/superglue/copa/copa.jsonl"
    path = shipped_configs() / "superglue.py"
    assert read_config(f"{path}:copa:lora") == read_config("superglue:copa:lora")
    assert read_config("superglue:copa:lora").lora.rank == 2
    with pytest.raises(ConfigError, match="superglue:cope: give one of boolq, rte"):
        read_config("superglue:cope")
    with pytest.raises(ConfigError, match=r"llama7b.py: TypeError: get_config\(\) takes 0"):
        read_config("llama7b:boolq")


@pytest.mark.parametrize(
    ("flags", "value", "metric"),
    [
        ([], True, "loss"),
        (["--config.keep_best"], True, "loss"),
        (["--noconfig.keep_best"], False, "loss"),
        (["--config.keep_best=false"], False, "loss"),
        (["--config.keep_best=boolq_acc"], "boolq_acc", "boolq_acc"),
    ],
)
def test_the_best_checkpoint_by_any_metric(flags, value, metric):
    config = parse(["", "--config=quickstart", *flags])
    assert (config.keep_best, config.best_metric()) == (value, metric)


def test_epochs_set_the_steps_that_a_warmup_is_shorter_than():
    flags = ["", "--config=quickstart", "--config.warmup=5000"]
    with pytest.raises(ConfigError, match=r"^warmup: 5000 is 5000 of \d+ steps"):
        parse(flags)
    assert parse([*flags, "--config.epochs=3"]).warmup == 5000


def test_tasks_are_one_text_or_several():
    for text in ("boolq,piqa", "('boolq', 'piqa')"):
        config = parse(["", "--config=quickstart", f"--config.eval_tasks={text}"])
        assert config.task_names() == ("boolq", "piqa")
    assert parse(["", "--config=quickstart"]).task_names() == ()


def test_a_config_may_import_its_neighbours(tmp_path):
    for folder in ("one", "two"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "base.py").write_text(f"WORKDIR = {folder!r}")
        (tmp_path / folder / "own.py").write_text(
            "import base\nfrom lomo_jax.training import Config\n\n"
            "def get_config():\n    return Config(workdir=base.WORKDIR)\n"
        )
    before = list(sys.path)
    for folder in ("one", "two"):  # with the same names
        assert read_config(str(tmp_path / folder / "own.py")).workdir == folder
    assert sys.path == before


def test_print_config_prints_json_and_exits(config_file, capsys):
    with pytest.raises(SystemExit) as exit_info:
        parse(["train.py", "--config", config_file(), "--print_config", "--config.seed=7"])
    assert not exit_info.value.code
    printed = json.loads(capsys.readouterr().out)
    assert printed["seed"] == 7
    assert printed["optimizer_kwargs"] == {"b1": 0.8}
    assert printed["model"]["architecture"]["width"] == 4096


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--config.modle.init=random", "modle: no such field; did you mean 'model'?"),
        ("--config.model.initt=random", "model.initt: no such field; did you mean 'init'?"),
        ("--config.zzz=1", "zzz: no such field; the fields here are model, data, lora, optimizer,"),
        ("--config.steps.x=1", "steps.x: steps is a single value"),
        ("--config.optimizer_kwargs.b1=1", "optimizer_kwargs.b1: set the whole dictionary"),
        ("--config.steps=many", "steps: 'many' is not a whole number"),
        ("--config.steps=1.5", "steps: '1.5' is not a whole number"),
        ("--config.fused=maybe", "fused: 'maybe' is not true or false"),
        ("--config.optimizer_kwargs=3", "optimizer_kwargs: '3' is not a dictionary"),
        ("--config.model=3", "model: '3' is not a ModelConfig"),
        ("--config.model.path=", "model.path: '' is not allowed; it must be a directory, the id"),
        ("--config.data.path=", "data.path: '' is not allowed; it must be a file, a folder"),
        (
            "--config.data.path={'a': 'b'}",
            "data.path: {'a': 'b'} is not a dictionary of names and numbers or a list of text or",
        ),
        ("--config.data.path=(1, 2)", "data.path: (1, 2) is not a dictionary of names and numb"),
        ("--config.data.path={1: 2}", "data.path: {1: 2} is not a dictionary of names and numbers"),
        ("--config.data.path={'a': True}", "data.path: {'a': True} is not a dictionary of names"),
        ("--config.optimizer_kwargs={1: 2}", "optimizer_kwargs: {1: 2} is not a dictionary of na"),
        ("--config.lora.targets=(1,)", "lora.targets: (1,) is not a list of text or text"),
        ("--steps=3", "Unknown command line flag 'steps'"),
        ("steps=3", "steps=3: not a flag; set a field with --config.NAME=VALUE"),
    ],
)
def test_a_wrong_flag_gets_one_line(config_file, flags, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}[^\n]*$"):
        parse(["train.py", "--config", config_file(), flags])


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("config.warmpu = 3", "warmpu: no such field; did you mean 'warmup'?"),
        ("config.data.pth = 3", "data.pth: no such field; did you mean 'path'?"),
        ("Config(lerning_rate=3)", "Config.lerning_rate: no such field; did you mean 'learn"),
        ("raise FileNotFoundError('install it')", "config.py:10: FileNotFoundError: install it"),
        ("raise ValueError('install it')", "config.py:10: ValueError: install it"),
        ("raise ConfigError", "config.py:10: NameError: name 'ConfigError' is not defined"),
        ("a b", "config.py:10: SyntaxError: invalid syntax"),
        ("config = 3", "get_config() returned 3, not a Config"),
    ],
)
def test_a_wrong_config_file_gets_one_line(config_file, body, message):
    with pytest.raises(ConfigError, match=f"^[^\n]*{re.escape(message)}[^\n]*$"):
        parse(["train.py", "--config", config_file(body)])


@pytest.mark.parametrize("argv", [[], ["--config"], ["--config", "missing.py"]])
def test_a_missing_config_file_gets_one_line(argv):
    with pytest.raises(ConfigError, match=r"^--config\b[^\n]*$"):
        parse(["train.py", *argv])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": ModelConfig()}, "model.path: missing; set --config.model.path"),
        ({"model": ModelConfig(path="x", init="rand")}, "model.init: 'rand' is not allowed"),
        ({"model": "x"}, "model: 'x' is not a ModelConfig"),
        ({"data": DataConfig()}, "data.path: missing; set --config.data.path"),
        ({"data": DataConfig("text", eval_fraction=1.0)}, "data.eval_fraction: 1.0 is not"),
        ({"learning_rate": -1.0}, "learning_rate: -1.0 is not allowed"),
        ({"learning_rate": float("nan")}, "learning_rate: nan is not allowed"),
        ({"learning_rate": "1e-3"}, "learning_rate: '1e-3' is not a number"),
        ({"steps": True}, "steps: True is not a whole number"),
        ({"eval_batches": 0}, "eval_batches: 0 is not allowed"),
        ({"eval_batches": "all"}, "eval_batches: 'all' is not a whole number or None"),
        ({"microbatches": 3}, "microbatches: 3 does not divide batch_size=8"),
        ({"microbatches": 0}, "microbatches: 0 is not allowed"),
        ({"clip_norm": 0.0}, "clip_norm: 0.0 is not allowed"),
        (
            {"rounding": "up"},
            "rounding: 'up' is not allowed; it must be one of nearest, stochastic",
        ),
        ({"remat": "some"}, "remat: 'some' is not allowed; it must be one of full, "),
        ({"attention": "flash"}, "attention: 'flash' is not allowed; it must be one of auto, xla,"),
        ({"offload": True}, "offload: True is not a Offload"),
        ({"offload": Offload(params=1)}, "offload.params: 1 is not true or false"),
        ({"fused": False, "remat": "none"}, "remat: 'none' is an option of the fused step; with "),
        (
            {"fused": False, "offload": Offload(state=True)},
            "offload.state: True is an option of the fused step; with fused=False it must be False",
        ),
        ({"param_dtype": "bf16"}, "param_dtype: 'bf16' is not allowed; it must be one of float32,"),
        ({"schedule": "cosin"}, "schedule: 'cosin' is not one of constant, linear, cosine; did"),
        ({"warmup": 2.5}, "warmup: 2.5 is not allowed"),
        ({"warmup": 1000.0}, "warmup: 1000 is 1000 of 1000 steps, it must be shorter"),
        ({"optimizer": "adamv"}, "optimizer: 'adamv' is not adalomo, lomo or an optimizer of"),
        (
            {"optimizer_kwargs": {"weight_decy": 1.0}},
            "optimizer_kwargs: adalomo takes no 'weight_decy'; did you mean 'weight_decay'?",
        ),
        (
            {"optimizer": "adamw", "optimizer_kwargs": {"mu_dtype": jnp.bfloat16}},
            "optimizer_kwargs: mu_dtype=<class 'jax.numpy.bfloat16'> cannot be saved with a ",
        ),
        (
            {"decay_mask": "("},
            "decay_mask: '(' is not allowed; it must be matrices, all or a",
        ),
        ({"lora": LoraConfig(rank=0)}, "lora.rank: 0 is not allowed; it must be 1 or more"),
        ({"lora": LoraConfig(alpha=8.0)}, "lora.alpha: 8.0 needs adapters: set --config.lora.rank"),
        (
            {"lora": LoraConfig(rank=2, targets=("q", "gat"))},
            "lora.targets: 'gat' is not all and not one of q, k, v, o, gate, up, down; did you",
        ),
        (
            {"lora": LoraConfig(rank=2, base="adalomo", quantize="nf4")},
            "lora.base: 'adalomo' cannot train a quantised base, lora.quantize='nf4'; set",
        ),
        (
            {"lora": LoraConfig(rank=2, quantize="nf3")},
            "lora.quantize: 'nf3' is not allowed; it must be one of none, int8, nf4",
        ),
        ({"lora": LoraConfig(rank=2, base="lom")}, "lora.base: 'lom' is not adalomo, lomo or an"),
        (
            {"lora": LoraConfig(rank=2, base="lomo", base_kwargs={"clip": 1.0})},
            "lora.base_kwargs: lomo takes no 'clip'",
        ),
        (
            {"prompt": "caf\udce9"},
            r"prompt: 'caf\udce9' is not allowed; it must be text in UTF-8",
        ),
        (
            {"optimizer_kwargs": {"weight_decay": -1.0}},
            "optimizer_kwargs: adalomo refuses {'weight_decay': -1.0}: weight_decay",
        ),
    ],
)
def test_a_wrong_value_gets_one_line(changes, message):
    with pytest.raises(ConfigError, match=f"^{re.escape(message)}[^\n]*$"):
        validate(_valid(**changes))


def test_weights_and_biases_needs_its_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    message = "^wandb: 'mine' needs a package that is not installed: pip install wandb$"
    with pytest.raises(ConfigError, match=message):
        validate(_valid(wandb="mine"))


def test_a_compatible_type_is_accepted():
    validate(_valid(learning_rate=1, warmup=0, optimizer_kwargs={"weight_decay": 0.1}))


def test_a_plan_needs_neither_checkpoint_nor_dataset():
    validate(Config(), for_plan=True)
    with pytest.raises(ConfigError, match="microbatches: 3 does not divide"):
        validate(Config(microbatches=3), for_plan=True)


def test_to_dict_has_every_field():
    found = to_dict(_valid())
    assert dict(leaves(_valid())).keys() == dict(_flat(found)).keys()
    assert found["data"]["path"] == "text"


def _flat(node, prefix=""):
    for name, value in node.items():
        if isinstance(value, dict) and name not in ("optimizer_kwargs", "base_kwargs"):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield prefix + name, value


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("a.jsonl", "a.jsonl"),
        ("1,2", "1,2"),
        ("['a.jsonl', 'b,c.txt']", ("a.jsonl", "b,c.txt")),
        ("{'a': 0.7, 'b:test': 1}", {"a": 0.7, "b:test": 1}),
    ],
)
def test_a_path_is_one_several_or_several_with_weights(config_file, tmp_path, text, value):
    config = parse(["train.py", "--config", config_file(), f"--config.data.path={text}"])
    assert config.data.path == value
    saved = tmp_path / "saved.json"
    saved.write_text(json.dumps(to_dict(config)))
    assert parse(["train.py", "--config", str(saved)]) == config


def test_a_config_may_give_paths_as_a_list():
    assert DataConfig(["a", "b"]).path == ("a", "b")
