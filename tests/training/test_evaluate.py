"""The held-out loss, of batches as a whole and in parts."""

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import pytest

from lomo_jax.losses import Metrics
from lomo_jax.training.evaluate import make_evaluate

_RNG = np.random.default_rng(0)
BATCHES = [
    {
        "loss": _RNG.random((4, 3), np.float32),
        "right": _RNG.random((4, 3)).round().astype(np.float32),
        "weights": _RNG.random((4, 3), np.float32).round(),
    }
    for _ in range(3)
]
BATCHES[1]["weights"][1::2] = 0  # of two parts, the second one


class _Given(NamedTuple):
    """A model whose losses stand in the batch."""

    rows: list[int]  # of the batches that it was traced for

    def loss(self, params: Any, batch: Any):
        self.rows.append(len(batch["loss"]))
        weight = batch["weights"].sum()
        share = batch["weights"] / jnp.where(weight > 0, weight, 1)
        return (share * batch["loss"]).sum(), Metrics((share * batch["right"]).sum(), weight)


@pytest.mark.parametrize("microbatches", [1, 2, 4])
def test_means_over_the_weights(microbatches):
    model: Any = _Given([])
    result = make_evaluate(model, BATCHES, lambda batch: batch, microbatches)({})
    weights = np.stack([batch["weights"] for batch in BATCHES])
    for name, key in (("loss", "loss"), ("accuracy", "right")):
        expected = np.average(np.stack([batch[key] for batch in BATCHES]), weights=weights)
        assert getattr(result, name) == pytest.approx(expected, rel=1e-6)
    assert set(model.rows) == {4 // microbatches}  # there is room for no more


def test_one_that_is_over_gives_up():
    asked = iter([False, True])
    model: Any = _Given([])
    assert make_evaluate(model, BATCHES, lambda b: b, 1, lambda: next(asked))({}) is None
