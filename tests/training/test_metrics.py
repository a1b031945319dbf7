"""What a run measures of itself."""

from lomo_jax import models
from lomo_jax.training.metrics import Stopwatch

_CONFIG = models.LlamaConfig(
    vocab_size=100,
    width=32,
    mlp_width=48,
    num_layers=3,
    num_heads=4,
    num_kv_heads=2,
    head_dim=10,
)


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
