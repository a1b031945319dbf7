"""The page, read as a browser would."""

import html.parser
import itertools
import re

import pytest
from workdirs import CONFIG, FACTS, evaluation, resumed, sample, step, write

from lomo_jax import report
from lomo_jax.report import words
from lomo_jax.training import Config
from lomo_jax.training.config import to_dict

_RECORDS = [
    *(evaluation(0, 4.003, 0.0), sample(0, "<script>alert(1)</script>", 0.0)),
    *(step(1, 4.1234, 10.0, grad_norm=2.0), step(10, None, 70.0, device_memory_gib=13.5)),
    *(evaluation(10, 3.1116, 80.0), sample(10, 'a "time" & then', 80.0)),
    *(step(20, 3.2226, 130.0, device_memory_gib=13.9, tokens_per_second=3000.0), resumed(10, 9e6)),
    step(20, 3.3336, 9e6 + 52, device_memory_gib=13.8, tokens_per_second=2000.0, skipped=7),
    *(step(30, 3.2, 9e6 + 110, skipped=7), evaluation(30, 3.4449, 9e6 + 120)),
]


class _Reader(html.parser.HTMLParser):
    """Gathers what a page consists of and checks that its elements are closed."""

    _VOID = frozenset({"meta", "link", "br", "path", "use", "rect"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.ids, self.text, self.facts = [], [], [], [], {}
        self.feed(page)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for key, value in attrs if key == "id"]
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.handle_starttag(tag, attrs)
        if tag not in self._VOID:
            self.open.pop()

    def handle_endtag(self, tag):
        if tag not in self._VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        if self.open[-1:] == ["dt"]:
            self.facts[data] = []
        elif "dd" in self.open:
            self.facts[list(self.facts)[-1]].append(data)
        self.text.append(data)

    def named(self, tag):
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page(tmp_path):
    """Writes runs, returns the page on them and what is on it."""

    def make(*runs):
        folders = [
            str(write(tmp_path / f"run{number}", records, **options))
            for number, (records, options) in enumerate(runs)
        ]
        text = report.make(report.read(folders))
        return text, _Reader(text)

    return make


def _said(reader):
    return " ".join(" ".join(reader.text).split())


def _alts(reader):
    return {
        attrs["aria-label"].split(" over")[0]: attrs["aria-label"] for attrs in reader.named("svg")
    }


def test_headline(page):
    _, reader = page((_RECORDS, {}))
    facts = {name: " ".join(parts) for name, parts in reader.facts.items()}
    where = "step 0 to step 30; the best was 3.112 at step 10"
    assert facts["Held-out loss"] == f"4.003 → 3.445 {where}"
    assert facts["Training loss"] == "4.123 → 3.200 step 1 to step 30"
    assert facts["Steps"] == "30 of 30"
    # Of 1000, 1000, 2000 and 1000: the 3000 are superseded.
    assert facts["Throughput"].startswith("1,000 tokens/s")
    assert facts["Time"].startswith("4 min 10 s")  # 130 s before the stop, 120 s after it
    assert facts["Parameters"] == "6.7 B /models/llama-7b"
    assert facts["Device"] == "2 \N{MULTIPLICATION SIGN} NVIDIA H100"
    assert facts["Memory, planned"] == "14.17 GiB compiled for a device that may use 71.25 GiB"
    assert facts["Memory, measured"] == "13.80 GiB peak in use"
    assert facts["Resumed"] == "once from the checkpoint of step 10"
    assert facts["Updates skipped"].startswith("7 ")


def test_a_run_that_has_just_begun_on_a_cpu(page):
    facts = {"device": "cpu", "plan": None}
    text, reader = page(([{"step": 1, "loss": 2.5}], {"facts": facts, "config": None}))
    said = {name: " ".join(parts) for name, parts in reader.facts.items()}
    assert said["Held-out loss"].endswith("no evaluation yet")
    assert said["Training loss"] == "2.500 step 1"
    assert said["Steps"] == "1"
    assert said["Memory, measured"].endswith("not measured: a CPU does not report it")
    assert said["Memory, planned"].endswith("no plan was recorded")
    assert list(_alts(reader)) == ["Loss"]
    assert "Samples" not in text.partition("<body>")[2]


def test_an_unfinished_run_says_so(page):
    _, reader = page((_RECORDS[:3], {}))
    assert " ".join(reader.facts["Steps"]) == "1 of 30 still running, or stopped"


def test_what_runs_say_is_escaped(page):
    hostile = "</title><script>alert(2)</script>"
    text, reader = page(
        (_RECORDS, {"config": {**CONFIG, "workdir": hostile, "optimizer": hostile}}),
        (_RECORDS, {"facts": {**FACTS, "device": hostile, "versions": {hostile: hostile}}}),
    )
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not re.search(r"<script|<i>upon", text)
    said = _said(reader)
    assert "<script>alert(1)</script>" in said
    assert "Once <i>upon</i>" in said
    assert 'a "time" & then' in said
    assert hostile in said


def test_the_page_needs_nothing_else(page):
    text, reader = page((_RECORDS, {}), (_RECORDS, {}))
    assert {"link", "img", "iframe", "script", "image", "object"}.isdisjoint(dict(reader.tags))
    references = re.findall(r"(?:href|src|url|@import)\s*(?:=\s*|\(\s*)[\"']?([^\"')\s]*)", text)
    assert references
    assert {reference[0] for reference in references} == {"#"}
    assert {reference[1:] for reference in references} <= set(reader.ids)
    assert "://" not in text


def test_ids_are_unique_and_charts_are_described(page):
    text, reader = page((_RECORDS, {}), (_RECORDS, {}))
    assert len(reader.ids) == len(set(reader.ids)) > 0
    charts = reader.named("svg")
    titles = re.findall(r"<figcaption><h3>(.*?)</h3>", text)
    assert len(charts) == 2 * len(titles)  # for wide and for narrow screens
    assert all(chart["role"] == "img" and len(chart["aria-label"]) > 30 for chart in charts)
    assert reader.named("html") == [{"lang": "en"}]
    assert any(meta.get("name") == "viewport" for meta in reader.named("meta"))
    levels = [int(tag[1]) for tag, _ in reader.tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))


def test_a_narrow_chart_fits_a_phone(page):
    text, _ = page((_RECORDS, {}))
    narrow = re.findall(r'<div class="narrow"><svg[^>]*viewBox="0 0 (\d+)', text)
    assert narrow
    assert set(narrow) == {"350"}


def test_there_is_a_chart_for_each_kind_of_number(page):
    more = {"grad_norm": 1.5, "loss_scale": 32768.0, "flop_utilisation": 0.41}
    _, reader = page(([step(1, 3.0, **more), step(2, 2.9, **more), evaluation(2, 3.5)], {}))
    alts = _alts(reader)
    assert list(alts) == [
        *("Loss", "Accuracy", "Learning rate", "Tokens per second"),
        *("Share of the device's peak FLOP/s", "Gradient norm", "Loss scale"),
        "Device memory. planned (compiled) 14.17 GiB.",
    ]
    expected = "training: 3.000 at step 1, 2.900 at step 2. held out: 3.500 at step 2."
    assert alts["Loss"] == f"Loss over steps. {expected}"
    assert alts["Loss scale"].endswith("32,768 at step 1, 32,768 at step 2.")


def test_null_is_told_and_leaves_a_gap(page):
    text, reader = page((_RECORDS, {}))
    assert "training: not finite at step 10." in _said(reader)
    losses = [step(number, None if number == 5 else 3.0) for number in range(1, 11)]
    text, _ = page((losses, {}))
    loss = text.partition('aria-label="Loss over')[2].partition("</svg>")[0]
    line = next(path for path in re.findall(r'd="(M[^"]*)"', loss) if path.count("L") == 7)
    assert line.count("M") == 2


def test_samples_are_shown_latest_first_the_rest_folded(page):
    _, reader = page((_RECORDS, {}))
    said = _said(reader)
    order = [said.index(x) for x in ("After 10 steps", "Earlier samples (1)", "Before training")]
    assert order == sorted(order)


def test_a_sample_has_the_prompt_of_its_time(page):
    earlier = sample(1, "sat") | {"prompt": "the cat "}
    _, reader = page(([step(1, 3.0), earlier, sample(2, "ran")], {}))
    said = _said(reader)
    assert "the cat sat" in said
    assert "Once <i>upon</i> ran" in said


def test_a_long_name_leaves_room_for_the_figure(page, tmp_path):
    names = [str(write(tmp_path / f"{'x' * 60}{n}", _RECORDS)) for n in range(2)]
    text = report.make(report.read(names))
    narrow = re.findall(r'viewBox="0 0 350 [^>]*aria-label="Device memory(.*?)</svg>', text)
    labels = [label for label in re.findall(r">([^<]+)</text>", narrow[0]) if "GiB," in label]
    assert len(labels) == 4
    for label in labels:
        assert re.search(r"[\d.]+ GiB, x+\u2026x+[01]$", label)
        assert len(label) <= 50


def test_several_runs_are_compared(page):
    better = [evaluation(0, 4.0), step(1, 2.0), evaluation(30, 2.5)]
    other = {"config": {**CONFIG, "learning_rate": 0.01, "clip_norm": 1.0}}
    text, reader = page((_RECORDS, {}), (better, other))
    assert "<h1>2 runs compared</h1>" in text
    assert "They differ in learning_rate, clip_norm." in _said(reader)
    rows = re.findall(r"<tr>(.*?)</tr>", text)
    cells = [re.sub(r"<[^>]*>", " ", row).split() for row in rows[:3]]
    assert cells[1][0] == "run0"
    assert cells[1][1:4] == ["4.003", "step", "0"]
    assert cells[2][0] == "run1"
    assert re.findall(r"<strong>(.*?)<", text) == ["2.500"]
    assert "run0: 4.003 at step 0, 3.445 at step 30. run1: 4.000" in _alts(reader)["Held-out loss"]
    shown = text.partition("<h2>Configuration</h2>")[2]
    differing, folded = shown.split("All fields", 1)
    assert re.findall(r'scope="row">(\w+)<', differing) == ["learning_rate", "clip_norm"]
    assert "sequence_length" in folded


def test_the_same_runs_give_the_same_page_and_a_long_one_is_small(page):
    records = [
        step(n, 5 - n / 1e4 + n % 7 / 10, n, grad_norm=n % 5 + 1.0) for n in range(1, 20_001)
    ]
    records += [evaluation(n, 4.0) for n in range(100, 20_001, 100)]
    records += [sample(n, "word " * 2000) for n in range(100, 20_001, 100)]
    text, _ = page((records, {}), (records, {}))
    assert len(text.encode()) < 1_000_000
    again, _ = page((records, {}), (records, {}))
    assert again == text


def test_to_run_it_again_takes_another_folder(page):
    config = to_dict(Config(workdir="runs/one/", resume="must"))
    _, reader = page((_RECORDS, {"config": config}))
    said = _said(reader)
    assert "--config.workdir=runs/one-again" in said
    assert "config.resume" not in said


def test_the_shape_is_shown_only_where_it_is_that_of_the_model():
    for init, shown in (("checkpoint", False), ("random", True)):
        config = {"model": {"init": init, "architecture": {"width": 16}}, "steps": 3}
        names = [name for name, _ in words.leaves(config)]
        assert ("model.architecture.width" in names) == shown
        assert {"model.init", "steps"} <= set(names)
