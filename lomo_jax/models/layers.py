"""One decoder layer: norms, attention and MLP, with the switches of `DecoderConfig`.

Dimensions: B batch, T sequence, D width, F MLP width, H query heads, K key and value heads, h head
dimension, L layers. N is either number of heads.

Every weight is a matrix or a vector. All heads share one axis, `[D, H*h]`, because AdaLomo factors
the last two axes of a weight and should see each projection as one matrix.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import sharding
from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import to_device
from lomo_jax.models.attention import Scores, Visible, attend
from lomo_jax.models.cache import LayerCache
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.experts import Experts, Load
from lomo_jax.models.rope import rotate

NORMAL = nnx.initializers.normal(0.02)

_ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": jax.nn.silu,
    "gelu": functools.partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": functools.partial(jax.nn.gelu, approximate=True),
    "relu2": lambda x: jnp.square(jax.nn.relu(x)),
}


class Context(NamedTuple):
    """What a layer needs besides its input and its weights."""

    cos: jax.Array | None  # [B, T, 1, r / 2] float32; B is 1 if all rows have the same positions
    sin: jax.Array | None  # like cos
    visible: Visible
    query_scale: jax.Array | None = None  # [B, T, 1, 1] float32
    is_token: jax.Array | None = None  # bool [B, T], for mixtures of experts: not padding
    cache: LayerCache | None = None  # keys and values of earlier tokens, in place of `visible`


class Norm(nnx.Module):
    """RMSNorm or LayerNorm in float32.

    The result is rounded before it is multiplied by weights without an offset, as in LLaMA.
    """

    def __init__(self, width: int, config: DecoderConfig, *, param_dtype: DTypeLike) -> None:
        self.eps, self.offset = config.norm_eps, config.norm_offset
        self.subtracts_mean = config.layer_norm
        ones, zeros = jnp.full(width, 1.0 - self.offset, param_dtype), jnp.zeros(width, param_dtype)
        self.scale = nnx.Param(ones) if config.norm_scale else None
        self.bias = nnx.Param(zeros) if config.norm_bias else None

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        x32_BxTxD = x_BxTxD.astype(jnp.float32)
        if self.subtracts_mean:
            x32_BxTxD -= jnp.mean(x32_BxTxD, axis=-1, keepdims=True)
        mean_square_BxTx1 = jnp.mean(jnp.square(x32_BxTxD), axis=-1, keepdims=True)
        normal_BxTxD = x32_BxTxD * jax.lax.rsqrt(mean_square_BxTx1 + self.eps)
        if self.scale is not None and not self.offset and not self.subtracts_mean:
            return normal_BxTxD.astype(x_BxTxD.dtype) * to_device(self.scale[...])
        if self.scale is not None:
            normal_BxTxD *= to_device(self.scale[...]).astype(jnp.float32) + self.offset
        if self.bias is not None:
            normal_BxTxD += to_device(self.bias[...]).astype(jnp.float32)
        return normal_BxTxD.astype(x_BxTxD.dtype)


class Attention(nnx.Module):
    """Causal grouped-query attention with rotary position embeddings."""

    def __init__(
        self, config: DecoderConfig, *, param_dtype: DTypeLike, attention: str, rngs: nnx.Rngs
    ) -> None:
        self.head_dim, self.qk_norm = config.head_dim, config.qk_norm
        self.scores = Scores(config.attention_scale, config.attention_cap)
        self.implementation = attention
        linear_ = functools.partial(linear, param_dtype=param_dtype, rngs=rngs)
        q_width, k_width = (n * self.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q = linear_(config.width, q_width, use_bias=config.attention_bias)
        self.k = linear_(config.width, k_width, use_bias=config.attention_bias)
        self.v = linear_(config.width, k_width, use_bias=config.attention_bias)
        self.o = linear_(q_width, config.width, use_bias=config.output_bias)
        if self.qk_norm != "all":
            q_width = k_width = self.head_dim
        norm = functools.partial(Norm, config=config, param_dtype=param_dtype)
        self.q_norm = norm(q_width) if self.qk_norm != "none" else None
        self.k_norm = norm(k_width) if self.qk_norm != "none" else None

    def __call__(self, x_BxTxD: jax.Array, context: Context) -> tuple[jax.Array, LayerCache | None]:
        """Returns the block's output, and the cache with the keys and values of these tokens."""
        batch, length, _ = x_BxTxD.shape
        q_BxTxHxh = self._position(self.q(x_BxTxD), self.q_norm, context)
        k_BxTxKxh = self._position(self.k(x_BxTxD), self.k_norm, context)
        v_BxTxKxh = _split(self.v(x_BxTxD), self.head_dim)
        if context.query_scale is not None:
            q_BxTxHxh = (q_BxTxHxh * context.query_scale).astype(q_BxTxHxh.dtype)
        cache = context.cache
        if cache is None:
            y_BxTxHxh = attend(
                q_BxTxHxh, k_BxTxKxh, v_BxTxKxh, context.visible, self.scores, self.implementation
            )
        else:
            cache = cache.write(k_BxTxKxh, v_BxTxKxh)
            y_BxTxHxh = cache.attend(q_BxTxHxh, self.scores)
        y_BxTxD = y_BxTxHxh.reshape(batch, length, -1)
        return self.o(y_BxTxD, out_sharding=sharding.unsharded_last_axis(y_BxTxD)), cache

    def _position(self, x_BxTxNh: jax.Array, norm: Norm | None, context: Context) -> jax.Array:
        """Normalises queries or keys, splits them into heads and rotates them."""
        if norm is not None and self.qk_norm == "all":
            x_BxTxNh = norm(x_BxTxNh)
        x_BxTxNxh = _split(x_BxTxNh, self.head_dim)
        if norm is not None and self.qk_norm == "head":
            x_BxTxNxh = norm(x_BxTxNxh)
        if context.cos is not None and context.sin is not None:
            x_BxTxNxh = rotate(x_BxTxNxh, context.cos, context.sin)
        if norm is not None and self.qk_norm == "rotated":
            x_BxTxNxh = norm(x_BxTxNxh)
        return x_BxTxNxh


class MLP(nnx.Module):
    """An MLP, gated (SwiGLU, GeGLU) or plain."""

    def __init__(self, config: DecoderConfig, *, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        self.activation = config.activation
        linear_ = functools.partial(
            linear, use_bias=config.mlp_bias, param_dtype=param_dtype, rngs=rngs
        )
        self.gate = linear_(config.width, config.mlp_width) if config.gated_mlp else None
        self.up = linear_(config.width, config.mlp_width)
        self.down = linear_(config.mlp_width, config.width)

    def __call__(self, x_BxTxD: jax.Array) -> jax.Array:
        activate = _ACTIVATIONS[self.activation]
        if self.gate is None:
            y_BxTxF = activate(self.up(x_BxTxD))
        else:
            y_BxTxF = activate(self.gate(x_BxTxD)) * self.up(x_BxTxD)
        return self.down(y_BxTxF, out_sharding=sharding.unsharded_last_axis(y_BxTxF))


class Layer(nnx.Module):
    """One decoder layer."""

    def __init__(
        self, config: DecoderConfig, *, param_dtype: DTypeLike, attention: str, rngs: nnx.Rngs
    ) -> None:
        norm = functools.partial(Norm, config.width, config, param_dtype=param_dtype)
        before = config.norm_places != "after"
        after = config.norm_places != "before"
        self.residual_multiplier = config.residual_multiplier
        self.attention_norm = norm() if before else None
        self.attention = Attention(config, param_dtype=param_dtype, attention=attention, rngs=rngs)
        self.attention_post_norm = norm() if after else None
        self.parallel = config.parallel
        self.mlp_norm = norm() if before and not config.parallel else None
        if config.num_experts:
            activate = _ACTIVATIONS[config.activation]
            self.mlp = Experts(config, activate=activate, param_dtype=param_dtype, rngs=rngs)
        else:
            self.mlp = MLP(config, param_dtype=param_dtype, rngs=rngs)
        self.mlp_post_norm = norm() if after else None

    def __call__(
        self, x_BxTxD: jax.Array, context: Context
    ) -> tuple[jax.Array, Load | None, LayerCache | None]:
        """Returns the layer's output, how a mixture of experts used them, and the cache."""
        if self.parallel:
            normal_BxTxD = _apply(self.attention_norm, x_BxTxD)
            attended_BxTxD, cache = self.attention(normal_BxTxD, context)
            y_BxTxD, load = self._mlp(normal_BxTxD, context)
            return x_BxTxD + self._scale(attended_BxTxD + y_BxTxD), load, cache
        y_BxTxD, cache = self.attention(_apply(self.attention_norm, x_BxTxD), context)
        x_BxTxD += self._scale(_apply(self.attention_post_norm, y_BxTxD))
        y_BxTxD, load = self._mlp(_apply(self.mlp_norm, x_BxTxD), context)
        return x_BxTxD + self._scale(_apply(self.mlp_post_norm, y_BxTxD)), load, cache

    def _mlp(self, x_BxTxD: jax.Array, context: Context) -> tuple[jax.Array, Load | None]:
        if isinstance(self.mlp, Experts):
            assert context.is_token is not None
            return self.mlp(x_BxTxD, context.is_token)
        return self.mlp(x_BxTxD), None

    def _scale(self, y_BxTxD: jax.Array) -> jax.Array:
        return multiply(y_BxTxD, self.residual_multiplier)


def multiply(x: jax.Array, factor: float) -> jax.Array:
    """Returns `x * factor` in the dtype of `x`, and `x` itself for 1."""
    return x if factor == 1 else x * jnp.asarray(factor, x.dtype)


def linear(
    inputs: int,
    outputs: int,
    *,
    use_bias: bool = False,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> nnx.Linear:
    """Returns a linear map whose kernel is gathered over the mesh axis `fsdp`."""
    return nnx.Linear(
        inputs,
        outputs,
        use_bias=use_bias,
        kernel_init=NORMAL,
        param_dtype=param_dtype,
        dot_general=_dot_gathered,
        rngs=rngs,
    )


def _apply(norm: Norm | None, x: jax.Array) -> jax.Array:
    return x if norm is None else norm(x)


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
    kernel_IxO = sharding.gather(kernel_IxO)
    spec = arrays.partition_spec(kernel_IxO)
    if spec[0] != last:  # it was dequantised, which needs whole rows
        kernel_IxO = jax.sharding.reshard(kernel_IxO, P(last, spec[1]))
    y_NxO = jax.lax.dot(
        jax.lax.reshape(x_BxTxI, (batch * length, width), out_sharding=rows),
        kernel_IxO,
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
