"""What each kind of record becomes, and the errors for wrong ones.

`tests/oracles/test_trl.py` compares with TRL; here are the cases that TRL has not, by hand.
"""

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from lomo_jax.data import read_rows
from lomo_jax.data.kinds import find_kind
from lomo_jax.data.sources import Record
from lomo_jax.errors import UserError

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.fixture(scope="module")
def bytes_():
    """Each byte is a token, and so are <s>, </s> and ChatML's; texts begin with <s>."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<s>", "</s>", "<|im_start|>", "<|im_end|>"]
    backend = Tokenizer(models.BPE({x: i for i, x in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.add_special_tokens(special)
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHATML
    )


@pytest.fixture
def read(bytes_, tmp_path):
    """Reads records; returns the text of each example, what has loss in [], and the summary."""

    def read(*records: dict, length: int = 1000, tokenizer=bytes_, **options: Any):
        path = tmp_path / "a.jsonl"
        path.write_text("\n".join(map(json.dumps, records)))
        options = {"eval_fraction": 0, "packing": False, **options}
        rows = read_rows(path, tokenizer, sequence_length=length, **options)
        [found] = rows.train
        marked = []
        for row in map(found.__getitem__, range(len(found))):
            size = int(row["segments"].sum())
            tokens = [int(row["tokens"][0]), *row["targets"][:size].tolist()]
            flags = [False, *(row["weights"][:size] == 1).tolist()]
            assert tokens[:-1] == row["tokens"][:size].tolist()
            marked.append(mark(tokenizer, tokens, flags))
        return marked, rows.summary

    return read


def mark(tokenizer, tokens: list[int], flags: list[bool]) -> str:
    text, before = "", False
    for token, flag in zip(tokens, flags, strict=True):
        text += "[" * (flag and not before) + "]" * (before and not flag)
        text += tokenizer.convert_ids_to_tokens(token)
        before = flag
    return (text + "]" * before).replace("\u010a", "\n").replace("\u0120", " ")


def turns(*contents: str) -> list[dict]:
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_text(read):
    found, summary = read({"text": "ab"}, {"text": "<s>cd</s>"})
    assert sorted(found) == ["<s>[ab</s>]", "<s>[cd</s>]"]  # one of each special token
    assert summary.kind == "text"
    assert (summary.tokens, summary.loss_tokens) == (8, 6)


def test_a_chat_that_is_written_out_begins_once(read, bytes_):
    bytes_.chat_template = "{{ bos_token }}{% for m in messages %}{{ m.content }}{% endfor %}"
    text = bytes_.apply_chat_template(turns("hi", "ho"), tokenize=False)
    bytes_.chat_template = CHATML
    assert read({"text": text})[0] == ["<s>[hiho</s>]"]


def test_special_tokens_as_text(read):
    record = {"prompt": "</s>", "completion": "a"}
    assert read(record)[0] == ["<s></s>[a</s>]"]
    found, summary = read(record, special_tokens="text")
    assert found == ["<s></s>[a</s>]"]
    assert summary.tokens == 3 + len("</s>")


def test_prompt_and_completion(read):
    records = {"prompt": "1+1=", "completion": "2"}, {"query": "a", "response": "b\n"}
    assert read(records[0])[0] == ["<s>1+1=[2</s>]"]
    assert read(records[1])[0] == ["<s>a[b\n</s>]"]
    assert read(records[0], train_on="all")[0] == ["<s>[1+1=2</s>]"]


def test_the_loss_is_on_tokens_that_end_in_the_answer(tmp_path):
    """White space before an answer is not part of it, even if the tokenizer joins them."""
    backend = Tokenizer(models.WordLevel({"q": 0, " a": 1, " ": 2, "</s>": 3, "?": 4}, "?"))
    backend.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_next")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")
    path = tmp_path / "a.jsonl"
    for prompt, completion, loss in (("q", " a", [0, 1, 1]), ("q ", "a", [0, 1, 1])):
        path.write_text(json.dumps({"prompt": prompt, "completion": completion}))
        _, found = read_rows(path, tokenizer, sequence_length=9).summary.first[0]
        assert found.tolist() == loss


def test_instruction(read):
    [plain] = read({"instruction": "Add.", "input": "", "output": "3"})[0]
    [given] = read({"instruction": "Add.", "input": "1, 2", "output": "3"})[0]
    assert plain == (
        "<s>Below is an instruction that describes a task. Write a response that appropriately "
        "completes the request.\n\n### Instruction:\nAdd.\n\n### Response:[3</s>]"
    )
    assert given == (
        "<s>Below is an instruction that describes a task, paired with an input that provides "
        "further context. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd.\n\n### Input:\n1, 2\n\n### Response:[3</s>]"
    )


HI = "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"


def test_a_chat(read):
    messages = turns("hi", "ho", "one", "two", "three")
    found, summary = read({"messages": messages})
    assert found == [
        HI + "[ho<|im_end|>\n]<|im_start|>user\none<|im_end|>\n<|im_start|>assistant\n"
        "[two<|im_end|>\n]<|im_start|>user\nthree<|im_end|>\n"
    ]
    assert summary.kind == "chat"
    assert read({"messages": messages[:2]}, train_on="all")[0] == [
        "<|im_start|>[" + HI.removeprefix("<|im_start|>") + "ho<|im_end|>\n]"
    ]


def test_sharegpt(read):
    conversations = [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]
    assert read({"conversations": conversations})[0] == [HI + "[ho<|im_end|>\n]"]
    assert read({"conversations": conversations, "system": "Sing."})[0] == [
        f"<|im_start|>system\nSing.<|im_end|>\n{HI}[ho<|im_end|>\n]"
    ]
    assert read({"conversations": conversations[1:]})[0] == [
        "<|im_start|>assistant\n[ho<|im_end|>\n]"
    ]


def test_contents_in_parts(read):
    parts = [{"type": "text", "text": "h"}, {"type": "text", "text": "i"}]
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "ho"}]
    assert read({"messages": messages})[0] == [HI + "[ho<|im_end|>\n]"]


def test_calls_of_tools(read, bytes_):
    template = CHATML.replace(
        "m.content +", "m.content ~ (m.tool_calls | tojson if m.tool_calls) ~"
    )
    template = "{{ tools | tojson if tools }}" + template
    call = {"name": "add", "arguments": {"a": 1}}
    ours = [
        *turns("hi"),
        {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "3"},
        *turns("", "ho")[1:],
    ]
    sharegpt = [
        {"from": "human", "value": "hi"},
        {"from": "function_call", "value": json.dumps(call)},
        {"from": "observation", "value": "3"},
        {"from": "gpt", "value": "ho"},
    ]
    expected = (
        '[{"name": "add"}]' + HI + '[[{"type": "function", "function": {"name": "add", "arguments":'
        ' {"a": 1}}}]<|im_end|>\n]<|im_start|>tool\n3<|im_end|>\n<|im_start|>assistant\n'
        "[ho<|im_end|>\n]"
    )
    tools = [{"name": "add"}]
    assert read({"messages": ours, "tools": tools}, template=template)[0] == [expected]
    record = {"conversations": sharegpt, "tools": json.dumps(tools)}
    assert read(record, template=template)[0] == [expected]


def test_todays_date_is_the_same_tomorrow(read, bytes_):
    today = "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"
    assert read({"messages": turns("hi", "ho")}, template=today + CHATML)[0] == [
        "26 Jul 2024" + HI + "[ho<|im_end|>\n]"
    ]
    bytes_.chat_template = today.replace("'", '"') + CHATML
    assert read({"messages": turns("hi", "ho")})[0][0].startswith("26 Jul 2024<|im_start|>")
    bytes_.chat_template = CHATML
    answer = "{% generation %}{{ a }}{% endgeneration %}"
    assert read({"a": "x"}, template=today + answer)[0] == ["<s>26 Jul 2024[x</s>]"]


def test_a_template_in_a_file(read, tmp_path):
    path = tmp_path / "t.jinja"
    path.write_text(
        "{% for m in messages %}{{ m.role[0] }}:{{ m.content }};{% endfor %}"
        "{% if add_generation_prompt %}a:{% endif %}"
    )
    found, _ = read({"messages": turns("hi", "ho")}, template=str(path))
    assert found == ["u:hi;a:[ho;]"]


def test_a_template_of_columns(read):
    template = "{{ a }}{% generation %}{{ b }}{% endgeneration %}"
    found, summary = read({"a": "x", "b": "y"}, template=template)
    assert found == ["<s>x[y</s>]"]
    assert summary.kind == "template"
    assert read({"a": "x", "b": "y"}, template=template + "!")[0] == ["<s>x[y]!</s>"]
    assert read({"a": "x"}, template="{{ a }}z", train_on="all")[0] == ["<s>[xz</s>]"]


def test_a_template_may_have_macros_loops_and_marks(read):
    template = (
        "  {% if a %}{{ a }}{% endif %}\n"
        "{% macro say(x) %}{% generation %}{{ x }};{% endgeneration %}{% endmacro %}"
        "{% for x in xs %}{{ loop.index }}{{ say(x) }}{% if x == 'q' %}{% break %}{% endif %}"
        "{% endfor %}{{ {'k': a} | tojson }}{{ b if b is defined }}"
    )
    record = {"a": "z", "xs": ["p", "q", "r"]}
    assert read(record, template=template)[0] == ['<s>z1[p;]2[q;]{"k": "z"}</s>']
    assert read({**record, "b": "!"}, template=template)[0] == ['<s>z1[p;]2[q;]{"k": "z"}!</s>']


def test_columns_of_a_template_have_any_names(read):
    template = (
        "\n{% for x in tools %}{{ x }}{{ record }}{% endfor %}{{ template if add is defined }}"
        "{% generation %}{{ documents }}{% endgeneration %}"
    )
    record = {"tools": "ab", "record": 1, "template": "t", "documents": "d", "chat_template": "c"}
    assert read(record, template=template)[0] == ["<s>\na1b1[d</s>]"]
    record |= {"range": "r", "dict": None, "my col": "m"}
    assert read(record, template="{{ range }}{{ dict }}!", train_on="all")[0] == ["<s>[r!</s>]"]
    assert read({**record, "add": 1}, template=template)[0] == ["<s>\na1b1t[d</s>]"]


def test_a_null_is_empty_in_a_template(read):
    template = "{{ a }}{% if b is not none %}!{% endif %}{% generation %}{{ c }}{% endgeneration %}"
    record = {"a": None, "b": None, "c": "z"}
    assert read(record, template=template)[0] == ["<s>[z</s>]"]
    nested = {**record, "a": [None], "b": {"x": None}}
    template = template.replace("{{ a }}", "{{ a[0] }}{{ b.x }}")
    assert read(nested, template=template)[0] == ["<s>![z</s>]"]
    with pytest.raises(UserError, match=r":1: data\.template gives an empty text or answer"):
        read({**record, "a": "x", "c": None}, template=template)


def test_training_on_all_of_a_chat_needs_no_answers(read):
    user = "<|im_start|>[user\na<|im_end|>\n]"
    assert read({"messages": turns("a")}, train_on="all")[0] == [user]
    template = "{{ messages | length }}" + CHATML
    [text], _ = read({"messages": turns("a", "b", "c", "d")}, train_on="all", template=template)
    assert text.startswith("4[<|im_start|>user\na")


def test_a_long_example_is_cut_or_left_out(read):
    short, long = {"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": "defg"}
    lost = {"prompt": "hijklm", "completion": "n"}
    found, summary = read(short, long, lost, length=4)
    assert sorted(found) == ["<s>a[b</s>]", "<s>c[def]"]
    assert (summary.examples, summary.cut, summary.left_out) == (2, 1, 1)
    assert (summary.tokens, summary.loss_tokens) == (9, 5)
    assert sorted(summary.lengths.tolist()) == [4, 7, 9]
    found, summary = read(short, long, lost, length=4, too_long="leave_out")
    assert found == ["<s>a[b</s>]"]
    assert (summary.examples, summary.cut, summary.left_out) == (1, 0, 2)
    with pytest.raises(UserError, match="no example has an answer within sequence_length=4 tokens"):
        read(lost, length=4)


def test_repeated_examples(read):
    record, other = {"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": "c"}
    found, summary = read(record, other, record, record)
    assert sorted(found) == ["<s>a[b</s>]", "<s>a[c</s>]"]
    assert (summary.examples, summary.repeated) == (2, 2)
    found, summary = read(record, other, record, record, repeated="keep")
    assert sorted(found) == 3 * ["<s>a[b</s>]"] + ["<s>a[c</s>]"]
    assert (summary.examples, summary.repeated) == (4, 2)


@pytest.mark.parametrize(
    ("columns", "kind"),
    [
        (("text", "id"), "text"),
        (("instruction", "input", "output", "text"), "instruction"),
        (("instruction", "output"), "instruction"),
        (("prompt", "messages"), "chat"),
        (("conversations",), "chat"),
        (("question", "answer", "text"), "prompt"),
        (("prompt", "question", "answer"), "prompt"),
    ],
)
def test_columns_tell_the_kind(columns, kind):
    assert find_kind(Record("a", dict.fromkeys(columns, "x")), "text", False) == kind


GOOD = {"prompt": "a", "completion": "b"}
BAD: dict[str, tuple[list[dict], dict[str, Any], str]] = {
    "no kind": ([{"body": "a"}], {}, r":1 has no 'text' \(found: body\), and is no instruction"),
    "a record without its column": (
        [GOOD, {"prompt": "a"}],
        {},
        r":2 has no 'completion' \(found: prompt\)",
    ),
    "mixed kinds": (
        [GOOD, {"messages": turns("a", "b")}],
        {},
        r":2 has no 'prompt' \(found: messages\)",
    ),
    "another format": ([GOOD], {"format": "chat"}, r"'prompt' is str, not a list of messages"),
    "no text": ([{"text": 3}], {}, ":1: 'text' is int, not text"),
    "a null": ([GOOD, {**GOOD, "completion": None}], {}, ":2: 'completion' is NoneType, not text"),
    "an empty answer": ([GOOD, {**GOOD, "completion": " \n"}], {}, ":2: 'completion' is an empty"),
    "an empty turn": ([{"messages": turns("a", "")}], {}, ":1: turn 2 is an empty answer"),
    "an unknown role": (
        [{"messages": [{"role": "narrator", "content": "a"}]}],
        {},
        ":1: turn 1 has the role 'narrator': the roles are system,",
    ),
    "no role": ([{"messages": [{"content": "a"}]}], {}, ":1: turn 1 has the role None"),
    "no messages": ([{"messages": []}], {}, ":1: 'messages' is an empty list"),
    "messages as text": ([{"messages": "a"}], {}, ":1: 'messages' is str, not a list"),
    "a turn as text": ([{"messages": ["a"]}], {}, ":1: turn 1 is str, not a message"),
    "a picture": (
        [{"messages": [{"role": "user", "content": [{"type": "image"}]}]}],
        {},
        ":1: turn 1 has a content of list, not text",
    ),
    "no answer": ([{"messages": turns("a")}], {}, ":1 has no turn of the assistant"),
    "half a surrogate": ([{"text": "\ud800"}], {}, r":1: 'text' has half of a surrogate pair: rem"),
    "a call that is no JSON": (
        [{"conversations": [{"from": "function_call", "value": "add("}]}],
        {},
        ":1: turn 1 is a function call that is not JSON",
    ),
    "a call without content": (
        [{"messages": [{"role": "function_call"}]}],
        {},
        ":1: turn 1 is a function call that is not JSON",
    ),
    "half a surrogate in a call": (
        [{"messages": turns("a", "b"), "tools": [{"name": "\ud800"}]}],
        {"template": "{{ tools[0].name }}" + CHATML},
        ":1 has half of a surrogate pair: rem",
    ),
    "half a surrogate in system": (
        [{"system": "\ud800", "messages": turns("a", "b")}],
        {},
        ":1 has half of a surrogate pair: rem",
    ),
    "special tokens of a chat as text": (
        [{"messages": turns("a", "b")}],
        {"special_tokens": "text"},
        "data.special_tokens=text would also spell out",
    ),
    "a template and a format": (
        [GOOD],
        {"template": "{{ prompt }}", "format": "prompt"},
        "data.format=prompt has a text of its own",
    ),
    "a template of columns that fails": (
        [{"a": "x"}],
        {"template": "{{ raise_exception('no') }}{% generation %}{{ a }}{% endgeneration %}"},
        ":1: the template fails: no",
    ),
    "a template that fails": (
        [{"messages": turns("a", "b")}],
        {"template": "{{ raise_exception('no\nchat') }}"},
        ":1: the template fails: no chat",
    ),
    "a template that is none": (
        [{"messages": turns("a", "b")}],
        {"template": "{% if %}"},
        ":1: the template fails: Expected an expression",
    ),
    "a template that changes what came before": (
        [{"messages": turns("a", "b", "c", "d")}],
        {"template": "{{ messages | length }}" + CHATML},
        ":1: the chat template renders turn 2 otherwise when more turns follow",
    ),
    "a column that a template has not": (
        [{"a": "x"}],
        {"template": "{{ a }}{% generation %}{{ b }}{% endgeneration %}"},
        r":1 has no 'b' \(found: a\), which data.template uses",
    ),
    "an empty answer of a template": (
        [{"a": "x", "b": ""}],
        {"template": "{{ a }}{% generation %}{{ b }}{% endgeneration %}"},
        ":1: data.template gives an empty text or answer",
    ),
    "a template of columns that is none": (
        [{"a": "x"}],
        {"template": "{{ a }}{% generation %}{% endgeneration %}{% if %}"},
        "data.template is not a template: Expected an expression",
    ),
    "a template without answers": ([{"a": "x"}], {"template": "{{ a }}"}, "data.template marks no"),
    "no such template": (
        [GOOD],
        {"template": "none.jinja"},
        "'none.jinja' cannot be read: .*No su",
    ),
    "a token outside the model": (
        [GOOD, {**GOOD, "prompt": "\N{SNOWMAN}"}],
        {"vocab_size": 200},
        r":2 has the token 2\d\d \(.*\), but the model only 200 tokens",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_a_bad_record_is_one_line(read, name):
    records, options, message = BAD[name]
    with pytest.raises(UserError, match=message) as error:
        read(*records, **options)
    assert "\n" not in str(error.value)
    if not message.startswith(("data.", "'none")):
        assert "a.jsonl" in str(error.value)


def test_no_chat_template(read, bytes_):
    bytes_.chat_template = None
    with pytest.raises(UserError, match="the tokenizer has no chat template: set"):
        read({"messages": turns("a", "b")})
    bytes_.chat_template = CHATML


def test_mixed_kinds_of_files(bytes_, tmp_path: Path):
    (tmp_path / "a.txt").write_text("a")
    (tmp_path / "b.jsonl").write_text(json.dumps(GOOD))
    paths = [tmp_path / "a.txt", tmp_path / "b.jsonl"]
    with pytest.raises(UserError, match=r"b\.jsonl:1 has no 'text' \(found: prompt, completion\)"):
        read_rows(paths, bytes_, sequence_length=9)
    weights = {str(path): 1.0 for path in paths}
    rows = read_rows(weights, bytes_, sequence_length=9, eval_fraction=0)
    assert rows.summary.kind == "text, prompt"
