"""The container format GGUF: metadata and tensors, checked against the size of the file.

By hand: the reader of the package gguf trusts the counts in a file, and takes seconds for a large
vocabulary.

References:
  https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import struct
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from lomo_jax._schema import short
from lomo_jax.errors import UserError

_MAGIC, _VERSIONS = b"GGUF", (2, 3)
_MAX_DIMS = 4
_STRING, _ARRAY = 8, 9
_SCALARS = {  # type of a value in the file -> its format
    0: "<u1",
    1: "<i1",
    2: "<u2",
    3: "<i2",
    4: "<u4",
    5: "<i4",
    6: "<f4",
    7: "?",
    10: "<u8",
    11: "<i8",
    12: "<f8",
}


class StoredTensor(NamedTuple):
    """A tensor as it is stored."""

    name: str
    shape: tuple[int, ...]
    kind: gguf.GGMLQuantizationType
    data: np.ndarray  # uint8 [..., bytes of a row], a view of the file

    def read(self) -> np.ndarray:
        """Returns the values, dequantised to float32.

        Raises:
          UserError: The package gguf cannot dequantise this type.
        """
        try:
            return gguf.dequantize(self.data, self.kind).reshape(self.shape)
        except NotImplementedError:
            raise UserError(
                f"the tensor {self.name} is stored as {self.kind.name}, which cannot be read; use "
                "a file with another quantisation"
            ) from None


def read(path: Path) -> tuple[dict[str, Any], list[StoredTensor]]:
    """Memory-maps a file.

    Returns:
      Its metadata, and its tensors.

    Raises:
      UserError: The file is truncated or not a GGUF file.
      OSError: The file cannot be read.
    """
    try:
        return _Reader(np.memmap(path, np.uint8, "r")).read()
    except ValueError as error:  # of _Reader; of NumPy, for an empty file; of UTF-8
        raise UserError(
            f"{path} is truncated or not a GGUF file ({error}); download it again"
        ) from None


class _Reader:
    """Reads from front to back. Nothing is allocated for more than the file holds."""

    def __init__(self, content: np.ndarray) -> None:
        self._content, self._at = content, 0

    def read(self) -> tuple[dict[str, Any], list[StoredTensor]]:
        if bytes(self._take(4)) != _MAGIC:
            raise ValueError("it does not start with GGUF")
        if (version := self._integer("<I")) not in _VERSIONS:
            raise ValueError(f"version {version}; supported: 2, 3, little-endian")
        num_tensors, num_keys = self._integer("<Q"), self._integer("<Q")
        metadata: dict[str, Any] = {}
        for _ in range(num_keys):
            key = self._string()
            if key in metadata:
                raise ValueError(f"{short(key)} is there twice")
            metadata[key] = self._value(self._integer("<I"))
        headers = {}
        for _ in range(num_tensors):
            name, *header = self._header()
            if name in headers:
                raise ValueError(f"the tensor {short(name)} is there twice")
            headers[name] = header
        alignment = metadata.get("general.alignment", 32)
        if alignment not in (1 << n for n in range(21)):
            raise ValueError(f"general.alignment={short(alignment)} is not a power of two")
        start = -(-self._at // alignment) * alignment
        return metadata, [self._tensor(name, start, *rest) for name, rest in headers.items()]

    def _take(self, size: int) -> np.ndarray:
        if size > len(self._content) - self._at:
            raise ValueError(f"it ends before byte {self._at + size}")
        self._at += size
        return self._content[self._at - size : self._at]

    def _integer(self, format: str) -> int:
        return struct.unpack(format, bytes(self._take(struct.calcsize(format))))[0]

    def _string(self) -> str:
        return bytes(self._take(self._integer("<Q"))).decode("utf-8")

    def _value(self, kind: int) -> Any:
        if kind == _STRING:
            return self._string()
        if kind == _ARRAY:
            item, length = self._integer("<I"), self._integer("<Q")
            return self._array(item, length)
        return self._array(kind, 1)[0]

    def _array(self, kind: int, length: int) -> list[Any]:
        if kind == _STRING:
            return [self._string() for _ in range(length)]
        if kind not in _SCALARS:
            raise ValueError(f"a value has the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        return self._take(length * dtype.itemsize).view(dtype).tolist()

    def _header(self) -> tuple[str, tuple[int, ...], int, int]:
        """Returns name, shape, type and offset of a tensor."""
        name, num_dims = self._string(), self._integer("<I")
        if num_dims > _MAX_DIMS:
            raise ValueError(f"the tensor {short(name)} has {num_dims} dimensions")
        shape = tuple(self._integer("<Q") for _ in range(num_dims))
        return name, shape[::-1], self._integer("<I"), self._integer("<Q")

    def _tensor(
        self, name: str, start: int, shape: tuple[int, ...], kind: int, offset: int
    ) -> StoredTensor:
        if kind not in gguf.GGML_QUANT_SIZES:
            raise ValueError(f"the tensor {short(name)} has the unknown type {kind}")
        per_block, block_bytes = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType(kind)]
        if (shape or (1,))[-1] % per_block:
            raise ValueError(f"the tensor {short(name)} has rows that are not whole blocks")
        self._at = start + offset
        row_bytes = (shape or (1,))[-1] // per_block * block_bytes
        data = self._take(math.prod(shape[:-1]) * row_bytes)
        data = data.reshape(*shape[:-1], row_bytes)
        return StoredTensor(name, shape, gguf.GGMLQuantizationType(kind), data)
