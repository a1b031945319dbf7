"""What a run measures of itself."""

import json
import math

from lomo_jax import models
from lomo_jax.training.metrics import MetricsFile, Stopwatch

_CONFIG = models.LlamaConfig(
    vocab_size=100,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


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


def test_metrics_of_earlier_runs_are_kept(tmp_path):
    for run in range(3):
        file = MetricsFile(tmp_path / "metrics.jsonl")
        file.write({"run": run})
        file.close()
    kept = {path.name: json.loads(path.read_text())["run"] for path in tmp_path.iterdir()}
    assert kept == {"metrics-1.jsonl": 0, "metrics-2.jsonl": 1, "metrics.jsonl": 2}
