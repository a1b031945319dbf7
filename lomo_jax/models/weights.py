"""Conversion between stacked parameters and the per-layer tensors of checkpoint files."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import sharding
from lomo_jax.errors import UserError
from lomo_jax.fused.arrays import reshard_like
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.decoder import abstract, init, shardings
from lomo_jax.models.layers import Layer

HF_NAMES = {
    "embedding": "model.embed_tokens.weight",
    "layers/attention_norm/scale": "model.layers.{}.input_layernorm.weight",
    "layers/attention/q/kernel": "model.layers.{}.self_attn.q_proj.weight",
    "layers/attention/k/kernel": "model.layers.{}.self_attn.k_proj.weight",
    "layers/attention/v/kernel": "model.layers.{}.self_attn.v_proj.weight",
    "layers/attention/o/kernel": "model.layers.{}.self_attn.o_proj.weight",
    "layers/mlp_norm/scale": "model.layers.{}.post_attention_layernorm.weight",
    "layers/mlp/gate/kernel": "model.layers.{}.mlp.gate_proj.weight",
    "layers/mlp/up/kernel": "model.layers.{}.mlp.up_proj.weight",
    "layers/mlp/down/kernel": "model.layers.{}.mlp.down_proj.weight",
    "norm/scale": "model.norm.weight",
    "output/kernel": "lm_head.weight",
}
GGUF_NAMES = {
    "embedding": "token_embd.weight",
    "layers/attention_norm/scale": "blk.{}.attn_norm.weight",
    "layers/attention/q/kernel": "blk.{}.attn_q.weight",
    "layers/attention/k/kernel": "blk.{}.attn_k.weight",
    "layers/attention/v/kernel": "blk.{}.attn_v.weight",
    "layers/attention/o/kernel": "blk.{}.attn_output.weight",
    "layers/mlp_norm/scale": "blk.{}.ffn_norm.weight",
    "layers/mlp/gate/kernel": "blk.{}.ffn_gate.weight",
    "layers/mlp/up/kernel": "blk.{}.ffn_up.weight",
    "layers/mlp/down/kernel": "blk.{}.ffn_down.weight",
    "norm/scale": "output_norm.weight",
    "output/kernel": "output.weight",
}


class Tensor(NamedTuple):
    """A tensor of a checkpoint, read on demand."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class _Place(NamedTuple):
    """The part of the parameters that a tensor holds."""

    leaf: int  # index into the flattened parameters
    layer: int | None  # index on the leaf's layer axis; None if it has none
    shape: tuple[int, ...]  # in the file
    transposed: bool  # files store kernels as [outputs, inputs]


def assemble(
    config: DecoderConfig,
    param_dtype: DTypeLike,
    tensors: Iterable[Tensor],
    names: Mapping[str, str],
    source: str,
    on_host: bool = False,
    mesh: Mesh | None = None,
) -> nnx.State:
    """Reads tensors one by one into stacked parameters.

    The stacks are allocated once and filled in place. Besides them, memory holds one tensor.

    Args:
      config: The model's shape.
      param_dtype: The parameters' dtype; tensors are cast to it.
      tensors: All tensors of the checkpoint.
      names: Parameter path -> tensor name, with `{}` for the layer: one of the tables above.
      source: The checkpoint's name in error messages.
      on_host: Whether to place the parameters in host memory instead of device memory.
      mesh: The devices to shard the parameters over. Default: the default device.

    Returns:
      The parameters, as from `nnx.split` of a `Decoder`.

    Raises:
      UserError: A tensor is missing, unexpected or of the wrong shape. No tensor was read.
    """
    params = _shapes(config, param_dtype, mesh)
    leaves, treedef = jax.tree.flatten(params)
    places = _places(params, names)
    found = {tensor.name: tensor for tensor in tensors}
    if missing := [name for name in places if name not in found]:
        raise UserError(f"{source} lacks the tensor {_first_of(missing)}; download the model again")
    if unexpected := [name for name in found if name not in places]:
        raise UserError(
            f"{source} has the tensor {_first_of(unexpected)}, which a "
            "model of this config does not have; use the config that belongs to the weights"
        )
    for name, place in places.items():
        if found[name].shape != place.shape:
            raise UserError(
                f"{source}: the tensor {name} has shape {list(found[name].shape)}, "
                f"expected {list(place.shape)}; use the config that belongs to the weights"
            )

    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        arrays = [_zeros(leaf, on_host=on_host) for leaf in leaves]
        for name, tensor in found.items():
            place = places[name]
            read = _shard(tensor.read(), leaves[place.leaf], place)
            filled = _fill(arrays[place.leaf], read, place.layer, transposed=place.transposed)
            # Dispatch is asynchronous: without a wait, tensors read ahead would pile up in memory.
            arrays[place.leaf] = filled.block_until_ready()
    return jax.tree.unflatten(treedef, arrays)


def disassemble(params: nnx.State, names: Mapping[str, str], dtype: DTypeLike) -> Iterator[Tensor]:
    """Yields the tensors of a checkpoint, layer by layer; the inverse of `assemble`."""
    leaves = jax.tree.leaves(params)
    for name, (leaf, layer, shape, transposed) in _places(params, names).items():
        take = functools.partial(_take, leaves[leaf], layer, transposed=transposed, dtype=dtype)
        yield Tensor(name, shape, lambda take=take: np.asarray(take()))


def init_layer_by_layer(
    config: DecoderConfig,
    seed: int,
    param_dtype: DTypeLike,
    *,
    on_host: bool = False,
    mesh: Mesh | None = None,
) -> nnx.State:
    """Returns the same weights as `init`; besides them, a device holds at most one layer.

    Args:
      config: The model's shape.
      seed: Random seed.
      param_dtype: The parameters' dtype.
      on_host: Whether to place the parameters in host memory instead of device memory.
      mesh: The devices to shard the parameters over. Default: the default device.

    Returns:
      The parameters, as from `nnx.split` of a `Decoder`.
    """
    leaves, treedef = jax.tree.flatten(_shapes(config, param_dtype, mesh))
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        # The parameters outside the layers do not depend on the number of layers.
        _, single = init(config.with_layers(1), seed, param_dtype)
        arrays, stacked = [], []
        for index, (keys, leaf) in enumerate(jax.tree.leaves_with_path(single)):
            array = _zeros(leaves[index], on_host=on_host)
            if _is_stacked(keys):
                stacked.append(index)
            else:
                array = _fill(array, leaf, None, transposed=False)
            arrays.append(array)
        rngs = nnx.Rngs(jax.random.key(seed))
        rngs.params()  # Decoder uses the first key for the embedding
        for layer, key in enumerate(jax.random.split(rngs.params(), config.num_layers)):
            tensors = jax.tree.leaves(_init_layer(config, param_dtype, key))
            for index, tensor in zip(stacked, tensors, strict=True):
                filled = _fill(arrays[index], tensor, layer, transposed=False)
                arrays[index] = filled.block_until_ready()
    return jax.tree.unflatten(treedef, arrays)


def _shapes(config: DecoderConfig, param_dtype: DTypeLike, mesh: Mesh | None) -> nnx.State:
    """Returns the parameters as `jax.ShapeDtypeStruct`, with shardings if there is a mesh."""
    _, params = abstract(config, param_dtype)
    return (
        params if mesh is None else sharding.with_shardings(params, shardings(config, params, mesh))
    )


def _places(params: nnx.State, names: Mapping[str, str]) -> dict[str, _Place]:
    """Returns tensor name -> place, layer by layer."""
    places = {}
    for index, (keys, leaf) in enumerate(jax.tree.leaves_with_path(params)):
        path, stacked = _path(keys), _is_stacked(keys)
        transposed = path.endswith("/kernel")
        shape = leaf.shape[1:] if stacked else leaf.shape
        shape = shape[::-1] if transposed else shape
        for layer in range(leaf.shape[0]) if stacked else (None,):
            places[names[path].format(layer)] = _Place(index, layer, shape, transposed)
    return dict(sorted(places.items(), key=lambda item: (item[1].layer or 0, item[1].leaf)))


def _path(keys: Any) -> str:
    return jax.tree_util.keystr(keys, simple=True, separator="/").removesuffix("/value")


def _is_stacked(keys: Any) -> bool:
    return _path(keys).startswith("layers/")


@functools.partial(jax.jit, static_argnums=(0, 1))
def _init_layer(config: DecoderConfig, param_dtype: DTypeLike, key: jax.Array) -> nnx.State:
    rngs = nnx.Rngs(key)
    return nnx.state(Layer(config, param_dtype=param_dtype, attention="xla", rngs=rngs))


def _zeros(leaf: jax.ShapeDtypeStruct, *, on_host: bool) -> jax.Array:
    if not on_host:
        return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)
    # From numpy: jnp.zeros would allocate on the device first, which may lack the memory.
    if leaf.sharding is None:
        return jax.device_put(np.zeros(leaf.shape, leaf.dtype), jax.memory.Space.Host)
    place = leaf.sharding.with_memory_kind("pinned_host")

    def zeros(index):  # the kernel allocates only the pages that are read
        return np.zeros(leaf.shape, leaf.dtype)[index]

    return jax.make_array_from_callback(leaf.shape, place, zeros)


def _shard(tensor: np.ndarray, leaf: jax.ShapeDtypeStruct, place: _Place) -> Any:
    """Copies to each device its shard of a tensor."""
    if leaf.sharding is None:
        return tensor
    spec = leaf.sharding.spec
    spec = spec if place.layer is None else spec[1:]
    placed = NamedSharding(leaf.sharding.mesh, P(*(spec[::-1] if place.transposed else spec)))
    return jax.make_array_from_callback(tensor.shape, placed, lambda index: tensor[index])


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _fill(stack: jax.Array, tensor: jax.Array, layer: int | None, *, transposed: bool) -> jax.Array:
    tensor = (tensor.T if transposed else tensor).astype(stack.dtype)
    if layer is None:
        return jax.device_put(reshard_like(tensor, stack), jax.typeof(stack).memory_space)
    tensor = reshard_like(tensor[None], stack)
    tensor = jax.device_put(tensor, jax.typeof(stack).memory_space)
    # Not stack.at[layer].set: its bounds check makes XLA copy the whole stack.
    return jax.lax.dynamic_update_slice_in_dim(stack, tensor, layer, axis=0)


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _take(stack: jax.Array, layer: int | None, *, transposed: bool, dtype: DTypeLike) -> jax.Array:
    tensor = stack if layer is None else jax.lax.dynamic_index_in_dim(stack, layer, keepdims=False)
    # A layer of a stack in host memory is transposed and cast on the device.
    tensor = sharding.replicate(jax.device_put(tensor, jax.memory.Space.Device))
    return (tensor.T if transposed else tensor).astype(dtype)


def _first_of(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
