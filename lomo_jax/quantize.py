"""Kernels in 8 or 4 bits, dequantised where a layer uses them.

Dimensions: I inputs, O outputs, N blocks of 64 weights, M blocks of 256 blocks, L layers.

A kernel `[..., I, O]` is stored as bitsandbytes stores a weight of torch, `[..., O, I]`: its blocks
lie along the inputs. Only the layer that runs has a kernel of floats. Such a kernel cannot be
trained; adapters beside it can.

Not qwix, which quantises for JAX: its 4 bits have no double quantisation, its scales are not those
of bitsandbytes, and it quantises by tracing a whole model that is in memory already.

References:
  Dettmers et al., QLoRA: Efficient Finetuning of Quantized LLMs, arXiv 2305.14314.
  Dettmers et al., LLM.int8(): 8-bit Matrix Multiplication for Transformers, arXiv 2208.07339.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike

from lomo_jax import sharding
from lomo_jax._linear_maps import ALL, find
from lomo_jax.errors import UserError
from lomo_jax.fused import arrays
from lomo_jax.fused.arrays import to_device

NONE, INT8, NF4 = "none", "int8", "nf4"
KINDS = (NONE, INT8, NF4)
_BLOCK, _NESTED = 64, 256

# Quantiles of a normal distribution, scaled to [-1, 1]; QLoRA, appendix E.
NF4_CODE = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


def _dynamic_code() -> np.ndarray:
    """Returns the 256 values of bitsandbytes' dynamic map: seven decades, the n-th has 2^n values.

    Its last bit differs between processors: torch.linspace rounds as their vectors are long.
    """
    parts = [np.array([0.0, 1.0])]
    for decade in range(7):
        bounds = np.linspace(0.1, 1, 2**decade + 1)
        means = 10.0 ** (decade - 6) * (bounds[:-1] + bounds[1:]) / 2
        parts += [means, -means]
    return np.sort(np.concatenate(parts)).astype(np.float32)


DYNAMIC_CODE = _dynamic_code()


class Matrix(NamedTuple):
    """A matrix [O, I] in 8 bits, or in 4 bits with double quantisation; each may be stacked."""

    codes: Any  # int8 [O, I], or uint8 [O, I / 2]: two weights each, the first in the high bits
    absmax: Any  # float32 [O], the largest magnitude of a row; or uint8 [O, I / 64], of a block
    absmax_scale: Any = None  # float32 [M], of 256 values of `absmax`
    absmax_offset: Any = None  # float32 []

    def named(self) -> dict[str, Any]:
        """Returns the arrays by name."""
        return {name: x for name, x in self._asdict().items() if x is not None}


class QuantizedKernel(nnx.Module):
    """The kernel of an `nnx.Linear` in 8 or 4 bits. ``kernel[...]`` dequantises it, `[I, O]`.

    Args:
      matrix: The quantised kernel; a stack has leading axes.
      shape: Of the kernel, `[..., I, O]`.
      dtype: Of the dequantised kernel.
    """

    def __init__(self, matrix: Matrix, shape: tuple[int, ...], dtype: DTypeLike) -> None:
        self.shape, self.dtype = shape, jnp.dtype(dtype)
        for name, array in matrix.named().items():
            setattr(self, name, nnx.Param(array))

    def __getitem__(self, _: Any) -> jax.Array:
        names = [name for name in Matrix._fields if hasattr(self, name)]
        parts = {name: sharding.gather(to_device(getattr(self, name)[...])) for name in names}
        return dequantize(Matrix(**parts), self.dtype).T


def quantize_kernels(model: nnx.Module, kind: str, targets: Sequence[str] | str = ALL) -> None:
    """Quantises the kernels of linear maps of a model, in place.

    Args:
      model: Any nnx model; its linear maps may be stacked, `[L, I, O]`. Add adapters afterwards.
      kind: "int8" or "nf4"; "none" does nothing.
      targets: See `lora.LoRA`.

    Raises:
      UserError: There is no such kind or linear map, or its inputs are no multiple of 64 for "nf4".
    """
    if kind not in KINDS:
        raise UserError(f"quantisation {kind!r} is not one of {', '.join(KINDS)}")
    if kind == NONE:
        return
    for path, linear in find(model, targets):
        kernel = linear.kernel[...]
        if kind == NF4 and kernel.shape[-2] % _BLOCK:
            raise UserError(
                f"{'/'.join(map(str, path))} has {kernel.shape[-2]} inputs, not a multiple of "
                f"{_BLOCK} as nf4 needs: use int8"
            )
        matrix = _quantize_stack(kind, kernel)
        setattr(linear, "kernel", QuantizedKernel(matrix, kernel.shape, kernel.dtype))  # noqa: B010


@functools.partial(jax.jit, static_argnums=0)
def _quantize_stack(kind: str, kernel: jax.Array) -> Matrix:
    of_stack = functools.partial(quantize, kind)
    for _ in kernel.shape[:-2]:
        of_stack = jax.vmap(of_stack)
    return of_stack(jnp.swapaxes(kernel, -1, -2))


def quantize(kind: str, w_OxI: jax.Array) -> Matrix:
    """Quantises a matrix `[O, I]` as bitsandbytes does.

    Args:
      kind: "int8": each row scaled by its largest magnitude. "nf4": blocks of 64 weights, and their
        scales in 8 bits, less their mean, in blocks of 256.
      w_OxI: The matrix; for "nf4" I is a multiple of 64.
    """
    w_OxI = w_OxI.astype(jnp.float32)
    if kind == INT8:
        absmax_O = jnp.abs(w_OxI).max(-1)
        codes_OxI = jnp.round(w_OxI * (_reciprocal(absmax_O) * 127)[:, None])
        return Matrix(codes_OxI.astype(jnp.int8), absmax_O)
    rows, inputs = w_OxI.shape
    w_Nx64 = w_OxI.reshape(-1, _BLOCK)
    absmax_N = jnp.abs(w_Nx64).max(-1)
    index_Nx64 = _nearest(NF4_CODE, w_Nx64 * _reciprocal(absmax_N)[:, None])
    high, low = jnp.moveaxis(index_Nx64.reshape(rows, -1, 2), -1, 0)
    offset = absmax_N.mean()
    centred_N = absmax_N - offset
    padded_Mx256 = jnp.pad(centred_N, (0, -len(centred_N) % _NESTED)).reshape(-1, _NESTED)
    scale_M = jnp.abs(padded_Mx256).max(-1)
    nested_Mx256 = _nearest(DYNAMIC_CODE, padded_Mx256 * _reciprocal(scale_M)[:, None])
    nested_N = nested_Mx256.reshape(-1)[: len(centred_N)]
    return Matrix(high << 4 | low, nested_N.reshape(rows, inputs // _BLOCK), scale_M, offset)


def dequantize(matrix: Matrix, dtype: DTypeLike) -> jax.Array:
    """Returns the matrix `[O, I]` in a floating-point dtype, computed in float32."""
    if matrix.absmax_scale is None:
        scale_O = matrix.absmax * jnp.float32(1 / 127)
        return (matrix.codes.astype(jnp.float32) * scale_O[:, None]).astype(dtype)
    rows, blocks = matrix.absmax.shape
    scale_N = jnp.repeat(matrix.absmax_scale, _NESTED)[: rows * blocks]
    nested_OxN = _look_up(DYNAMIC_CODE, matrix.absmax)
    absmax_OxN = nested_OxN * scale_N.reshape(rows, blocks) + matrix.absmax_offset
    shifts = sharding.replicate(jnp.array([4, 0], jnp.uint8))  # fused, as a stack is not
    both = (matrix.codes[..., None] >> shifts) & 15
    w_OxNx64 = _look_up(NF4_CODE, _reshape_rows(both, blocks, _BLOCK))
    return _reshape_rows((w_OxNx64 * absmax_OxN[..., None]).astype(dtype), blocks * _BLOCK)


def _reshape_rows(x: jax.Array, *shape: int) -> jax.Array:
    """Reshapes each row; only the axis of rows may be sharded."""
    spec = P(arrays.partition_spec(x)[0], *(None for _ in shape))
    return jax.lax.reshape(x, (len(x), *shape), out_sharding=arrays.explicit_sharding(x, spec))


def _look_up(code: np.ndarray, index: jax.Array) -> jax.Array:
    """Returns the values of a code, sharded like their indices."""
    values, index = sharding.replicate(jnp.asarray(code)), index.astype(jnp.int32)
    return values.at[index].get(out_sharding=arrays.explicit_sharding(index))


def _nearest(code: np.ndarray, x: jax.Array) -> jax.Array:
    """Returns the index of the nearest value of a sorted code, uint8."""
    bounds = (code[1:] + code[:-1]) / np.float32(2)
    return jnp.searchsorted(jnp.asarray(bounds), x, method="compare_all").astype(jnp.uint8)


def _reciprocal(scale: jax.Array) -> jax.Array:
    return jnp.where(scale == 0, 0.0, 1 / jnp.where(scale == 0, 1.0, scale))
