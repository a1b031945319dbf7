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
from lomo_jax.models.config import LlamaConfig
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


class Context(NamedTuple):
    """The inputs that all layers share."""

    cos: jax.Array  # [B, T, 1, h / 2] float32; B is 1 if all rows have the same positions
    sin: jax.Array  # like cos
    mask: jax.Array | None  # [B, 1, T, T] bool: query and key are in the same segment


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation in float32, rounded before scaling like in transformers."""

    def __init__(self, width: int, *, eps: float, param_dtype: DTypeLike) -> None:
        self.eps = eps
        self.scale = nnx.Param(jnp.ones(width, param_dtype))

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x32_BxTxD = x_BxTxD.astype(jnp.float32)
        mean_square_BxTx1 = jnp.mean(jnp.square(x32_BxTxD), axis=-1, keepdims=True)
        normal_BxTxD = x32_BxTxD * jax.lax.rsqrt(mean_square_BxTx1 + self.eps)
        return normal_BxTxD.astype(x_BxTxD.dtype) * to_device(self.scale[...])


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary position embeddings."""

    def __init__(
        self, config: LlamaConfig, *, param_dtype: DTypeLike, attention: str, rngs: nnx.Rngs
    ) -> None:
        self.head_dim = config.head_dim
        self.implementation = attention
        linear = functools.partial(_linear, param_dtype=param_dtype, rngs=rngs)
        self.q = linear(config.width, config.num_heads * config.head_dim)
        self.k = linear(config.width, config.num_kv_heads * config.head_dim)
        self.v = linear(config.width, config.num_kv_heads * config.head_dim)
        self.o = linear(config.num_heads * config.head_dim, config.width)

    def __call__(self, x_BxTxD: jax.Array, context: Context) -> jax.Array:
        batch, length, _ = x_BxTxD.shape
        q_BxTxHxh = _rotate(_split(self.q(x_BxTxD), self.head_dim), context)
        k_BxTxKxh = _rotate(_split(self.k(x_BxTxD), self.head_dim), context)
        v_BxTxKxh = _split(self.v(x_BxTxD), self.head_dim)
        y_BxTxHxh = _attend(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, context.mask, self.implementation)
        y_BxTxD = y_BxTxHxh.reshape(batch, length, -1)
        return self.o(y_BxTxD, out_sharding=sharding.unsharded_last_axis(y_BxTxD))


class MLP(nnx.Module):
    """A gated MLP, SwiGLU."""

    def __init__(self, config: LlamaConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        linear = functools.partial(_linear, param_dtype=param_dtype, rngs=rngs)
        self.gate = linear(config.width, config.mlp_width)
        self.up = linear(config.width, config.mlp_width)
        self.down = linear(config.mlp_width, config.width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        y_BxTxF = jax.nn.silu(self.gate(x_BxTxD)) * self.up(x_BxTxD)
        return self.down(y_BxTxF, out_sharding=sharding.unsharded_last_axis(y_BxTxF))


class Layer(nnx.Module):
    """One pre-norm decoder layer."""

    def __init__(
        self, config: LlamaConfig, *, param_dtype: DTypeLike, attention: str, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(
            RMSNorm, config.width, eps=config.norm_eps, param_dtype=param_dtype
        )
        self.attention_norm = norm()
        self.attention = Attention(config, param_dtype=param_dtype, attention=attention, rngs=rngs)
        self.mlp_norm = norm()
        self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)

    def __call__(self, x_BxTxD: jax.Array, context: Context) -> jax.Array:
        x_BxTxD += self.attention(self.attention_norm(x_BxTxD), context)
        return x_BxTxD + self.mlp(self.mlp_norm(x_BxTxD))


class Llama(nnx.Module):
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
      UserError: The config is not valid; see `LlamaConfig.validate`.
    """

    def __init__(
        self,
        config: LlamaConfig,
        *,
        param_dtype: DTypeLike = jnp.float32,
        attention: str = "xla",
        rngs: nnx.Rngs,
    ) -> None:
        self.config = config
        self.embedding = nnx.Param(
            _NORMAL(rngs.params(), (config.vocab_size, config.width), param_dtype)
        )
        self.layers = jax.vmap(
            lambda key: Layer(
                config, param_dtype=param_dtype, attention=attention, rngs=nnx.Rngs(key)
            )
        )(jax.random.split(rngs.params(), config.num_layers))
        self.norm = RMSNorm(config.width, eps=config.norm_eps, param_dtype=param_dtype)
        if config.tie_embeddings:
            self.output = None
        else:
            self.output = _linear(
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
    config: LlamaConfig, param_dtype: DTypeLike = jnp.float32, attention: str = "xla"
) -> tuple[nnx.GraphDef[Llama], nnx.State]:
    """Returns the structure of a model without allocating its parameters.

    Args:
      config: The model's shape.
      param_dtype: The dtype of all parameters.
      attention: "xla" or "cudnn"; see `Llama`.

    Returns:
      `(graphdef, params)` as from `nnx.split`, with a `jax.ShapeDtypeStruct` for each array.

    Raises:
      UserError: The config is not valid.
    """
    return nnx.split(
        nnx.eval_shape(
            lambda: Llama(config, param_dtype=param_dtype, attention=attention, rngs=nnx.Rngs(0))
        )
    )


def shardings(config: LlamaConfig, params: nnx.State, mesh: Mesh | AbstractMesh) -> nnx.State:
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
    config: LlamaConfig, seed: int, param_dtype: DTypeLike = jnp.float32
) -> tuple[nnx.GraphDef[Llama], nnx.State]:
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
def _init(config: LlamaConfig, param_dtype: DTypeLike, key: jax.Array) -> nnx.State:
    return nnx.state(Llama(config, param_dtype=param_dtype, rngs=nnx.Rngs(key)))


def _linear(inputs: int, outputs: int, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> nnx.Linear:
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=False,
        kernel_init=_NORMAL,
        param_dtype=param_dtype,
        dot_general=_dot_gathered,
        rngs=rngs,
    )


def _dot_gathered(
    x_BxTxI: jax.Array, kernel_IxO: jax.Array, *_: Any, out_sharding: P | None, **kwargs: Any
) -> jax.Array:
    """Multiplies all tokens, as the rows of one matrix, by a kernel gathered over `fsdp`.

    The kernel's gradient then sums over one axis. With two, XLA's CPU backend first copies an
    operand into another layout: a step of 20M parameters takes 1.18 times as long.
    """
    batch, length, width = x_BxTxI.shape
    first, _, last = arrays.partition_spec(x_BxTxI)
    rows = arrays.explicit_sharding(x_BxTxI, P(first, last))
    y_NxO = jax.lax.dot(
        jax.lax.reshape(x_BxTxI, (batch * length, width), out_sharding=rows),
        sharding.gather(kernel_IxO),
        out_sharding=out_sharding and P(first, out_sharding[-1]),
        **kwargs,
    )
    out = arrays.explicit_sharding(y_NxO, P(first, None, arrays.partition_spec(y_NxO)[-1]))
    return jax.lax.reshape(y_NxO, (batch, length, y_NxO.shape[-1]), out_sharding=out)


def _split(x_BxTxNh: jax.Array, head_dim: int) -> jax.Array:
    """Splits the last axis into heads, which inherit its sharding: `[B, T, N, h]`."""
    *others, width = x_BxTxNh.shape
    heads = arrays.explicit_sharding(x_BxTxNh, P(*arrays.partition_spec(x_BxTxNh), None))
    shape = (*others, width // head_dim, head_dim)
    return jax.lax.reshape(x_BxTxNh, shape, out_sharding=heads)


def _attend(
    q_BxTxHxh: jax.Array,
    k_BxTxKxh: jax.Array,
    v_BxTxKxh: jax.Array,
    mask: jax.Array | None,
    implementation: Any,
) -> jax.Array:
    dtype = q_BxTxHxh.dtype
    if dtype == jnp.float16 and implementation == "xla":
        # JAX's float16 attention needs a matrix product that CPUs and TPUs lack.
        q_BxTxHxh, k_BxTxKxh, v_BxTxKxh = (
            x.astype(jnp.float32) for x in (q_BxTxHxh, k_BxTxKxh, v_BxTxKxh)
        )

    def attend(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, mask):
        return jax.nn.dot_product_attention(
            q_BxTxHxh,
            k_BxTxKxh,
            v_BxTxKxh,
            mask=mask,
            is_causal=True,
            implementation=implementation,
        )

    if sharding.is_explicit():
        # Every device has whole heads of whole sequences, but cuDNN's op has no sharding rule.
        heads = P(sharding.BATCH, None, "tensor", None)
        specs = (heads, heads, heads, P(sharding.BATCH, None, None, None))
        attend = jax.shard_map(attend, in_specs=specs, out_specs=heads, check_vma=False)
    # dot_product_attention mixes dtypes, which strict promotion forbids.
    with jax.numpy_dtype_promotion("standard"), jax.named_scope("attention"):
        y_BxTxHxh = attend(q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, mask).astype(dtype)
    # `remat="attention"` saves cuDNN's output without a name; with one it would be saved twice.
    return checkpoint_name(y_BxTxHxh, "attention") if implementation == "xla" else y_BxTxHxh


def _frequencies(config: LlamaConfig) -> np.ndarray:
    """Returns the rotary frequencies, float32 `[h / 2]`, in radians per token."""
    exponent = np.arange(0, config.head_dim, 2) / config.head_dim
    frequency = config.rope_theta**-exponent
    if (scaling := config.rope_scaling) is not None:
        turns = scaling.original_max_length * frequency / (2 * np.pi)
        low, high = scaling.low_freq_factor, scaling.high_freq_factor
        unchanged = np.clip((turns - low) / (high - low), 0, 1)  # 0 for low frequencies
        frequency = frequency * (unchanged + (1 - unchanged) / scaling.factor)
    return frequency.astype(np.float32)


def _rotate(x_BxTxNxh: jax.Array, context: Context) -> jax.Array:
    """Rotates the pairs (i, i + h / 2), Hugging Face's order, by the angles of their positions."""
    a, b = jnp.split(x_BxTxNxh.astype(jnp.float32), 2, axis=-1)
    rotated = (a * context.cos - b * context.sin, b * context.cos + a * context.sin)
    return jnp.concatenate(rotated, axis=-1).astype(x_BxTxNxh.dtype)
