"""A mixture of experts: each token goes through the MLPs of a few experts.

Dimensions: B batch, T sequence, N = B*T tokens, D width, F MLP width, E experts, A experts of one
token, M = N*A rows sorted by their expert.

References:
  Fedus et al., Switch Transformers, arXiv 2101.03961, for the loss that balances the experts.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import sharding
from lomo_jax.models.config import DecoderConfig

_NORMAL = nnx.initializers.normal(0.02)


class Load(NamedTuple):
    """How a layer used its experts."""

    tokens: jax.Array  # float32 [E], how often each expert was chosen
    probability: jax.Array  # float32 [E], the router's probability of each, summed over tokens
    count: jax.Array  # float32 [], number of tokens


class _Kernels(nnx.Module):
    """One matrix for each expert, `[E, inputs, outputs]`."""

    def __init__(
        self, experts: int, inputs: int, outputs: int, param_dtype: DTypeLike, rngs: nnx.Rngs
    ) -> None:
        self.kernel = nnx.Param(_NORMAL(rngs.params(), (experts, inputs, outputs), param_dtype))


class _Gated(nnx.Module):
    """The gated MLPs of all experts."""

    def __init__(self, config: DecoderConfig, param_dtype: DTypeLike, rngs: nnx.Rngs) -> None:
        experts, width, mlp_width = config.num_experts, config.width, config.mlp_width
        self.gate = _Kernels(experts, width, mlp_width, param_dtype, rngs)
        self.up = _Kernels(experts, width, mlp_width, param_dtype, rngs)
        self.down = _Kernels(experts, mlp_width, width, param_dtype, rngs)


class Experts(nnx.Module):
    """A router and the MLPs that it chooses from; no token is dropped."""

    def __init__(
        self,
        config: DecoderConfig,
        *,
        activate: Callable[[jax.Array], jax.Array],
        param_dtype: DTypeLike,
        rngs: nnx.Rngs,
    ) -> None:
        self.activate = activate
        self.experts_per_token = config.experts_per_token
        self.normalize = config.normalize_experts
        self.router = nnx.Linear(
            config.width,
            config.num_experts,
            use_bias=False,
            kernel_init=_NORMAL,
            param_dtype=param_dtype,
            rngs=rngs,
        )
        self.experts = _Gated(config, param_dtype, rngs)

    def __call__(self, x_BxTxD: jax.Array, is_token_BxT: jax.Array) -> tuple[jax.Array, Load]:
        """Returns `[B, T, D]` and how much each expert was used by real tokens."""
        kernels = (self.experts.gate, self.experts.up, self.experts.down)
        gate, up, down = (sharding.gather(kernels_.kernel[...]) for kernels_ in kernels)
        router_DxE = sharding.gather(self.router.kernel[...])
        if not sharding.is_explicit():
            return self._apply(x_BxTxD, is_token_BxT, router_DxE, gate, up, down)

        # Every device routes its own tokens, through its columns of every expert.
        def apply(*arguments):
            y_BxTxD, load = self._apply(*arguments)
            load = jax.tree.map(lambda x: jax.lax.psum(x, sharding.BATCH), load)
            return jax.lax.psum(y_BxTxD, "tensor"), load

        rows = P(sharding.BATCH, None, None)
        columns, lines = P(None, None, "tensor"), P(None, "tensor", None)
        return jax.shard_map(
            apply,
            in_specs=(rows, P(sharding.BATCH, None), P(), columns, columns, lines),
            out_specs=(rows, P()),
            check_vma=False,
        )(x_BxTxD, is_token_BxT, router_DxE, gate, up, down)

    def _apply(self, x_BxTxD, is_token_BxT, router_DxE, gate_ExDxF, up_ExDxF, down_ExFxD):
        batch, length, width = x_BxTxD.shape
        experts, each = router_DxE.shape[1], self.experts_per_token
        x_NxD, is_token_N = x_BxTxD.reshape(-1, width), is_token_BxT.reshape(-1)
        logits_NxE = jnp.dot(x_NxD, router_DxE)
        p_NxE = jax.nn.softmax(logits_NxE.astype(jnp.float32), axis=-1)
        p_NxA, expert_NxA = jax.lax.top_k(p_NxE, each)
        load = self._load(p_NxE, expert_NxA, is_token_N.astype(jnp.float32))
        if self.normalize:
            p_NxA /= p_NxA.sum(axis=-1, keepdims=True)

        expert_M = expert_NxA.reshape(-1)
        order_M = jnp.argsort(expert_M, stable=True)
        sizes_E = jnp.bincount(expert_M, length=experts).astype(jnp.int32)
        x_MxD = x_NxD[order_M // each]
        gate_MxF = jax.lax.ragged_dot(x_MxD, gate_ExDxF, sizes_E)
        up_MxF = jax.lax.ragged_dot(x_MxD, up_ExDxF, sizes_E)
        y_MxD = jax.lax.ragged_dot(self.activate(gate_MxF) * up_MxF, down_ExFxD, sizes_E)
        y_NxAxD = y_MxD[jnp.argsort(order_M)].reshape(-1, each, width)
        y_NxD = jnp.einsum("nad,na->nd", y_NxAxD, p_NxA.astype(x_NxD.dtype))
        return y_NxD.reshape(batch, length, width), load

    def _load(self, p_NxE: jax.Array, expert_NxA: jax.Array, weight_N: jax.Array) -> Load:
        chosen_NxE = jax.nn.one_hot(expert_NxA, p_NxE.shape[1], dtype=jnp.float32).sum(axis=1)
        return Load(weight_N @ chosen_NxE, weight_N @ p_NxE, weight_N.sum())


def balance(load: Load) -> jax.Array:
    """Returns the loss that is 1 * experts of one token where all experts are used alike.

    Args:
      load: The load of all layers, with a leading layer axis.
    """
    count = load.count.sum()
    tokens_E, probability_E = load.tokens.sum(0) / count, load.probability.sum(0) / count
    return len(tokens_E) * (tokens_E * probability_E).sum()
