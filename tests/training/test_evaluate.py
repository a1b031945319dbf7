"""The held-out loss, with and without microbatches."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from lomo_jax.losses import Metrics
from lomo_jax.training.loop import make_evaluate

_RNG = np.random.default_rng(0)
BATCHES = [
    {
        "loss": _RNG.random((4, 3), np.float32),
        "right": _RNG.random((4, 3)).round().astype(np.float32),
        "weights": _RNG.random((4, 3), np.float32).round(),
    }
    for _ in range(3)
]
BATCHES[1]["weights"][1::2] = 0  # all of the second of two microbatches


class _Given(NamedTuple):
    """A model that reads its losses from the batch."""

    rows: list[int]  # number of rows at each tracing

    def loss(self, params: Any, batch: Any):
        self.rows.append(len(batch["loss"]))
        weight = batch["weights"].sum()
        share = batch["weights"] / jnp.where(weight > 0, weight, 1)
        return (share * batch["loss"]).sum(), Metrics((share * batch["right"]).sum(), weight)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_means_are_weighted(microbatches):
    model: Any = _Given([])
    result = make_evaluate(model, BATCHES, lambda batch: batch, microbatches)({})
    weights = np.stack([batch["weights"] for batch in BATCHES])
    for name, key in (("loss", "loss"), ("accuracy", "right")):
        expected = np.average(np.stack([batch[key] for batch in BATCHES]), weights=weights)
        assert getattr(result, name) == pytest.approx(expected, rel=1e-6)
    assert set(model.rows) == {4 // microbatches}  # memory holds no more


def test_a_requested_stop_abandons_the_evaluation():
    asked = iter([False, True])
    model: Any = _Given([])
    assert make_evaluate(model, BATCHES, lambda b: b, 1, lambda: next(asked))({}) is None
