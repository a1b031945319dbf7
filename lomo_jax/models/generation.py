"""Text generation with a cache of keys and values.

Dimensions: B batch, T prompt, N new tokens, V vocabulary, D width.

A batch of prompts is padded at the left to a length of a few (`bucket`), so the programs are
compiled once for each. The prompts are read in one call, and then one token at a time.
"""

from __future__ import annotations

import bisect
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from lomo_jax import sharding
from lomo_jax.errors import UserError
from lomo_jax.models.cache import PADDING, Cache
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.decoder import Decoder
from lomo_jax.models.sampling import Sampling, choose

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

_READ_AT_ONCE = 512  # tokens of each row; bounds the memory of attention
_LOOK_EVERY = 16  # tokens between two looks for the end of a text by its strings


def generate(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    prompts: Sequence[Sequence[int]] | np.ndarray,
    max_new_tokens: int,
    *,
    sampling: Sampling | None = None,
    stop_tokens: Sequence[int] = (),
    is_finished: Callable[[list[int]], bool] | None = None,
    batch_size: int = 8,
    seed: int = 0,
    on_batch: Callable[[], None] | None = None,
) -> list[list[int]]:
    """Continues prompts.

    The parameters may be sharded over the current mesh, or in host memory: each token then moves
    all layers to the device. Where rotary embeddings depend on the length of a text, it is that of
    the prompt and `max_new_tokens`, from the first token on.

    Args:
      graphdef: The structure of a `Decoder`.
      params: Its parameters.
      prompts: The tokens of each prompt, at least one; their lengths may differ.
      max_new_tokens: The largest number of tokens to add to each prompt.
      sampling: How to choose tokens; by default greedily.
      stop_tokens: Tokens that end a text.
      is_finished: Whether the new tokens of a row so far are enough; called now and then. The row
        keeps the tokens up to the first one with which they are.
      batch_size: Prompts that are continued together; rounded up to the devices of the mesh.
      seed: Random seed. The result does not depend on `batch_size`.
      on_batch: Called before each batch; it may raise an exception.

    Returns:
      The new tokens of each prompt, without the stop token.

    Raises:
      UserError: A prompt is empty, or with `max_new_tokens` exceeds the model's `max_length`, or a
        field of `sampling` makes no sense.

    Example:
      >>> from lomo_jax import models
      >>> config = models.DecoderConfig(vocab_size=10, width=8, mlp_width=8, num_layers=1,
      ...                               num_heads=1, num_kv_heads=1, head_dim=8)
      >>> graphdef, params = models.init(config, seed=0)
      >>> new = models.generate(graphdef, params, [[1, 2, 3], [4]], max_new_tokens=5)
      >>> [len(tokens) for tokens in new]
      [5, 5]
    """
    prompts = [[int(token) for token in prompt] for prompt in prompts]
    config = nnx.merge(graphdef, params).config
    sampling = sampling or Sampling()
    _check(config, prompts, max_new_tokens, sampling)
    if sampling.is_greedy:
        sampling = Sampling(sampling.repetition_penalty)
    shards = sharding.batch_shards()
    rows = -(-min(batch_size, max(len(prompts), 1)) // shards) * shards
    lengths = [len(prompt) for prompt in prompts]
    ropes = [rope_length(config, length + max_new_tokens - 1) for length in lengths]
    found: dict[int, list[int]] = {}
    for batch in batches(lengths, ropes, rows):
        if on_batch is not None:
            on_batch()
        texts = [prompts[i] for i in batch]
        new = _Batch(graphdef, config, texts, rows, max_new_tokens, ropes[batch[0]]).run(
            params, batch, sampling, stop_tokens, is_finished, seed
        )
        found.update(zip(batch, new, strict=True))
    return [found[i] for i in range(len(prompts))]


def generate_text(
    graphdef: nnx.GraphDef[Decoder],
    params: nnx.State,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    max_new_tokens: int,
    *,
    stop_strings: Sequence[str] = (),
    sampling: Sampling | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> list[str]:
    """Continues texts, up to an end of text or to the first of `stop_strings`.

    Args:
      graphdef: See `generate`.
      params: See `generate`.
      tokenizer: The tokenizer of the model.
      prompts: The texts.
      max_new_tokens: See `generate`.
      stop_strings: Strings that end a text; they are not a part of the result.
      sampling: See `generate`.
      batch_size: See `generate`.
      seed: See `generate`.

    Returns:
      The new text of each prompt.

    Raises:
      UserError: See `generate`.
    """
    ends = end_tokens(nnx.merge(graphdef, params).config, tokenizer)
    tokens = [encode_prompt(tokenizer, prompt) for prompt in prompts]

    def is_finished(new: list[int]) -> bool:
        text = tokenizer.decode(new)
        return any(stop in text for stop in stop_strings)

    new = generate(
        graphdef,
        params,
        tokens,
        max_new_tokens,
        sampling=sampling,
        stop_tokens=ends,
        is_finished=is_finished if stop_strings else None,
        batch_size=batch_size,
        seed=seed,
    )
    return [cut_at(str(tokenizer.decode(row)), stop_strings) for row in new]


def encode_prompt(tokenizer: PreTrainedTokenizerBase, prompt: str) -> list[int]:
    """Returns the tokens of a text to be continued."""
    tokens = list(tokenizer(prompt)["input_ids"])
    # Some tokenizers append an end of text, which would leave nothing to continue.
    if len(tokens) > 1 and tokens[-1] == tokenizer.eos_token_id:
        tokens = tokens[:-1]
    return tokens


def end_tokens(config: DecoderConfig, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """Returns the tokens that end a text, of the model and of its tokenizer."""
    ends = config.eos_id if isinstance(config.eos_id, tuple) else (config.eos_id,)
    end_of_text: Any = tokenizer.eos_token_id
    known = (end for end in (*ends, end_of_text) if end is not None)
    return tuple(dict.fromkeys(known))


def cut_at(text: str, stop_strings: Sequence[str]) -> str:
    """Returns the text before the first of some strings."""
    ends = [place for stop in stop_strings if (place := text.find(stop)) >= 0]
    return text[: min(ends)] if ends else text


def bucket(length: int) -> int:
    """Returns the next of 16, 24, 32, 48, 64, 96, 128, ...: programs are compiled for these."""
    size = 1 << max(length - 1, 15).bit_length()
    return size * 3 // 4 if length <= size * 3 // 4 and size > 16 else size


def batches(lengths: Sequence[int], ropes: Sequence[int], size: int) -> Iterator[list[int]]:
    """Yields the numbers of the rows of each batch: those of like length, which are padded least.

    Args:
      lengths: The tokens of each row.
      ropes: The `rope_length` of each row: a batch has only one, as no row depends on the others.
      size: The largest number of rows of a batch.
    """
    order = sorted(range(len(lengths)), key=lambda row: (ropes[row], -lengths[row]))
    for _, group in itertools.groupby(order, key=ropes.__getitem__):
        while batch := list(itertools.islice(group, size)):
            yield batch


def rope_length(config: DecoderConfig, longest: int) -> int:
    """Returns a length with the rotary embeddings of texts of up to `longest` tokens."""
    scaling = config.rope_scaling
    if scaling is not None and longest <= scaling.original_max_length < config.max_length:
        return scaling.original_max_length
    return config.max_length


def _check(
    config: DecoderConfig, prompts: list[list[int]], max_new_tokens: int, sampling: Sampling
) -> None:
    try:
        sampling.check()
    except ValueError as error:
        raise UserError(str(error)) from None
    if max_new_tokens < 1:
        raise UserError(f"max_new_tokens={max_new_tokens} must be 1 or more")
    for prompt in prompts:
        if not prompt:
            raise UserError("a prompt has no tokens; begin it with the model's first token")
        if not 0 <= min(prompt) <= max(prompt) < config.vocab_size:
            raise UserError(
                f"a prompt has the token {max(prompt)}, but the model only {config.vocab_size}, "
                "from 0; use the tokenizer that the model was trained with"
            )
        if len(prompt) + max_new_tokens > config.max_length:
            raise UserError(
                f"a prompt and its continuation together are {len(prompt) + max_new_tokens} "
                f"tokens, more than the model's max_length={config.max_length}"
            )


class _State(NamedTuple):
    """Texts between two tokens."""

    cache: Cache  # of all tokens but the last one of each row
    last: jax.Array  # int32 [B]
    new: jax.Array  # int32 [B, N]
    is_done: jax.Array  # bool [B]
    made: jax.Array  # int32 [], new tokens of a row that is not done
    seen: jax.Array | None  # bool [B, V], tokens of each row, for a repetition penalty


class _Rows(NamedTuple):
    """What does not change while texts are continued."""

    lengths: jax.Array | np.ndarray  # int32 [B], tokens of the prompts
    numbers: jax.Array | np.ndarray  # int32 [B], of the prompts among all
    stops: np.ndarray  # int32, tokens that end a text
    sampling: Sampling
    seed: np.uint32


class _Batch:
    """Prompts that are continued together."""

    def __init__(
        self,
        graphdef: nnx.GraphDef[Decoder],
        config: DecoderConfig,
        prompts: list[list[int]],
        num_rows: int,
        max_new_tokens: int,
        rope_length: int,
    ) -> None:
        self.graphdef, self.config = graphdef, config
        self.prompts, self.num_rows, self.max_new_tokens = prompts, num_rows, max_new_tokens
        self.tokens_BxT = np.zeros((num_rows, bucket(max(map(len, prompts)))), np.int32)
        self.positions_BxT = np.full(self.tokens_BxT.shape, PADDING, np.int32)
        for row, prompt in enumerate(prompts):
            self.tokens_BxT[row, -len(prompt) :] = prompt
            self.positions_BxT[row, -len(prompt) :] = range(len(prompt))
        self.rope_length = rope_length

    def run(
        self,
        params: nnx.State,
        numbers: Sequence[int],
        sampling: Sampling,
        stop_tokens: Sequence[int],
        is_finished: Callable[[list[int]], bool] | None,
        seed: int,
    ) -> list[list[int]]:
        """Returns the new tokens of each prompt; see `generate`."""
        lengths_B, numbers_B = np.zeros((2, self.num_rows), np.int32)
        lengths_B[: len(numbers)] = [len(prompt) for prompt in self.prompts]
        numbers_B[: len(numbers)] = numbers
        stops = np.array(list(stop_tokens) or [-1], np.int32)
        rows = _Rows(lengths_B, numbers_B, stops, sampling, np.uint32(seed))
        is_done_B = np.arange(self.num_rows) >= len(self.prompts)
        program = self.graphdef, self.rope_length
        slots = self.tokens_BxT.shape[1] + bucket(self.max_new_tokens)
        state = _read_prompts(
            *(*program, slots, params, self.tokens_BxT, self.positions_BxT),
            *(is_done_B, self._seen(sampling), rows),
        )
        made, every = 1, self.max_new_tokens if is_finished is None else _LOOK_EVERY
        while True:
            new_BxN, is_done_B = jax.device_get(_replicate(state.new, state.is_done))
            texts = [_until(new_BxN[row, :made], stops) for row in range(len(self.prompts))]
            if is_finished is not None:
                is_done_B = is_done_B.copy()
                is_done_B[: len(texts)] |= [is_finished(text) for text in texts]
            if made == self.max_new_tokens or is_done_B.all():
                break
            made = min(made + every, self.max_new_tokens)
            state = _continue(*program, params, state, is_done_B, np.int32(made), rows)
        if is_finished is None:
            return texts
        # The first tokens that are enough, of all those since the last look.
        found = []
        for text in texts:
            is_enough = functools.partial(lambda text, n: is_finished(text[:n]), text)
            found.append(text[: bisect.bisect_left(range(len(text)), True, key=is_enough)])
        return found

    def _seen(self, sampling: Sampling) -> np.ndarray | None:
        if sampling.repetition_penalty is None:
            return None
        seen_BxV = np.zeros((self.num_rows, self.config.vocab_size), bool)
        for row, prompt in enumerate(self.prompts):
            seen_BxV[row, prompt] = True
        return seen_BxV


def _until(new_N: np.ndarray, stops: np.ndarray) -> list[int]:
    """Returns the tokens before the first one that ends a text."""
    places = np.flatnonzero(np.isin(new_N, stops))
    return new_N[: places[0] if len(places) else len(new_N)].tolist()


@jax.jit
def _replicate(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(map(sharding.replicate, arrays))


@functools.partial(jax.jit, static_argnums=(0, 1, 2))
def _read_prompts(
    graphdef: nnx.GraphDef[Decoder],
    rope_length: int,
    slots: int,
    params: nnx.State,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    is_done_B: jax.Array,
    seen_BxV: jax.Array | None,
    rows: _Rows,
) -> _State:
    """Reads the prompts and chooses the first new tokens."""
    model = nnx.merge(graphdef, params)
    batch, length = tokens_BxT.shape
    cache = Cache.empty(model.config, batch, slots, model.embedding.dtype)
    x_BxTxD, cache = read(model, cache, tokens_BxT, positions_BxT, rope_length=rope_length)
    tokens, is_done_B, seen_BxV = sharding.shard_batch(
        (jnp.zeros((batch, slots - length), jnp.int32), is_done_B, seen_BxV)
    )
    first = jnp.zeros((), jnp.int32)
    state = _State(cache, tokens[:, 0], tokens, is_done_B, first, seen_BxV)
    return _choose_next(model, state, x_BxTxD[:, -1:], rows)


@functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=3)
def _continue(
    graphdef: nnx.GraphDef[Decoder],
    rope_length: int,
    params: nnx.State,
    state: _State,
    is_done_B: jax.Array,
    until: jax.Array,
    rows: _Rows,
) -> _State:
    """Makes new tokens until there are `until`, or all rows are done."""
    model = nnx.merge(graphdef, params)
    is_done_B, lengths_B = sharding.shard_batch((is_done_B, rows.lengths))

    def go_on(state: _State) -> jax.Array:
        return (state.made < until) & ~sharding.replicate(state.is_done).all()

    def make(state: _State) -> _State:
        positions_Bx1 = (lengths_B + state.made - 1)[:, None]
        tokens_Bx1 = state.last[:, None]
        x_Bx1xD, cache = model.extend(
            *(state.cache, tokens_Bx1, positions_Bx1, jnp.zeros_like(tokens_Bx1), rope_length)
        )
        return _choose_next(model, state._replace(cache=cache), x_Bx1xD, rows)

    return jax.lax.while_loop(go_on, make, state._replace(is_done=is_done_B))


def _choose_next(model: Decoder, state: _State, x_Bx1xD: jax.Array, rows: _Rows) -> _State:
    """Returns the state with one more token of each row."""
    logits_BxV = model.logits(x_Bx1xD)[:, 0]
    key = jax.random.fold_in(jax.random.key(rows.seed), state.made)
    numbers_B, stops = sharding.shard_batch(jnp.asarray(rows.numbers)), jnp.asarray(rows.stops)
    last_B = choose(logits_BxV, state.seen, rows.sampling, key, numbers_B)
    zero = jnp.zeros((), jnp.int32)
    new_BxN = jax.lax.dynamic_update_slice(state.new, last_B[:, None], (zero, state.made))
    is_done_B = state.is_done | (last_B[:, None] == stops).any(axis=1)
    seen_BxV = state.seen
    if seen_BxV is not None:
        seen_BxV |= last_B[:, None] == jnp.arange(seen_BxV.shape[1])
    return _State(state.cache, last_B, new_BxN, is_done_B, state.made + 1, seen_BxV)


def read(
    model: Decoder,
    cache: Cache,
    tokens_BxT: jax.Array,
    positions_BxT: jax.Array,
    branches_BxT: jax.Array | None = None,
    *,
    rope_length: int,
) -> tuple[jax.Array, Cache]:
    """Reads rows that may be long, a part at a time; see `Decoder.extend`."""
    batch, length = tokens_BxT.shape
    if branches_BxT is None:
        branches_BxT = jnp.zeros_like(tokens_BxT)
    at_once = min(length & -length, _READ_AT_ONCE) if length > _READ_AT_ONCE else length
    if at_once == length:
        return model.extend(cache, tokens_BxT, positions_BxT, branches_BxT, rope_length)

    def extend(cache: Cache, part: tuple[jax.Array, jax.Array, jax.Array]):
        tokens_BxQ, positions_BxQ, branches_BxQ = part
        x_BxQxD, cache = model.extend(cache, tokens_BxQ, positions_BxQ, branches_BxQ, rope_length)
        return cache, x_BxQxD

    def parts(x_BxT: jax.Array) -> jax.Array:
        return jnp.moveaxis(x_BxT.reshape(batch, length // at_once, at_once), 1, 0)

    rows = jax.tree.map(parts, sharding.shard_batch((tokens_BxT, positions_BxT, branches_BxT)))
    cache, x_PxBxQxD = jax.lax.scan(extend, cache, rows)
    return jnp.moveaxis(x_PxBxQxD, 0, 1).reshape(batch, length, -1), cache
