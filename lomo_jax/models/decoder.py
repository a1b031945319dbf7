"""A LLaMA-family decoder in Flax nnx whose layers are stacked and scanned.

Dimensions: B batch, T sequence, D width, F MLP width, H query heads, K key and value heads, h head
dimension, L layers, V vocabulary. N is either number of heads.

Every weight is a matrix or a vector. All heads share one axis, `[D, H*h]`, because AdaLomo factors
the last two axes of a weight and should see each projection as one matrix.

Under a mesh of `lomo_jax.sharding.make_mesh` the parameters are sharded by `RULES` and a batch by
`sharding.BATCH`. Without a mesh the sharding calls do nothing.

References:
  Touvron et al., LLaMA: Open and Efficient Foundation Language Models, arXiv 2302.13971.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AbstractMesh, Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import sharding
from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import to_device
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.embedding import EMBEDDING, look_up

# How `sharding.shardings` shards the parameters. A block's first matrices are split along their
# outputs (whole heads, columns of the MLP), its last matrix along its inputs (Megatron).
RULES: sharding.Rules = (
    (r"embedding", EMBEDDING),
    (r"layers/.*/(q|k|v|gate|up)/kernel", P(None, "fsdp", "tensor")),
    (r"layers/.*/(o|down)/kernel", P(None, ("tensor", "fsdp"), None)),
    (r"output/kernel", P("fsdp", "tensor")),
    (r"scale", P()),
)

_NORMAL = nnx.initializers.normal(0.02)


class Decoder(nnx.Module):
    """A LLaMA-family language model.

    `layers` is one `Layer` whose weights are stacked along a leading layer axis, `[L, ...]`, and
    scanned by one `jax.lax.scan`, as `lomo_jax.fused_step` needs. Each layer is rematerialised, so
    plain `jax.grad` stores only the layer inputs. The parameters may live in host memory: each
    layer is then copied to the device just before it runs.

    Args:
      config: The model's shape.
      param_dtype: The dtype of all parameters.
      attention: "xla" runs anywhere and materialises one layer's scores, `[B, H, T, T]`. "cudnn" is
        flash attention: an NVIDIA GPU, Ampere or newer, and bfloat16 or float16.
      rngs: Random keys for the weights.

    Raises:
      UserError: The config is not valid; see `DecoderConfig.validate`.
    """

    def __init__(
        self,
        config: DecoderConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
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
        tokens_BxT, positions_BxT, segments_BxT = sharding.shard_batch(
            (tokens_BxT, positions_BxT, segments_BxT)
        )
        context = self.context(tokens_BxT, positions_BxT, segments_BxT)

        # Inside a scan, common-subexpression elimination cannot undo rematerialisation: the
        # barriers of prevent_cse=True would only cost time.
        @functools.partial(jax.checkpoint, prevent_cse=False)
        def apply(x_BxTxD: jax.Array, layer: Layer) -> tuple[jax.Array, None]:
            return to_device(layer)(x_BxTxD, context), None

        embedded_BxTxD = look_up(to_device(self.embedding[...]), tokens_BxT)
        x_BxTxD, _ = jax.lax.scan(apply, embedded_BxTxD, self.layers)
        return self.norm(x_BxTxD)

    def context(
        self,
        tokens_BxT: jax.Array,
        positions_BxT: jax.Array | None = None,
        segments_BxT: jax.Array | None = None,
    ) -> Context:
        """Returns the inputs that all layers share; see `hidden` for the arguments."""
        if positions_BxT is None:
            positions_BxT = jnp.arange(tokens_BxT.shape[1])[None]
        angles = positions_BxT.astype(jnp.float32)[:, :, None, None] * _frequencies(self.config)
        mask = None
        if segments_BxT is not None:
            mask = segments_BxT[:, None, :, None] == segments_BxT[:, None, None, :]
        return Context(jnp.cos(angles), jnp.sin(angles), mask)

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
        return jnp.einsum(
            "btd,dv->btv",
            self.hidden(tokens_BxT, positions_BxT, segments_BxT),
            sharding.gather(self.head()),
            preferred_element_type=jnp.float32,
        )


def abstract(
    config: DecoderConfig, param_dtype: DTypeLike = jnp.float32, attention: str = "xla"
) -> tuple[nnx.GraphDef[Decoder], nnx.State]:
    """Returns the structure of a model without allocating its parameters.

    Args:
      config: The model's shape.
      param_dtype: The dtype of all parameters.
      attention: "xla" or "cudnn"; see `Decoder`.

    Returns:
      `(graphdef, params)` as from `nnx.split`, with a `jax.ShapeDtypeStruct` for each array.

    Raises:
      UserError: The config is not valid.
    """
    return nnx.split(
        nnx.eval_shape(
            lambda: Decoder(config, param_dtype=param_dtype, attention=attention, rngs=nnx.Rngs(0))
        )
    )


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
