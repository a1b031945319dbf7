"""Runs on conversations, with epochs, and on several sources."""

import dataclasses
import json
import math

import pytest
import runs

from lomo_jax.errors import ConfigError
from lomo_jax.training import DataConfig, loop

pytestmark = pytest.mark.usefixtures("mixed_dtypes")

TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> DataConfig:
    """Sixty questions with an answer, and a template in a file."""
    folder = tmp_path_factory.mktemp("chats")
    records = [
        {
            "messages": [
                {"role": "user", "content": f"{n}+1"},
                {"role": "assistant", "content": str(n + 1)},
            ]
        }
        for n in range(60)
    ]
    (folder / "chats.jsonl").write_text("\n".join(map(json.dumps, records)))
    (folder / "template.jinja").write_text(TEMPLATE)
    path, template = folder / "chats.jsonl", folder / "template.jinja"
    return DataConfig(str(path), eval_fraction=0.2, template=str(template))


def test_epochs_set_the_steps(chats, tmp_path, capsys):
    data = dataclasses.replace(chats, packing=False)
    config = runs.make_config("", tmp_path / "run", data=data, epochs=1.5)
    loop.train(config)
    rows = 60 - 12
    steps = math.ceil(1.5 * rows / config.batch_size)
    assert runs.last_step(tmp_path / "run") == steps
    assert json.loads((tmp_path / "run" / "config.json").read_text())["steps"] == steps
    out = capsys.readouterr().out
    assert "60 examples" in out
    loop.train(dataclasses.replace(config, epochs=None, steps=steps, workdir=f"{tmp_path}/same"))
    runs.assert_same_run(tmp_path / "run", tmp_path / "same")
    with pytest.raises(ConfigError, match=f"^steps: 12, but the checkpoint .* is of step {steps}"):
        loop.train(dataclasses.replace(config, epochs=1))


def test_a_resumed_run_on_chats_equals_one_without_a_stop(chats, tmp_path):
    changes = {"data": chats, "schedule": "constant", "warmup": 0, "eval_every": 4}
    loop.train(runs.make_config("", tmp_path / "whole", steps=8, **changes))
    loop.train(runs.make_config("", tmp_path / "run", steps=4, **changes))
    loop.train(runs.make_config("", tmp_path / "run", steps=8, **changes))
    runs.assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_the_export_has_the_template(chats, tmp_path):
    from transformers import AutoTokenizer

    loop.train(runs.make_config("", tmp_path / "run", data=chats, steps=1))
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "run" / "export")
    messages = [{"role": "user", "content": "1+1"}]
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    assert text == "u:1+1\na:"


def test_sources_with_weights(tmp_path):
    text = runs.write_text(tmp_path / "text.jsonl")
    other = tmp_path / "prompts.jsonl"
    other.write_text("\n".join(json.dumps({"query": f"{n}", "response": "x"}) for n in range(50)))
    data = DataConfig({str(text): 0.5, str(other): 0.5})
    loop.train(runs.make_config("", tmp_path / "run", data=data, steps=2))
    assert runs.last_step(tmp_path / "run") == 2
    config = runs.make_config("", tmp_path / "run", data=data, steps=3)
    config.data.path = {str(text): 0.4, str(other): 0.6}
    with pytest.raises(ConfigError, match=r"^data.path: .* is another dataset than "):
        loop.train(config)
