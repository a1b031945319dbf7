"""A decoder in Flax nnx whose layers are stacked and scanned.

Dimensions: B batch, T sequence, D width, L layers, V vocabulary.

What differs by layer (window, rotary frequencies) is scanned beside the weights, as arrays with a
layer axis, so that all layers run the same program.

Under a mesh of `lomo_jax.sharding.make_mesh` the parameters are sharded by `RULES` and a batch by
`sharding.BATCH`. Without a mesh the sharding calls do nothing.

References:
  Touvron et al., LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import lora, sharding
from lomo_jax.fused.arrays import to_device
from lomo_jax.models import attention as attention_
from lomo_jax.models import rope
from lomo_jax.models.cache import PADDING, Cache, LayerCache
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.embedding import EMBEDDING, look_up
from lomo_jax.models.experts import Load, balance
from lomo_jax.models.layers import NORMAL, Context, Layer, Norm, linear, multiply
from lomo_jax.quantize import quantize_kernels

# How `sharding.shardings` shards the parameters. A block's first matrices are split along their
# outputs (whole heads, columns of the MLP), its last matrix along its inputs (Megatron).
RULES: sharding.Rules = (
    # Quantised kernels, [L, O, I / 2] and [L, O, I / 64]; see `lomo_jax.quantize`.
    (r"kernel/absmax_", P()),
    (r"(q|k|v|gate|up)/kernel/(codes|absmax)", P(None, ("tensor", "fsdp"))),
    (r"(o|down)/kernel/(codes|absmax)", P(None, "fsdp")),
    (r"embedding", EMBEDDING),
    (r"layers/.*/router/kernel", P(None, "fsdp", None)),
    (r"layers/.*/experts/(gate|up)/kernel", P(None, None, "fsdp", "tensor")),
    (r"layers/.*/experts/down/kernel", P(None, None, ("tensor", "fsdp"), None)),
    (r"layers/.*/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*/(o|down)/kernel", P(None, ("tensor", "fsdp"), None)),
    (r"layers/.*/(q|k|v|gate|up)/bias", P(None, "tensor")),
    # Adapters: `lora_a` like the rows of its kernel, `lora_b` like its columns.
    (r"layers/.*/(q|k|v|gate|up)/lora_a", P(None, "fsdp", None)),
    (r"layers/.*/(q|k|v|gate|up)/lora_b", P(None, None, ("tensor", "fsdp"))),
    (r"layers/.*/(o|down)/lora_a", P(None, ("tensor", "fsdp"), None)),
    (r"layers/.*/(o|down)/lora_b", P(None, None, "fsdp")),
    (r"output/kernel", P("fsdp", "tensor")),
    (r"scale|bias", P()),
)


class PerLayer(NamedTuple):
    """What differs by layer, `[L, ...]`; None where all layers are alike."""

    window: jax.Array | None  # int32 [L]: tokens that a layer sees
    frequency: jax.Array | None  # float32 [L, r / 2]: rotary frequencies
    magnitude: jax.Array | None  # float32 [L]: multiplies rotated queries and keys


class Decoder(nnx.Module):
    """A language model of any family of `families.FAMILIES`.

    `layers` is one `Layer` whose weights are stacked along a leading layer axis, `[L, ...]`, and
    scanned by one `jax.lax.scan`, as `lomo_jax.fused_step` needs. Each layer is rematerialised, so
    plain `jax.grad` stores only the layer inputs. The parameters may live in host memory: each
    layer is then copied to the device just before it runs.

    Args:
      config: The model's shape.
      param_dtype: The dtype of all parameters.
      attention: "xla" runs anywhere. It materialises one layer's scores, `[B, H, T, T]`, and in
        rows of more than 4096 tokens those of 256 queries at a time. "cudnn" is flash attention:
        an NVIDIA GPU, Ampere or newer, and bfloat16 or float16. "pallas" is flash attention for
        long packed rows on the same GPUs, without a mask, `[B, 1, T, T]`.
      source: The Hugging Face directory that the weights are from, if any: an export has what is
        there and not in the config.
      rngs: Random keys for the weights.

    Raises:
      UserError: The config is not valid.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        source: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.config, self.source = config, source
        self.embedding = nnx.Param(
            NORMAL(rngs.params(), (config.vocab_size, config.width), param_dtype)
        )
        self.layers = jax.vmap(
            lambda key: Layer(
                config, param_dtype=param_dtype, attention=attention, rngs=nnx.Rngs(key)
            )
        )(jax.random.split(rngs.params(), config.num_layers))
        self.norm = Norm(config.width, config, param_dtype=param_dtype)
        if config.tie_embeddings:
            self.output = None
        else:
            self.output = linear(
                config.width, config.vocab_size, param_dtype=param_dtype, rngs=rngs
            )

    def hidden(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns the hidden states after the final norm, the input of the output head.

        Args:
          tokens_BxT: int32 `[B, T]`.
          positions_BxT: int32 `[B, T]`, each token's position in its document. By default 0, 1, ...
          segments_BxT: int32 `[B, T]`. A token attends only to earlier tokens of its segment, so
            documents packed into one row do not see each other. By default a row is one segment.

        Returns:
          `[B, T, D]` in the parameters' dtype.
        """
        return self.hidden_and_balance(tokens_BxT, positions_BxT, segments_BxT)[0]

    def hidden_and_balance(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
        dropout_key: jax.Array | None = None,
    ) -> tuple[jax.Array, jax.Array | None]:
        """Returns what `hidden` does, and the loss that balances a mixture of experts.

        The loss is that of transformers; padding, segment 0, does not count. None without experts.
        A key turns on the dropout of adapters.
        """
        tokens_BxT, positions_BxT, segments_BxT = sharding.shard_batch(
            (tokens_BxT, positions_BxT, segments_BxT)
        )
        length, config = tokens_BxT.shape[1], self.config
        if positions_BxT is None:
            positions_BxT = jnp.arange(length)[None]
        shared = self.context(positions_BxT, segments_BxT)
        if config.num_experts:
            is_token = jnp.ones_like(tokens_BxT) if segments_BxT is None else segments_BxT
            shared = shared._replace(is_token=sharding.shard_batch(is_token != 0))

        # Inside a scan, common-subexpression elimination cannot undo rematerialisation: the
        # barriers of prevent_cse=True would only cost time.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def apply(
            x_BxTxD: jax.Array, inputs: tuple[Layer, PerLayer, jax.Array | None]
        ) -> tuple[jax.Array, Load | None]:
            layer, own, key = inputs
            context = self._specialise(shared, own, positions_BxT)
            layer = to_device(layer)
            if key is not None:
                lora.set_keys(layer, key)
            x_BxTxD, load, _ = layer(x_BxTxD, context)
            return x_BxTxD, load

        x_BxTxD = look_up(to_device(self.embedding[...]), tokens_BxT)
        x_BxTxD = multiply(x_BxTxD, config.embedding_multiplier)
        keys = None if dropout_key is None else jax.random.split(dropout_key, config.num_layers)
        inputs = self.layers, _per_layer(config, length, length), keys
        x_BxTxD, load = jax.lax.scan(apply, x_BxTxD, inputs)
        x_BxTxD = multiply(self.norm(x_BxTxD), config.logit_multiplier)
        return x_BxTxD, None if load is None else balance(load)

    def extend(
        self,
        cache: Cache,
        tokens_BxQ: jax.Array,
        positions_BxQ: jax.Array,
        branches_BxQ: jax.Array,
        rope_length: int,
    ) -> tuple[jax.Array, Cache]:
        """Reads the next tokens of each row.

        Args:
          cache: The tokens before them, with room for these.
          tokens_BxQ: int32 `[B, Q]`.
          positions_BxQ: int32 `[B, Q]`, each token's position in its text, `cache.PADDING` for
            padding.
          branches_BxQ: int32 `[B, Q]`; see `models.cache`.
          rope_length: The longest text in tokens, which some rotary embeddings depend on.

        Returns:
          The hidden states after the final norm, `[B, Q, D]`, and the cache with these tokens.
        """
        tokens_BxQ, positions_BxQ, branches_BxQ = sharding.shard_batch(
            (tokens_BxQ, positions_BxQ, branches_BxQ)
        )
        config, start, slots = self.config, cache.length, cache.positions.shape[1]
        cache = cache.append(positions_BxQ, branches_BxQ)
        distance_BxQxS = cache.distance(positions_BxQ, branches_BxQ)
        window = _shared_window(config, slots)
        shared = self._rotary(positions_BxQ, rope_length)
        if config.num_experts:
            shared = shared._replace(is_token=positions_BxQ != PADDING)

        def apply(
            carry: tuple[jax.Array, jax.Array, jax.Array],
            inputs: tuple[Layer, PerLayer, jax.Array],
        ) -> tuple[tuple[jax.Array, jax.Array, jax.Array], None]:
            (x_BxQxD, k, v), (layer, own, index) = carry, inputs
            sees = slots if window is None else window
            mask_BxQxS = distance_BxQxS < (sees if own.window is None else own.window)
            context = self._rotate(shared, own, positions_BxQ)
            own_cache = LayerCache(k, v, index, start, mask_BxQxS)
            x_BxQxD, _, own_cache = to_device(layer)(x_BxQxD, context._replace(cache=own_cache))
            assert own_cache is not None
            return (x_BxQxD, own_cache.k, own_cache.v), None

        x_BxQxD = look_up(to_device(self.embedding[...]), tokens_BxQ)
        x_BxQxD = multiply(x_BxQxD, config.embedding_multiplier)
        layers = jnp.arange(config.num_layers, dtype=jnp.int32)
        inputs = self.layers, _per_layer(config, slots, rope_length), layers
        (x_BxQxD, k, v), _ = jax.lax.scan(apply, (x_BxQxD, cache.k, cache.v), inputs)
        x_BxQxD = multiply(self.norm(x_BxQxD), config.logit_multiplier)
        return x_BxQxD, cache._replace(k=k, v=v)

    def context(self, positions_BxT: jax.Array, segments_BxT: jax.Array | None) -> Context:
        """Returns what all layers share."""
        length = positions_BxT.shape[1]
        window = _shared_window(self.config, length)
        if self._is_long(length):
            visible = attention_.Visible(segments_BxT, window, None)
        else:
            mask = None if segments_BxT is None else attention_.segment_mask(segments_BxT)
            visible = attention_.Visible(None, None, attention_.and_window(mask, length, window))
        return self._rotary(positions_BxT, length)._replace(visible=visible)

    def _rotary(self, positions_BxT: jax.Array, length: int) -> Context:
        """Returns what all layers share about positions, in texts of up to `length` tokens."""
        config = self.config
        cos = sin = angle = None
        frequency_r, magnitude = rope.frequencies(config, length)
        if rope.layer_frequencies(config, length) is None:
            angle = rope.angle(positions_BxT, frequency_r)
        query_scale = None
        if config.query_growth and config.rope_scaling is not None:
            periods = positions_BxT // config.rope_scaling.original_max_length
            growth = config.query_growth * jnp.log1p(periods.astype(jnp.float32))
            query_scale = (1 + growth)[:, :, None, None]
        if angle is not None:
            cos = multiply(jnp.cos(angle), magnitude)
            sin = multiply(jnp.sin(angle), magnitude)
        return Context(cos, sin, attention_.Visible(None, None, None), query_scale)

    def _rotate(self, shared: Context, own: PerLayer, positions_BxT: jax.Array) -> Context:
        """Returns the context with the rotary angles of one layer."""
        if own.frequency is None or own.magnitude is None:
            return shared
        angle = rope.angle(positions_BxT, own.frequency)
        cos, sin = jnp.cos(angle) * own.magnitude, jnp.sin(angle) * own.magnitude
        return shared._replace(cos=cos, sin=sin)

    def _specialise(self, shared: Context, own: PerLayer, positions_BxT: jax.Array) -> Context:
        """Returns the context of one layer."""
        shared = self._rotate(shared, own, positions_BxT)
        if own.window is not None:
            length, visible = positions_BxT.shape[1], shared.visible
            if self._is_long(length):
                visible = visible._replace(window=own.window)
            else:
                mask = attention_.and_window(visible.mask, length, own.window)
                visible = visible._replace(mask=mask)
            shared = shared._replace(visible=visible)
        return shared

    def _is_long(self, length: int) -> bool:
        return attention_.is_long(length, self.layers.attention.implementation)

    def head(self) -> jax.Array:
        """Returns the output head `[D, V]`: the transposed embedding if the two are tied."""
        if self.output is None:
            return to_device(self.embedding[...]).T
        return to_device(self.output.kernel[...])

    def __call__(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
    ) -> jax.Array:
        """Returns float32 logits `[B, T, V]`; see `hidden` for the arguments."""
        return self.logits(self.hidden(tokens_BxT, positions_BxT, segments_BxT))

    def logits(self, x_BxTxD: jax.Array) -> jax.Array:
        """Returns the float32 logits `[B, T, V]` of what `hidden` or `extend` returned."""
        logits_BxTxV = jnp.einsum(
            "btd,dv->btv",
            x_BxTxD,
            sharding.gather(self.head()),
            preferred_element_type=jnp.float32,
        )
        if (cap := self.config.logit_cap) is not None:
            logits_BxTxV = cap * jnp.tanh(logits_BxTxV / cap)
        return logits_BxTxV


def _shared_window(config: DecoderConfig, length: int) -> int | None:
    """Returns the window of all layers; None if there is none or some do not slide."""
    shared = config.window is not None and not config.sliding_layers and config.window < length
    return config.window if shared else None


def _per_layer(config: DecoderConfig, length: int, rope_length: int) -> PerLayer:
    """Returns what differs by layer in rows of this length, and texts of that one."""
    window = frequency = magnitude = None
    if config.window is not None and config.sliding_layers and config.window < length:
        sees = [config.window if config.is_sliding(i) else length for i in range(config.num_layers)]
        window = jnp.asarray(np.array(sees, np.int32))
    if (rotary := rope.layer_frequencies(config, rope_length)) is not None:
        frequency, magnitude = map(jnp.asarray, rotary)
    return PerLayer(window, frequency, magnitude)


def abstract(
    config: DecoderConfig,
    param_dtype: DTypeLike = jnp.float32,
    attention: str = "xla",
    source: str | None = None,
    quantized: str = "none",
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Returns the structure of a model without allocating its parameters.

    Args:
      config: The model's shape.
      param_dtype: The dtype of all parameters.
      attention: "xla", "cudnn" or "pallas"; see `Decoder`.
      source: The Hugging Face directory of the weights; see `Decoder`.
      quantized: "int8" or "nf4" for the kernels of the layers; see `lomo_jax.quantize`.

    Returns:
      `(graphdef, params)` as from `nnx.split`, with a `jax.ShapeDtypeStruct` for each array.

    Raises:
      UserError: The config is not valid.
    """
    options = {"param_dtype": param_dtype, "attention": attention, "source": source}

    def build() -> Decoder:
        decoder = Decoder(config, **options, rngs=nnx.Rngs(0))
        quantize_kernels(decoder, quantized)
        return decoder

    return nnx.split(nnx.eval_shape(build))


def shardings(config: DecoderConfig, params: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
    """Returns the shardings of a model's parameters on a mesh, by `RULES`.

    Args:
      config: The model's shape.
      params: Its parameters: arrays or `jax.ShapeDtypeStruct`.
      mesh: A mesh from `lomo_jax.sharding.make_mesh`.

    Returns:
      A `jax.sharding.NamedSharding` for each parameter.

    Raises:
      ValueError: The mesh does not divide the number of heads or an axis of a parameter; the
        message names the sizes that do.
    """
    # RULES alone could split a weight inside a head.
    for name in ("num_kv_heads", "num_heads"):
        heads, parts = getattr(config, name), mesh.shape["tensor"]
        if heads % parts:
            fits = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
            raise ValueError(
                f"{name}={heads} of the model is not a multiple of tensor={parts}; tensor could be "
                f"{fits}"
            )
    return sharding.shardings(RULES, params, mesh)


def init(
    config: DecoderConfig, seed: int, param_dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Returns a model with random weights, normal with standard deviation 0.02.

    Args:
      config: The model's shape.
      seed: Random seed.
      param_dtype: The dtype of all parameters.

    Returns:
      `(graphdef, params)` as from `nnx.split`.

    Raises:
      UserError: The config is not valid.
    """
    return abstract(config, param_dtype)[0], _init(config, param_dtype, jax.random.key(seed))


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init(config: DecoderConfig, param_dtype: DTypeLike, key: jax.Array) -> nnx.State:
    return nnx.state(Decoder(config, param_dtype=param_dtype, rngs=nnx.Rngs(key)))
