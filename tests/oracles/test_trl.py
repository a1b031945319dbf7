"""Examples against TRL's data path for supervised fine-tuning: tokens, loss, positions, lengths.

Where TRL has no such form (instructions, templates of one's own, ShareGPT's tool turns), its input
is the text or the messages that the form stands for.
"""

import bz2
import csv
import gzip
import importlib.util
import json
import types
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from lomo_jax.data import read_rows

pytestmark = pytest.mark.oracle
if (TRL := importlib.util.find_spec("trl")) is None or not TRL.submodule_search_locations:
    pytest.skip("needs the packages trl and accelerate", allow_module_level=True)

SPECIAL = [
    *("<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|eot_id|>"),
    *("<|start_header_id|>", "<|end_header_id|>", "<|endoftext|>"),
]
QUESTIONS = [
    ("What is 2 + 2?", "4"),
    ("Name a colour.\n", "Red, or\n blue, or green. "),
    ("  Why is the sky blue?", " Because of Rayleigh scattering: short waves scatter more."),
    ("Caf\N{LATIN SMALL LETTER E WITH ACUTE}?", "\N{SNOWMAN} yes \N{GRINNING FACE}!"),
    ("Write a list", "\n* one\n* two\n\n* three, " + "and so on, " * 12),
    ("Prompt that ends in a space ", "answer"),
]
ALPACA = (
    "Below is an instruction that describes a task. Write a response that appropriately completes "
    "the request.\n\n### Instruction:\n{0}\n\n### Response:",
    "Below is an instruction that describes a task, paired with an input that provides further "
    "context. Write a response that appropriately completes the request.\n\n### Instruction:\n{0}"
    "\n\n### Input:\n{1}\n\n### Response:",
)


@pytest.fixture(scope="module")
def tokenizer():
    """Byte-level BPE that begins texts with a token, and leaves white space out of offsets."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.train_from_iterator(
        [" ".join(pair) for pair in QUESTIONS] + list(ALPACA),
        trainers.BpeTrainer(
            vocab_size=600,
            special_tokens=SPECIAL,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bos = backend.token_to_id("<|begin_of_text|>")
    backend.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=True),
            processors.TemplateProcessing(
                single="<|begin_of_text|> $A", special_tokens=[("<|begin_of_text|>", bos)]
            ),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        extra_special_tokens=SPECIAL[:2] + SPECIAL[3:6],
        chat_template=template("llama3_training"),
    )


def template(name: str) -> str:
    return Path(TRL.submodule_search_locations[0], "chat_templates", f"{name}.jinja").read_text()


def chat(*turns: str, system: str | None = None, roles=("user", "assistant")) -> list[dict]:
    messages = [{"role": roles[i % 2], "content": turn} for i, turn in enumerate(turns)]
    return [{"role": "system", "content": system}, *messages] if system else messages


CHATS = [
    chat(*QUESTIONS[0]),
    chat(*QUESTIONS[1], *QUESTIONS[2], *QUESTIONS[3]),
    chat(*QUESTIONS[2], system="Be brief."),
    chat(*QUESTIONS[4], "Thanks!"),
]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 1, "b": 2}}}
TOOL_CHAT = [
    *chat("Add 1 and 2."),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "3"},
    {"role": "assistant", "content": "It is 3."},
]
_PARAMETERS = {"type": "object", "properties": {"a": {"type": "number"}}}
TOOLS = [
    {
        "type": "function",
        "function": {"name": "add", "description": "Adds.", "parameters": _PARAMETERS},
    }
]


class Kind(NamedTuple):
    records: list[dict]
    trl: list[dict]  # the same for TRL
    template: str | None = None  # a chat template of TRL, or one's own
    marks: bool = True  # whether the chat template marks what the assistant writes
    options: Mapping[str, Any] = types.MappingProxyType({})


def sharegpt(messages: list[dict]) -> list[dict]:
    names = {"user": "human", "assistant": "gpt", "system": "system"}
    return [{"from": names[m["role"]], "value": m["content"]} for m in messages]


PROMPTS = [{"prompt": q, "completion": a} for q, a in QUESTIONS]
TEXTS = [{"text": q + a} for q, a in QUESTIONS]
INSTRUCTIONS = [
    {"instruction": q, "input": i, "output": a}
    for (q, a), i in zip(QUESTIONS, ["", "an input", "", "two\nlines", "", "x"], strict=True)
]
OWN = "Q: {{ q }}\nA:{% generation %} {{ a }}{% endgeneration %}"
KINDS = {
    "text": Kind(TEXTS, TEXTS),
    "prompt": Kind(PROMPTS, PROMPTS),
    "query": Kind([{"query": q, "response": a} for q, a in QUESTIONS], PROMPTS),
    "question": Kind([{"question": q, "answer": a} for q, a in QUESTIONS], PROMPTS),
    "instruction": Kind(
        INSTRUCTIONS,
        [
            {
                "prompt": ALPACA[r["input"] != ""].format(r["instruction"], r["input"]),
                "completion": r["output"],
            }
            for r in INSTRUCTIONS
        ],
    ),
    "template": Kind(
        [{"q": q, "a": a} for q, a in QUESTIONS],
        [{"prompt": f"Q: {q}\nA:", "completion": f" {a}"} for q, a in QUESTIONS],
        OWN,
    ),
    "messages": Kind([{"messages": m} for m in CHATS], [{"messages": m} for m in CHATS]),
    "sharegpt": Kind(
        [{"conversations": sharegpt(m)} for m in CHATS], [{"messages": m} for m in CHATS]
    ),
    "all": Kind(
        [{"messages": m} for m in CHATS],
        [{"messages": m} for m in CHATS],
        marks=False,
        options={"train_on": "all"},
    ),
    "conversation prompt": Kind(
        [{"prompt": m[:-1], "completion": m[-1:]} for m in CHATS[:3]],
        [{"prompt": m[:-1], "completion": m[-1:]} for m in CHATS[:3]],
        "qwen2_5",
        marks=False,
    ),
    "tools": Kind(
        [{"messages": TOOL_CHAT, "tools": TOOLS}],
        [{"messages": TOOL_CHAT, "tools": TOOLS}],
        "qwen2_5_training",
    ),
    **{
        f"chat of {name}": Kind(
            [{"messages": m} for m in CHATS], [{"messages": m} for m in CHATS], f"{name}_training"
        )
        for name in ("qwen2_5", "qwen3", "phi3", "gemma")
        # Gemma has no system turn.
    },
}
KINDS["chat of gemma"] = Kind(
    *([{"messages": m} for m in CHATS if m[0]["role"] != "system"] for _ in range(2)),
    "gemma_training",
)


def of_trl(kind: Kind, tokenizer, max_length: int) -> list[tuple[list[int], list[int]]]:
    """Returns tokens and labels of each example."""
    from trl import SFTTrainer

    is_own = kind.template == OWN
    arguments = types.SimpleNamespace(
        dataset_num_proc=None,
        dataset_text_field="text",
        assistant_only_loss=kind.marks and "messages" in kind.trl[0],
        max_length=max_length,
        truncation_mode="keep_start",
        shuffle_dataset=False,
    )
    trainer: Any = types.SimpleNamespace(
        _tokenizer=tokenizer,
        chat_template=template(kind.template) if kind.template and not is_own else None,
        completion_only_loss=True,
    )
    dataset = datasets.Dataset.from_list(kind.trl)
    prepared = SFTTrainer._prepare_dataset(
        trainer, dataset, tokenizer, arguments, False, None, "train"
    )
    return [(row["input_ids"], row["labels"]) for row in prepared]


def examples(path: Any, kind: Kind, tokenizer, max_length: int, packing: bool):
    """Returns tokens and labels of each example, from the rows of batches."""
    chosen = kind.template
    if chosen and chosen != OWN:
        chosen = template(chosen)
    options = {"template": chosen, "eval_fraction": 0, "packing": packing, **kind.options}
    data = read_rows(path, tokenizer, sequence_length=max_length - 1, **options)
    found = []
    for rows in data.train:
        for row in map(rows.__getitem__, range(len(rows))):
            assert row["segments"].max() == 1 or packing
            for segment in range(1, row["segments"].max() + 1):
                here = row["segments"] == segment
                tokens, targets = row["tokens"][here], row["targets"][here]
                np.testing.assert_array_equal(row["positions"][here], np.arange(here.sum()))
                np.testing.assert_array_equal(tokens[1:], targets[:-1])
                labels = np.where(row["weights"][here] == 1, targets, -100)
                found.append(([*tokens.tolist(), int(targets[-1])], labels.tolist()))
            assert not row["weights"][row["segments"] == 0].any()
    return found, data.summary


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("packing", [True, False])
@pytest.mark.parametrize("max_length", [1000, 40])
@pytest.mark.parametrize("name", KINDS)
def test_examples_equal_those_of_trl(tmp_path, tokenizer, name, max_length, packing):
    kind = KINDS[name]
    path = tmp_path / "a.jsonl"
    path.write_text("\n".join(map(json.dumps, kind.records)))
    if name == "text" and max_length < 1000:
        pytest.skip("a text is not cut")
    expected = of_trl(kind, tokenizer, max_length)
    # The first token has no label: nothing predicts it.
    expected = [(ids, labels[1:]) for ids, labels in expected]
    expected = [(ids, labels) for ids, labels in expected if set(labels) != {-100}]
    if not expected:
        pytest.skip("no answer before the cut")
    found, summary = examples(path, kind, tokenizer, max_length, packing)
    assert sorted(found) == sorted(expected)
    assert summary.examples == len(expected)
    assert summary.left_out == len(kind.records) - len(expected)
    assert summary.loss_tokens == sum(label != -100 for _, ls in expected for label in ls)
    tokens, loss = summary.first[0]
    assert (tokens.tolist(), loss.tolist()) == (
        expected[0][0],
        [0, *(int(label != -100) for label in expected[0][1])],
    )


def _lines(records: list[dict]) -> bytes:
    return "\n".join(map(json.dumps, records)).encode()


def _table(path: Path, records: list[dict], delimiter: str) -> None:
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(records)


def _arrow(path: Path, records: list[dict]) -> None:
    table = pa.Table.from_pylist(records)
    with pa.ipc.new_file(path, table.schema) as file:
        file.write_table(table)


FORMS = {
    "a.jsonl": lambda path, records: path.write_bytes(_lines(records)),
    "a.json": lambda path, records: path.write_text(json.dumps(records, indent=1)),
    "a.ndjson": lambda path, records: path.write_bytes(_lines(records)),
    "a.jsonl.gz": lambda path, records: path.write_bytes(gzip.compress(_lines(records))),
    "a.jsonl.bz2": lambda path, records: path.write_bytes(bz2.compress(_lines(records))),
    "a.jsonl.zst": lambda path, records: path.write_bytes(
        pa.Codec("zstd").compress(_lines(records), asbytes=True)
    ),
    "a.parquet": lambda path, records: pd.DataFrame(records).to_parquet(path),
    "a.arrow": _arrow,
    "saved": lambda path, records: datasets.Dataset.from_list(records).save_to_disk(path),
    "list": lambda path, records: [
        path.with_suffix(".json").write_text(json.dumps(records[:1])),
        path.with_suffix(".jsonl").write_bytes(_lines(records[1:])),
    ],
    "a.csv": lambda path, records: _table(path, records, ","),
    "a.tsv": lambda path, records: _table(path, records, "\t"),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["text", "prompt", "instruction", "template", "sharegpt", "tools"])
@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_input_gives_those_examples(tmp_path, tokenizer, form, name):
    kind = KINDS[name]
    if form in ("a.csv", "a.tsv") and name in ("sharegpt", "tools"):
        pytest.skip("a table has no lists")
    FORMS[form](tmp_path / form, kind.records)
    path: Any = tmp_path / form
    if form == "list":
        path = [path.with_suffix(".json"), path.with_suffix(".jsonl")]
        path = path[: len(kind.records)]
    expected = [(ids, labels[1:]) for ids, labels in of_trl(kind, tokenizer, 1000)]
    found, summary = examples(path, kind, tokenizer, 1000, packing=True)
    assert sorted(found) == sorted(expected)
    assert summary.tokens == sum(len(ids) for ids, _ in expected)
