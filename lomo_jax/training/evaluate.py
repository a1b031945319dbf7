"""The held-out loss, and a sample of what the model writes."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from transformers import PreTrainedTokenizerBase

from lomo_jax import models
from lomo_jax.data import Batch
from lomo_jax.fused.microbatches import split
from lomo_jax.training.model import Model


class Evaluation(NamedTuple):
    """Means over the held-out tokens."""

    loss: float  # nats a token
    accuracy: float  # share of the tokens that the model found likeliest


def make_evaluate(
    model: Model,
    batches: Sequence[Batch],
    send: Callable[[Batch], Any],
    microbatches: int = 1,
    is_over: Callable[[], bool] = lambda: False,
) -> Callable[[nnx.State], Evaluation | None]:
    """Returns a function from parameters to their evaluation on all of `batches`.

    It sends a batch to the devices when it is its turn, and asks `is_over` then: if so it gives up,
    with None. A batch goes through the model in as many parts as in a step, which may be as many as
    there is room for.
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
        under_way: list[jax.Array] = []
        for batch in batches:
            if is_over():
                return None
            under_way.append(sums(params, send(batch)))
            # The next batch computes while this one is waited for, and no more are under way.
            jax.block_until_ready(under_way[-2:-1])
        loss, accuracy, weight = np.sum(jax.device_get(under_way), axis=0)
        return Evaluation(float(loss / weight), float(accuracy / weight))

    return evaluate


def continue_prompt(
    model: Model,
    tokenizer: PreTrainedTokenizerBase,
    params: nnx.State,
    prompt: str,
    max_new_tokens: int,
) -> str:
    """Returns the likeliest continuation of `prompt`, as far as the end of its text."""
    tokens = tokenizer(prompt)["input_ids"]
    end = tokenizer.eos_token_id
    if tokens[-1] == end:  # some tokenizers end every text, which would leave nothing to continue
        tokens = tokens[:-1]
    written = models.generate(model.graphdef, params, np.array([tokens]), max_new_tokens)
    new = written[0, len(tokens) :].tolist()
    return str(tokenizer.decode(new[: new.index(end)] if end in new else new))
