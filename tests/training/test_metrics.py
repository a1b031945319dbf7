"""What a run measures of itself."""

import json
import math

import jax
import pytest

from lomo_jax import models
from lomo_jax.training.metrics import MetricsFile, Stopwatch, flops_per_token, peak_flops

_CONFIG = models.LlamaConfig(
    vocab_size=100,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


def test_flops_are_six_for_each_weight_of_a_product_and_attention():
    _, params = models.abstract(_CONFIG)
    matrices = sum(leaf.size for leaf in jax.tree.leaves(params) if leaf.ndim >= 2)
    # The norms' scales are stacked too; neither they nor the embedding's look-up are products.
    matrices -= 3 * 2 * 32 + 100 * 32
    # Scores and values: 2 operations each for the (t + 1) / 2 keys that a query sees on average, by
    # the width of all heads, thrice for forward and backward.
    attention = 3 * 3 * 2 * 2 * (20 / 2) * 40
    assert flops_per_token(_CONFIG, 20) == 6 * matrices + attention


def test_a_records_file_is_valid_json_lines(tmp_path):
    file = MetricsFile(tmp_path / "metrics.jsonl")
    file.write({"step": 1, "loss": 0.5})
    file.write({"step": 2, "loss": math.nan})
    # Readable before it is closed: a person may look at any time.
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    file.close()
    assert [json.loads(line) for line in lines] == [
        {"step": 1, "loss": 0.5},
        {"step": 2, "loss": None},
    ]


def test_stopwatch_counts_the_steps_since_the_last_reading(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("time.perf_counter", lambda: now[0])
    stopwatch = Stopwatch(_CONFIG, batch_size=2, sequence_length=8)
    now[0] = 100.0  # an evaluation, say
    stopwatch.restart()
    for _ in range(3):
        stopwatch.step()
    now[0] += 6.0
    assert stopwatch.read()["tokens_per_second"] == 3 * 16 / 6
    stopwatch.step()
    now[0] += 1.0
    assert stopwatch.read()["tokens_per_second"] == 16


@pytest.mark.parametrize(
    ("kind", "tflops"),
    [
        ("NVIDIA GeForce RTX 3090", 71.0),
        ("NVIDIA L4", 121.0),
        ("NVIDIA L40S", 362.0),
        ("NVIDIA A100-SXM4-80GB", 312.0),
        ("NVIDIA H100 80GB HBM3", 989.4),
    ],
)
def test_peaks_go_by_the_kind_of_device(kind, tflops):
    assert peak_flops(kind) == tflops * 1e12


def test_an_unknown_device_has_no_peak():
    assert peak_flops("cpu") is None


def test_metrics_of_earlier_runs_are_kept(tmp_path):
    for run in range(3):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.write({"run": run})
        file.close()
    kept = {path.name: json.loads(path.read_text())["run"] for path in tmp_path.iterdir()}
    assert kept == {"metrics-1.jsonl": 0, "metrics-2.jsonl": 1, "metrics.jsonl": 2}
