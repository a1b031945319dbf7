"""The text and the images of the page."""

import base64
import dataclasses
import html.parser
import re

import numpy as np
import pytest
import runs
from workdirs import INFO, evaluation, resumed, sample, step, write

from lomo_jax import report
from lomo_jax.run_files import RunInfo
from lomo_jax.training import Config
from lomo_jax.training.loop import train

_RECORDS = [
    *(evaluation(0, 4.003, 0.0), sample(0, "<script>alert(1)</script>", 0.0)),
    *(step(1, 4.1234, 10.0, grad_norm=2.0), step(10, None, 70.0, device_memory_gib=13.5)),
    *(evaluation(10, 3.1116, 80.0), sample(10, 'a "time" & then', 80.0)),
    *(step(20, 3.2226, 130.0, device_memory_gib=13.9, tokens_per_second=3000.0), resumed(10, 9e6)),
    step(20, 3.3336, 9e6 + 52, device_memory_gib=13.8, tokens_per_second=2000.0, skipped=7),
    *(step(30, 3.2, 9e6 + 110, skipped=7), evaluation(30, 3.4449, 9e6 + 120)),
]


class _Reader(html.parser.HTMLParser):
    """Gathers tags, images and text, and checks that every element is closed."""

    _VOID = frozenset({"meta", "img"})

    def __init__(self, page):
        super().__init__()
        self.open, self.tags, self.parts = [], [], []
        self.feed(page)
        self.close()
        assert self.open == []
        images = [attrs for tag, attrs in self.tags if tag == "img"]
        self.alts = [image["alt"] for image in images]
        self.sources = [image["src"] for image in images]
        self.drawings = [
            base64.b64decode(source.removeprefix("data:image/svg+xml;base64,")).decode()
            for source in self.sources
        ]
        self.text = " ".join(" ".join(self.parts).split())

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in self._VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" not in self.open:
            self.parts.append(data)


@pytest.fixture
def page(tmp_path):
    """Writes runs; returns their page as HTML and as a `_Reader`."""

    def make(*runs):
        folders = [
            write(tmp_path / f"run{number}", records, **options)
            for number, (records, options) in enumerate(runs)
        ]
        markup = report.render(report.read(folders))
        return markup, _Reader(markup)

    return make


def test_facts(page):
    _, reader = page((_RECORDS, {}))
    for expected in (
        "Held-out loss 4.003 → 3.445",
        "Best held-out loss 3.112 at step 10",
        "Training loss 4.123 → 3.200",
        "Steps 30 of 30",
        # The median of 1000, 1000, 2000 and 1000; the resume superseded 3000.
        "Median throughput 1,000 tokens/s",
        "Training time 0:04:10",  # 130 s before the stop, 120 s after it
        "Model /models/llama-7b Parameters 6,738.4 M",
        "Device 2 \N{MULTIPLICATION SIGN} NVIDIA H100",
        "Versions python 3.12.3, jax 0.12.0, lomo_jax 0.1.0",
        "Resumed at step 10",
        "Skipped updates 7",
    ):
        assert expected in reader.text


def test_memory_by_parts_with_the_limit_and_the_measured_peak(page):
    _, reader = page((_RECORDS, {}))
    for expected in (
        *("weights 12.55 GiB", "layer inputs 1.00 GiB", "other temporaries 0.61 GiB"),
        *("optimizer state 10.24 MiB", "planned in all 14.17 GiB", "JAX may allocate 71.25 GiB"),
        *("planned in host memory 0.25 GiB", "measured peak 13.80 GiB"),
    ):
        assert expected in reader.text


@pytest.mark.slow
@pytest.mark.usefixtures("standard_promotion")
def test_a_run_of_the_trainer(tmp_path):
    text = runs.write_text(tmp_path / "text.jsonl")
    folder = tmp_path / "run"
    train(runs.make_config(text, folder, prompt="the cat ", prompt_tokens=8))
    info = RunInfo.read(folder)
    assert info is not None
    # A CPU has no memory limit: set one.
    memory = dataclasses.replace(info.memory, usable_gib=71.25)
    dataclasses.replace(info, memory=memory).write(folder)
    reader = _Reader(report.render(report.read([folder])))
    assert f"planned in all {info.memory.total_gib * 1024:.2f} MiB" in reader.text
    assert "JAX may allocate 71.25 GiB" in reader.text
    assert "Steps 12 of 12" in reader.text
    assert [alt.split(".")[0] for alt in reader.alts] == [
        *("Loss", "Accuracy", "Learning rate", "Tokens per second")
    ]


def test_an_unfinished_run_is_marked(page):
    _, reader = page(([step(1, 2.5)], {}))
    assert "Steps 1 of 30, not finished" in reader.text
    assert "Held-out loss not evaluated yet" in reader.text
    assert "Samples" not in reader.text


def test_text_of_runs_is_escaped(page):
    hostile = "</title></pre><script>alert(2)</script>"
    info = dataclasses.replace(INFO, device=hostile, versions={hostile: hostile})
    config = Config(workdir=hostile, prompt=hostile)
    markup, reader = page((_RECORDS, {"config": config}), (_RECORDS, {"info": info}))
    assert "script" not in {tag for tag, _ in reader.tags}
    assert not re.search(r"<script|<i>upon", markup)
    for expected in ("<script>alert(1)</script>", "Once <i>upon</i>", 'a "time" & then', hostile):
        assert expected in reader.text


def test_the_name_of_a_run_is_escaped(tmp_path):
    folders = [write(tmp_path / f'{n}"><img src=x onerror=y>', _RECORDS) for n in range(2)]
    for some in (folders, folders[:1]):
        reader = _Reader(report.render(report.read(some)))
        assert "x" not in reader.sources
        assert not any("onerror" in attrs for _, attrs in reader.tags)


def test_the_page_refers_to_nothing_outside_itself(page):
    markup, reader = page((_RECORDS, {}), (_RECORDS, {}))
    assert {"link", "iframe", "script", "svg", "object"}.isdisjoint(dict(reader.tags))
    assert "url(" not in markup
    assert "@import" not in markup
    assert "://" not in markup
    sources = [value for _, attrs in reader.tags for value in (attrs.get("src"), attrs.get("href"))]
    assert [source for source in sources if source] == reader.sources
    assert all(source.startswith("data:image/svg+xml;base64,") for source in reader.sources)
    references = re.findall(r"(?:href=\"|url\()(.)", "".join(reader.drawings))
    assert set(references) == {"#"}


def test_charts_are_described(page):
    more = {"grad_norm": 1.5, "loss_scale": 32768.0, "flop_utilisation": 0.41}
    _, reader = page(([step(1, 3.25, **more), step(2, 2.9, **more), evaluation(2, 3.5)], {}))
    assert [alt.split(".")[0] for alt in reader.alts] == [
        *("Loss", "Accuracy", "Learning rate", "Tokens per second"),
        *("Share of peak compute", "Gradient norm", "Loss scale"),
    ]
    expected = "training: 3.25 at step 1 to 2.9 at step 2; held-out: 3.5 at step 2"
    assert expected in reader.alts[0]
    assert [attrs for tag, attrs in reader.tags if tag == "html"] == [{"lang": "en"}]


def test_null_leaves_a_gap_and_is_reported(page):
    losses = [step(number, None if number == 5 else 3.0 + number) for number in range(1, 11)]
    _, reader = page((losses, {}))
    assert "training: 1 not finite, the first at step 5." in reader.text
    lines = re.findall(r'd="(M[^"]*)"', reader.drawings[0])
    assert [line.count("M") for line in lines if line.count("L") == 7] == [2]
    _, reader = page(([step(1, None), step(2, None)], {}))
    assert "Training loss not finite" in reader.text


def test_a_spike_is_reported_and_does_not_flatten_the_rest(page):
    losses = [step(n, 1000.0 if n == 50 else 3 - n / 100) for n in range(101)]
    _, reader = page((losses, {}))
    assert "training: 1 above the chart, up to 1,000 at step 50." in reader.text


def test_the_latest_sample_comes_first(page):
    _, reader = page((_RECORDS, {}))
    order = [reader.text.index(x) for x in ("After 10 steps", "After 0 steps")]
    assert order == sorted(order)


def test_several_runs_are_compared(page):
    better = [evaluation(0, 4.0), step(1, 2.0), evaluation(30, 2.5)]
    config = Config(steps=30, learning_rate=0.01, clip_norm=1.0)
    markup, reader = page((_RECORDS, {}), (better, {"config": config}))
    assert "<h1>2 runs compared</h1>" in markup
    assert "Held-out loss 4.003 → 3.445 4.000 → 2.500" in reader.text
    held_out = next(alt for alt in reader.alts if alt.startswith("Held-out loss"))
    assert "run0: 4.003 at step 0 to 3.4449 at step 30; run1: 4 at" in held_out
    table = markup.partition("<h2>Config</h2>")[2].partition("</table>")[0]
    names = re.findall(r'scope="row">(\w+)<', table)
    assert names == ["learning_rate", "clip_norm"]


def test_the_same_long_run_gives_the_same_small_page(page):
    records = [step(n, 5 - n / 1e4 + n % 7 / 10, n) for n in range(1, 5001)]
    records += [evaluation(n, 4.0) for n in range(100, 5001, 100)]
    records += [sample(n, "word " * 2000) for n in range(100, 5001, 100)]
    markup, _ = page((records, {}))
    assert len(markup.encode()) < 1_000_000
    again, _ = page((records, {}))
    assert again == markup


def test_the_running_mean():
    from lomo_jax.report.charts import _running_mean

    values = np.zeros(60)
    values[[10, 30]] = (3.0, np.nan)
    mean = _running_mean(values)  # over windows of three points
    np.testing.assert_allclose(mean[8:13], [0, 1, 1, 1, 0])
    assert np.flatnonzero(np.isnan(mean)).tolist() == [30]
    np.testing.assert_allclose(_running_mean(np.arange(60.0)), np.arange(60.0))
