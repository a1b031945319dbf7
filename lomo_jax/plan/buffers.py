"""The largest values of a compiled step, by name."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax

from lomo_jax.plan.memory import part

# Of XLA's text: `%name = SHAPE opcode(...)`, where SHAPE may be a tuple; and an array in a SHAPE.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%\S+ = (\(.*?\)|\S+) ([a-z][\w-]*)\(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(")
_HOST = "S(5)"  # XLA's name, in a layout, for the host's memory
# What these give is no memory of its own.
_VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}
_ENDS = {"copy-done", "async-done", "all-gather-done", "optimization-barrier"}
_COPIES = {"copy", "copy-start"}


class Buffer(NamedTuple):
    """A value in memory."""

    name: str  # of a parameter, or the operation that a temporary comes from
    shape: str  # such as bfloat16[32,4096,11008]
    size: int  # bytes
    on_host: bool


def arguments(tree: Any, *, on_host: bool) -> list[Buffer]:
    """Returns what a device has of a pytree of arrays or shapes, leaves named by their paths."""
    return [
        Buffer(
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"),
            f"{leaf.dtype}[{','.join(map(str, part(leaf)))}]",
            math.prod(part(leaf)) * leaf.dtype.itemsize,
            on_host,
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def temporaries(compiled: jax.stages.Compiled, arguments: Any, layer_inputs: int) -> list[Buffer]:
    """Returns the values that a step makes, each operation and shape once.

    Args:
      compiled: the step.
      arguments: pytree of arrays or shapes; what has the shape of one of them and is not a copy is
        taken for an update of it in place.
      layer_inputs: bytes of the layer inputs, by which they are recognised.
    """
    updated = {(part(leaf), leaf.dtype.itemsize) for leaf in jax.tree.leaves(arguments)}
    found: dict[tuple[str, str, bool], Buffer] = {}
    for opcode, operation, dtype, dims, layout in _values(compiled.as_text() or ""):
        itemsize = math.ceil(_bits(dtype) / 8)
        if (dims, itemsize) in updated and opcode not in _COPIES:
            continue
        size = math.prod(dims) * itemsize
        name = "layer inputs" if size == layer_inputs and len(dims) > 3 else operation
        shape, on_host = f"{_numpy_name(dtype)}[{','.join(map(str, dims))}]", _HOST in layout
        found[name, shape, on_host] = Buffer(name, shape, size, on_host)
    return list(found.values())


def _values(text: str) -> Iterator[tuple[str, str, str, tuple[int, ...], str]]:
    """Yields (opcode, operation of JAX, dtype, dims, layout) of every array that gets memory."""
    # The inside of a fusion, and of a reduction, stays in registers.
    inside = set(re.findall(r"(?:calls|to_apply)=%([\w.-]+)", text))
    skip = False
    for line in text.splitlines():
        if computation := _COMPUTATION.match(line):
            skip = computation[1] in inside
        instruction = None if skip else _INSTRUCTION.match(line)
        if instruction is None or instruction[2] in _VIEWS | _ENDS:
            continue
        named = re.search(r'op_name="([^"]*)"', line)
        operation = named[1].rsplit("/", 1)[-1] if named else instruction[2]
        for dtype, dims, layout in _ARRAY.findall(instruction[1]):
            yield (
                instruction[2],
                operation,
                dtype,
                tuple(map(int, filter(None, dims.split(",")))),
                layout,
            )


def _bits(dtype: str) -> int:
    """Returns the width of XLA's dtype: 16 for bf16, 8 for pred and f8e4m3fn."""
    digits = re.match(r"\D+(\d+)", dtype)
    return int(digits[1]) if digits else 8


def _numpy_name(dtype: str) -> str:
    """Returns numpy's name for XLA's dtype: float32 for f32."""
    if named := re.fullmatch(r"(bf|f|s|u)(\d+)", dtype):
        return {"bf": "bfloat", "f": "float", "s": "int", "u": "uint"}[named[1]] + named[2]
    return {"pred": "bool"}.get(dtype, dtype)
