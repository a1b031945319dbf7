"""Token embedding lookup, on one device or sharded over several.

Dimensions: B batch, T sequence, D width, V vocabulary.
"""

import jax
import jax.numpy as jnp
from jax.sharding import PartitionSpec as P

from lomo_jax import sharding

EMBEDDING = P("tensor", "fsdp")  # the sharding of an embedding [V, D]
_TOKENS, _ACTIVATION = P(sharding.BATCH, None), P(sharding.BATCH, None, None)


def look_up(embedding_VxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Returns the embeddings of int32 tokens, `[B, T, D]`; both arguments may be sharded."""
    if not sharding.is_explicit():
        return jnp.take(embedding_VxD, tokens_BxT, axis=0)
    return _look_up_sharded(embedding_VxD, tokens_BxT)


# Each device looks up all tokens of its fsdp group in its shard of the embedding. An all-to-all
# exchanges that for all columns of the device's own tokens. So the embedding is never gathered, and
# its gradient is accumulated shard by shard.
@jax.custom_vjp
def _look_up_sharded(embedding_VxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    def look_up(shard_VxD, tokens_BxT):
        row_BxT = _row_here(shard_VxD, tokens_BxT)
        x_BxTxD = shard_VxD.at[row_BxT].get(mode="fill", fill_value=0)
        x_BxTxD = jax.lax.all_to_all(x_BxTxD, "fsdp", split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.psum(x_BxTxD, "tensor")

    look_up = jax.shard_map(
        look_up, in_specs=(EMBEDDING, _TOKENS), out_specs=_ACTIVATION, check_vma=False
    )
    return look_up(embedding_VxD, tokens_BxT)


def _look_up_forward(embedding_VxD, tokens_BxT):
    return _look_up_sharded(embedding_VxD, tokens_BxT), (embedding_VxD, tokens_BxT)


def _look_up_backward(residuals, ct_BxTxD):
    def sum_up(zeros_VxD, tokens_BxT, ct_BxTxD):
        row_BxT = _row_here(zeros_VxD, tokens_BxT)
        ct_BxTxD = jax.lax.all_to_all(ct_BxTxD, "fsdp", split_axis=2, concat_axis=0, tiled=True)
        return jax.lax.psum(zeros_VxD.at[row_BxT].add(ct_BxTxD, mode="drop"), "data")

    sum_up = jax.shard_map(
        sum_up,
        in_specs=(EMBEDDING, _TOKENS, _ACTIVATION),
        out_specs=EMBEDDING,
        check_vma=False,
    )
    embedding_VxD, tokens_BxT = residuals
    # Zeros from outside of shard_map: there the fused step sees them and allocates them late.
    return sum_up(jnp.zeros_like(embedding_VxD), tokens_BxT, ct_BxTxD), None


_look_up_sharded.defvjp(_look_up_forward, _look_up_backward)


def _row_here(shard_VxD: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    """Returns the row in this shard of each token of the fsdp group; `rows` for other tokens.

    Never negative: JAX counts negative indices from the end.
    """
    rows = len(shard_VxD)
    tokens_BxT = jax.lax.all_gather(tokens_BxT, "fsdp", tiled=True)
    row_BxT = tokens_BxT - rows * jax.lax.axis_index("tensor")
    return jnp.where((row_BxT >= 0) & (row_BxT < rows), row_BxT, rows)
