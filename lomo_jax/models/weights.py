"""Conversion between stacked parameters and the per-layer tensors of checkpoint files."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator
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
from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import reshard_like
from lomo_jax.models.config import DecoderConfig
from lomo_jax.models.decoder import abstract, init, shardings
from lomo_jax.models.families import Layout
from lomo_jax.models.layers import Layer
from lomo_jax.quantize import Matrix, quantize


class Tensor(NamedTuple):
    """A tensor of a checkpoint, read on demand."""

    name: str
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]


class _Place(NamedTuple):
    """The part of the parameters that some rows of a tensor hold."""

    leaf: int  # index into the flattened parameters
    index: tuple[int, ...]  # on the leaf's leading axes: none, the layer, or layer and expert
    shape: tuple[int, ...]  # in the file
    transposed: bool  # files store kernels as [outputs, inputs]
    pairs: tuple[int, int] | None  # (head_dim, rotary_dim) if the file interleaves rotary pairs
    offset: float  # what the file adds to the parameter

    def from_file(self, rows: np.ndarray) -> np.ndarray:
        """Returns rows of a tensor of a file as our parameter, but for the transposition."""
        rows = rows if self.pairs is None else swap_pairs(rows, *self.pairs, to_file=False)
        return rows - np.asarray(self.offset, rows.dtype) if self.offset else rows

    def to_file(self, rows: np.ndarray) -> np.ndarray:
        """The inverse of `from_file`."""
        rows = rows + np.asarray(self.offset, rows.dtype) if self.offset else rows
        return rows if self.pairs is None else swap_pairs(rows, *self.pairs, to_file=True)


def assemble(
    config: DecoderConfig,
    param_dtype: DTypeLike,
    tensors: Iterable[Tensor],
    layout: Layout,
    source: str,
    on_host: bool = False,
    mesh: Mesh | None = None,
    quantized: str = "none",
) -> nnx.State:
    """Reads tensors one by one into stacked parameters.

    The stacks are allocated once and filled in place. Besides them, memory holds one tensor.

    Args:
      config: The model's shape.
      param_dtype: The parameters' dtype; tensors are cast to it.
      tensors: All tensors of the checkpoint.
      layout: How the checkpoint stores the parameters.
      source: The checkpoint's name in error messages.
      on_host: Whether to place the parameters in host memory instead of device memory.
      mesh: The devices to shard the parameters over. Default: the default device.
      quantized: See `decoder.abstract`.

    Returns:
      The parameters, as from `nnx.split` of a `Decoder`.

    Raises:
      UserError: A tensor is missing, unexpected or of the wrong shape. No tensor was read.
    """
    found = {tensor.name: tensor for tensor in tensors}
    # Before anything that takes time or memory for each layer.
    if len(found) < config.num_layers * max(1, config.num_experts):
        experts = f" with {config.num_experts} experts" if config.num_experts else ""
        raise UserError(
            f"{source} has {len(found)} tensors, too few for {config.num_layers} layers{experts}; "
            "use the config that belongs to the weights"
        )
    params = _shapes(config, param_dtype, mesh)
    leaves, names = jax.tree.leaves(params), arrays.names(params)
    places = _places(config, params, layout)
    _check(places, found, source)
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        stacks = _Stacks(config, param_dtype, quantized, on_host, mesh)
        for name, tensor in found.items():
            whole, start = tensor.read(), 0
            for place in places[name]:
                rows = place.from_file(whole[start : start + place.shape[0]])
                start += place.shape[0]
                name_of_leaf = names[place.leaf]
                whole_matrix = stacks.is_quantized(name_of_leaf)
                read = _shard(rows, leaves[place.leaf], place, replicated=whole_matrix)
                stacks.fill(name_of_leaf, read, place.index, transposed=place.transposed)
        return stacks.params()


class _Stacks:
    """The parameters of a model, filled in place one tensor at a time."""

    def __init__(
        self,
        config: DecoderConfig,
        param_dtype: DTypeLike,
        quantized: str,
        on_host: bool,
        mesh: Mesh | None,
    ) -> None:
        shapes = _shapes(config, param_dtype, mesh, quantized)
        self._kind, self._treedef = quantized, jax.tree.structure(shapes)
        self._arrays = {
            name: _zeros(leaf, on_host=on_host)
            for name, leaf in zip(arrays.names(shapes), jax.tree.leaves(shapes), strict=True)
        }

    def is_quantized(self, name: str) -> bool:
        """Returns whether a parameter of a model of floats is stored in fewer bits."""
        return name not in self._arrays

    def fill(self, name: str, tensor: Any, index: tuple[int, ...], *, transposed: bool) -> None:
        """Writes a tensor to a stack.

        Args:
          name: The name of the parameter in a model of floats.
          tensor: The tensor.
          index: See `_Place`.
          transposed: Whether the tensor is a transposed kernel, as in files.
        """
        if not self.is_quantized(name):
            parts = {name: tensor}
        else:
            matrix = _quantize(self._kind, tensor, transposed=transposed).named()
            kernel = name.removesuffix("/value")
            parts = {f"{kernel}/{part}/value": x for part, x in matrix.items()}
            transposed = False
        for part, x in parts.items():
            filled = _fill(self._arrays[part], x, index, transposed=transposed)
            # Dispatch is asynchronous: without a wait, tensors read ahead would pile up in memory.
            self._arrays[part] = filled.block_until_ready()

    def params(self) -> nnx.State:
        """Returns the parameters."""
        return jax.tree.unflatten(self._treedef, list(self._arrays.values()))


def disassemble(
    config: DecoderConfig, params: nnx.State, layout: Layout, dtype: DTypeLike
) -> Iterator[Tensor]:
    """Yields the tensors of a checkpoint, layer by layer; the inverse of `assemble`."""
    leaves = jax.tree.leaves(params)
    if any(name.removesuffix("/value").endswith("/codes") for name in arrays.names(params)):
        raise UserError("a quantised model cannot be saved: save the original one")

    def read(places: list[_Place]) -> np.ndarray:
        rows = [
            place.to_file(
                np.asarray(
                    _take(leaves[place.leaf], place.index, transposed=place.transposed, dtype=dtype)
                )
            )
            for place in places
        ]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    for name, places in _places(config, params, layout).items():
        yield Tensor(name, _shape(places), functools.partial(read, places))


def _check(places: dict[str, list[_Place]], found: dict[str, Tensor], source: str) -> None:
    """Raises UserError unless the tensors found are those of the model."""
    if missing := [name for name in places if name not in found]:
        raise UserError(f"{source} lacks the tensor {_first_of(missing)}; download the model again")
    if unexpected := [name for name in found if name not in places]:
        raise UserError(
            f"{source} has the tensor {_first_of(unexpected)}, which a "
            "model of this config does not have; use the config that belongs to the weights"
        )
    for name, parts in places.items():
        if found[name].shape != _shape(parts):
            raise UserError(
                f"{source}: the tensor {name} has shape {list(found[name].shape)}, "
                f"expected {list(_shape(parts))}; use the config that belongs to the weights"
            )


def init_layer_by_layer(
    config: DecoderConfig,
    seed: int,
    param_dtype: DTypeLike,
    *,
    on_host: bool = False,
    mesh: Mesh | None = None,
    quantized: str = "none",
) -> nnx.State:
    """Returns the same weights as `init`; besides them, a device holds at most one layer.

    Args:
      config: The model's shape.
      seed: Random seed.
      param_dtype: The parameters' dtype.
      on_host: Whether to place the parameters in host memory instead of device memory.
      mesh: The devices to shard the parameters over. Default: the default device.
      quantized: See `decoder.abstract`.

    Returns:
      The parameters, as from `nnx.split` of a `Decoder`.
    """
    with nullcontext() if mesh is None else jax.set_mesh(mesh):
        # The parameters outside the layers do not depend on the number of layers.
        _, single = init(config.with_layers(1), seed, param_dtype)
        stacks, stacked = _Stacks(config, param_dtype, quantized, on_host, mesh), []
        for name, leaf in zip(arrays.names(single), jax.tree.leaves(single), strict=True):
            if name.startswith("layers/"):
                stacked.append(name)
            else:
                stacks.fill(name, leaf, (), transposed=False)
        rngs = nnx.Rngs(jax.random.key(seed))
        rngs.params()  # Decoder uses the first key for the embedding
        for layer, key in enumerate(jax.random.split(rngs.params(), config.num_layers)):
            tensors = jax.tree.leaves(_init_layer(config, param_dtype, key))
            for name, tensor in zip(stacked, tensors, strict=True):
                stacks.fill(name, tensor, (layer,), transposed=False)
        return stacks.params()


def _shapes(
    config: DecoderConfig, param_dtype: DTypeLike, mesh: Mesh | None, quantized: str = "none"
) -> nnx.State:
    """Returns the parameters as `jax.ShapeDtypeStruct`, with shardings if there is a mesh."""
    _, params = abstract(config, param_dtype, quantized=quantized)
    return (
        params if mesh is None else sharding.with_shardings(params, shardings(config, params, mesh))
    )


def _places(config: DecoderConfig, params: nnx.State, layout: Layout) -> dict[str, list[_Place]]:
    """Returns tensor name -> the places of its rows, layer by layer."""
    order = list(layout.names)
    pairs = (config.head_dim, config.rotary_dim or config.head_dim)
    found: list[tuple[int, int, str, _Place]] = []
    for leaf_index, (keys, leaf) in enumerate(jax.tree.leaves_with_path(params)):
        path, stacked = _path(keys), _is_stacked(keys)
        module, _, kind = path.rpartition("/") if "/" in path else (path, "", "scale")
        is_kernel, is_norm = kind == "kernel", "norm" in module
        leading = (2 if "/experts/" in path else 1) if stacked else 0
        shape = leaf.shape[leading:]
        shape = shape[::-1] if is_kernel else shape
        rotates = module in ("layers/attention/q", "layers/attention/k")
        suffix = ".bias" if kind == "bias" else ".weight"
        for index in np.ndindex(leaf.shape[:leading]):
            place = _Place(
                leaf_index,
                index,
                shape,
                is_kernel,
                pairs if rotates and layout.interleaved else None,
                layout.scale_offset if is_norm and kind == "scale" else 0.0,
            )
            name = layout.names[module].format(*index) + suffix
            found.append((index[0] if index else 0, order.index(module), name, place))
    places: dict[str, list[_Place]] = {}
    for _, _, name, place in sorted(found, key=lambda item: item[:2]):
        places.setdefault(name, []).append(place)
    return places


def _shape(places: list[_Place]) -> tuple[int, ...]:
    """Returns the shape of a tensor whose rows have these places."""
    return (sum(place.shape[0] for place in places), *places[0].shape[1:])


def swap_pairs(rows: np.ndarray, head_dim: int, rotary_dim: int, *, to_file: bool) -> np.ndarray:
    """Reorders each head's outputs between the pairs (2i, 2i + 1) and (i, i + r / 2)."""
    heads = rows.reshape(-1, head_dim, *rows.shape[1:])
    half = rotary_dim // 2
    inner = (2, half) if to_file else (half, 2)
    turned = heads[:, :rotary_dim].reshape(len(heads), *inner, *rows.shape[1:])
    turned = turned.swapaxes(1, 2).reshape(len(heads), rotary_dim, *rows.shape[1:])
    return np.concatenate([turned, heads[:, rotary_dim:]], axis=1).reshape(rows.shape)


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


def _shard(
    tensor: np.ndarray, leaf: jax.ShapeDtypeStruct, place: _Place, *, replicated: bool
) -> Any:
    """Copies to each device its shard of a tensor, or all of it."""
    if leaf.sharding is None:
        return tensor
    if replicated:
        everywhere = NamedSharding(leaf.sharding.mesh, P())
        return jax.make_array_from_callback(tensor.shape, everywhere, lambda index: tensor[index])
    spec = leaf.sharding.spec
    spec = (*spec, *(None,) * (leaf.ndim - len(spec)))[len(place.index) :]
    placed = NamedSharding(leaf.sharding.mesh, P(*(spec[::-1] if place.transposed else spec)))
    return jax.make_array_from_callback(tensor.shape, placed, lambda index: tensor[index])


@functools.partial(jax.jit, static_argnums=0, static_argnames="transposed")
def _quantize(kind: str, tensor: jax.Array, *, transposed: bool) -> Matrix:
    tensor = sharding.replicate(tensor)
    return quantize(kind, tensor if transposed else tensor.T)


@functools.partial(jax.jit, donate_argnums=0, static_argnames="transposed")
def _fill(
    stack: jax.Array, tensor: jax.Array, index: tuple[int, ...], *, transposed: bool
) -> jax.Array:
    tensor = (tensor.T if transposed else tensor).astype(stack.dtype)
    if not index:
        return jax.device_put(reshard_like(tensor, stack), jax.typeof(stack).memory_space)
    tensor = reshard_like(tensor.reshape((1,) * len(index) + tensor.shape), stack)
    tensor = jax.device_put(tensor, jax.typeof(stack).memory_space)
    # Not stack.at[layer].set: its bounds check makes XLA copy the whole stack.
    starts = (*index, *(0,) * (stack.ndim - len(index)))
    return jax.lax.dynamic_update_slice(stack, tensor, starts)


@functools.partial(jax.jit, static_argnames=("transposed", "dtype"))
def _take(
    stack: jax.Array, index: tuple[int, ...], *, transposed: bool, dtype: DTypeLike
) -> jax.Array:
    tensor = stack
    for i in index:
        tensor = jax.lax.dynamic_index_in_dim(tensor, i, keepdims=False)
    # A layer of a stack in host memory is transposed and cast on the device.
    tensor = sharding.replicate(jax.device_put(tensor, jax.memory.Space.Device))
    return (tensor.T if transposed else tensor).astype(dtype)


def _first_of(names: list[str]) -> str:
    more = f" and {len(names) - 1} more" if len(names) > 1 else ""
    return names[0] + more
