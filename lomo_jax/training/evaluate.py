"""Evaluation: the held-out loss, and a sample that the model generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lomo_jax import models
from lomo_jax.data import Batch
from lomo_jax.fused.microbatches import split
from lomo_jax.training.model import Model

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase


class Evaluation(NamedTuple):
    """Means over the held-out tokens."""

    loss: float  # nats per token
    accuracy: float  # fraction of the targets that have the largest logit


def make_evaluate(
    model: Model,
    batches: Sequence[Batch],
    send: Callable[[Batch], Any],
    microbatches: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Callable[[nnx.State], Evaluation | None]:
    """Returns a function that evaluates parameters.

    Args:
      model: The model.
      batches: Held-out batches in host memory.
      send: Sends a batch to the devices.
      microbatches: Number of microbatches; a whole batch may not fit in memory.
      should_stop: Called before each batch; if it returns True the evaluation is abandoned.

    Returns:
      A function from parameters to their `Evaluation`, or None if it was abandoned.
    """

    @jax.jit
    def sums(params: nnx.State, batch: Any) -> jax.Array:
        def of_part(part: Any) -> jax.Array:
            loss, metrics = model.loss(params, part)
            return metrics.weight * jnp.stack([loss, metrics.accuracy, jnp.ones_like(loss)])

        if microbatches == 1:
            return of_part(batch)
        return jax.lax.map(of_part, split(batch, microbatches)).sum(0)

    def evaluate(params: nnx.State) -> Evaluation | None:
        running: list[jax.Array] = []
        for batch in batches:
            if should_stop():
                return None
            running.append(sums(params, send(batch)))
            # At most two batches at a time: the next one runs while the host waits for this one.
            jax.block_until_ready(running[-2:-1])
        loss, accuracy, weight = np.sum(jax.device_get(running), axis=0)
        return Evaluation(float(loss / weight), float(accuracy / weight))

    return evaluate


def continue_prompt(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    params: nnx.State,
    prompt: str,
    max_new_tokens: int,
) -> str:
    """Returns the greedy continuation of `prompt`, up to the end-of-text token."""
    tokens = tokenizer(prompt)["input_ids"]
    end = tokenizer.eos_token_id
    if tokens[-1] == end:  # some tokenizers append it, which would leave nothing to continue
        tokens = tokens[:-1]
    generated = models.generate(model.graphdef, params, np.array([tokens]), max_new_tokens)
    new = generated[0, len(tokens) :].tolist()
    return str(tokenizer.decode(new[: new.index(end)] if end in new else new))
