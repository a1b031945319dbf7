"""How likely a model finds continuations of prompts.

Dimensions: B batch, T tokens of a row, M scored tokens of a row, D width.

One row holds a prompt and all its continuations, which do not see each other (`models.cache`): the
prompt is read once. The first token of each continuation is predicted by the prompt's last token,
and the last one predicts nothing, so answers of one token cost no token at all.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P

from lomo_jax import sharding
from lomo_jax.errors import UserError
from lomo_jax.losses import token_losses
from lomo_jax.models.cache import PADDING, Cache
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.decoder import Decoder
from lomo_jax.models.generation import batches, bucket, read, rope_length


class Likelihood(NamedTuple):
    """How likely a continuation is."""

    log_likelihood: float  # nats, the sum over its tokens
    is_greedy: bool  # whether each of its tokens is the most likely one
    tokens: int  # their number


class Prompt(NamedTuple):
    """A prompt and what may follow it, as tokens."""

    tokens: Sequence[int]
    continuations: Sequence[Sequence[int]]


def log_likelihoods(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    prompts: Sequence[tuple[Sequence[int], Sequence[Sequence[int]]]],
    *,
    batch_size: int = 8,
    on_batch: Callable[[], None] | None = None,
) -> list[list[Likelihood]]:
    """Returns how likely each continuation of each prompt is.

    The parameters may be sharded over the current mesh, whose devices share the rows of a batch.

    Args:
      graphdef: The structure of a `Decoder`.
      params: Its parameters.
      prompts: Pairs of a prompt and its continuations, as tokens. None of them is empty.
      batch_size: Prompts that are read together; rounded up to the devices of the mesh.
      on_batch: Called before each batch; it may raise an exception.

    Returns:
      A `Likelihood` of each continuation, in lists as in `prompts`.

    Raises:
      UserError: A prompt or a continuation is empty, or both are longer than the model's
        `max_length` plus 1.

    Example:
      >>> from lomo_jax import evaluation, models
      >>> config = models.DecoderConfig(vocab_size=10, width=8, mlp_width=8, num_layers=1,
      ...                               num_heads=1, num_kv_heads=1, head_dim=8)
      >>> graphdef, params = models.init(config, seed=0)
      >>> found = evaluation.log_likelihoods(graphdef, params, [([1, 2], [[3], [4, 5]])])
      >>> [choice.tokens for choice in found[0]]
      [1, 2]
    """
    config = nnx.merge(graphdef, params).config
    rows = [_Row.of(Prompt(*prompt), config) for prompt in prompts]
    shards = sharding.batch_shards()
    count = -(-min(batch_size, max(len(rows), 1)) // shards) * shards
    lengths = [len(row.tokens) for row in rows]
    ropes = [rope_length(config, row.longest) for row in rows]
    found: dict[int, list[Likelihood]] = {}
    pending: list[tuple[list[int], jax.Array]] = []

    def fetch() -> None:
        numbers, scores = pending.pop(0)
        for number, scores_M in zip(numbers, np.asarray(scores), strict=False):
            found[number] = rows[number].likelihoods(scores_M)

    for numbers in batches(lengths, ropes, count):
        if on_batch is not None:
            on_batch()
        arrays = _stack([rows[number] for number in numbers], count)
        pending.append((numbers, _score(graphdef, ropes[numbers[0]], params, *arrays)))
        if len(pending) > 1:  # the next batch runs while the host waits for this one
            fetch()
    while pending:
        fetch()
    return [found[number] for number in range(len(rows))]


class _Row(NamedTuple):
    """A prompt and its continuations as one row."""

    tokens: list[int]
    positions: list[int]
    branches: list[int]
    sources: list[int]  # index of the token that predicts each scored token
    targets: list[int]  # the scored tokens
    lengths: list[int]  # scored tokens of each continuation
    longest: int  # tokens of the longest text

    @classmethod
    def of(cls, prompt: Prompt, config: DecoderConfig) -> _Row:
        size = len(prompt.tokens)
        longest = size - 1 + max(map(len, prompt.continuations), default=0)
        if not size or not all(map(len, prompt.continuations)):
            raise UserError("a prompt or a continuation has no tokens: each needs one")
        if longest > config.max_length:
            raise UserError(
                f"a prompt and its continuation are {longest + 1} tokens, more than the model's "
                f"max_length={config.max_length} and the one that follows"
            )
        highest = max(max(part) for part in (prompt.tokens, *prompt.continuations))
        if highest >= config.vocab_size:
            raise UserError(
                f"a text has the token {highest}, but the model only {config.vocab_size}, from 0; "
                "use the tokenizer that the model was trained with"
            )
        row = cls(list(prompt.tokens), list(range(size)), [0] * size, [], [], [], longest)
        for branch, tokens in enumerate(prompt.continuations, 1):
            first, inputs = len(row.tokens), len(tokens) - 1
            row.tokens.extend(tokens[:-1])
            row.positions.extend(range(size, size + inputs))
            row.branches.extend([branch] * inputs)
            row.sources.extend([size - 1, *range(first, first + inputs)])
            row.targets.extend(tokens)
            row.lengths.append(len(tokens))
        return row

    def likelihoods(self, scores_Mx2: np.ndarray) -> list[Likelihood]:
        ends = np.cumsum([0, *self.lengths])
        parts = [scores_Mx2[a:b] for a, b in itertools.pairwise(ends)]
        return [
            Likelihood(-float(part[:, 0].sum(dtype=np.float64)), bool(part[:, 1].all()), len(part))
            for part in parts
        ]


def _stack(batch: list[_Row], count: int) -> tuple[np.ndarray, ...]:
    """Pads rows to one length, and the batch to `count` rows."""
    length = bucket(max(len(row.tokens) for row in batch))
    scored = bucket(max(len(row.targets) for row in batch))

    def pad(name: str, size: int, fill: int) -> np.ndarray:
        padded = np.full((count, size), fill, np.int32)
        for line, row in zip(padded, batch, strict=False):
            values = getattr(row, name)
            line[: len(values)] = values
        return padded

    fills = {"tokens": 0, "positions": PADDING, "branches": 0}
    return (
        *(pad(name, length, fill) for name, fill in fills.items()),
        *(pad(name, scored, 0) for name in ("sources", "targets")),
    )


@functools.partial(jax.jit, static_argnums=(0, 1))
def _score(
    graphdef: nnx.GraphDef[Decoder],
    rope_length: int,
    params: nnx.State,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    branches_BxT: jax.Array,
    sources_BxM: jax.Array,
    targets_BxM: jax.Array,
) -> jax.Array:
    """Returns float32 `[B, M, 2]`: the loss of each target, and 1 where it is the likeliest."""
    model = nnx.merge(graphdef, params)
    (batch, length), scored = tokens_BxT.shape, sources_BxM.shape[1]
    cache = Cache.empty(model.config, batch, length, model.embedding.dtype)
    x_BxTxD, _ = read(
        model, cache, tokens_BxT, positions_BxT, branches_BxT, rope_length=rope_length
    )
    x_BxMxD = _take(x_BxTxD, sources_BxM)
    loss_N, is_best_N = token_losses(
        x_BxMxD.reshape(batch * scored, -1),
        model.head(),
        jnp.asarray(targets_BxM).reshape(-1),
        cap=model.config.logit_cap,
    )
    both = [sharding.replicate(each) for each in (loss_N, is_best_N)]
    return jnp.stack(both, axis=-1).reshape(batch, scored, 2)


def _take(x_BxTxD: jax.Array, index_BxM: jax.Array) -> jax.Array:
    """Returns some tokens of each row, `[B, M, D]`."""

    def take(x_BxTxD, index_BxM):
        return jnp.take_along_axis(x_BxTxD, index_BxM[:, :, None], axis=1)

    if not sharding.is_explicit():
        return take(x_BxTxD, index_BxM)
    both = P(sharding.BATCH, None, None)
    take = jax.shard_map(
        take, in_specs=(both, P(sharding.BATCH, None)), out_specs=both, check_vma=False
    )
    return take(x_BxTxD, sharding.shard_batch(index_BxM))
