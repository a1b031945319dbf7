"""Reads a compiled program: the scheduled HLO that `jax.stages.Compiled.as_text` returns."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, Self

import numpy as np

# `%name = SHAPE opcode(OPERANDS), ATTRIBUTES`, where SHAPE is an array or a tuple of shapes.
_INSTRUCTION = re.compile(r"^\s+(?:ROOT )?%(\S+) = (\(.*?\)|\S+) ([a-z][\w-]*)\((.*?)\)(.*)")
_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \(")
_ARRAY = re.compile(r"(\w+)\[([\d,]*)\](?:\{([^}]*)\})?")
_VALUE = re.compile(r"%([\w.-]+)")
# Opcodes that run the instructions of a computation one after the other. Computations called by
# other opcodes (fusions, reductions) are the inside of one kernel.
_SUBROUTINES = {
    "while": re.compile(r"(?:condition|body)=(%[\w.-]+)"),
    "call": re.compile(r"to_apply=(%[\w.-]+)"),
    "conditional": re.compile(
        r"(?:branch_computations=\{|(?:true|false)_computation=)((?:%[\w.-]+(?:, )?)+)"
    ),
    "async-start": re.compile(r"calls=(%[\w.-]+)"),
}
_FUSED = re.compile(r"calls=%([\w.-]+)")
_HOST = "S(5)"  # the memory space of the host, in a layout
_NUMPY_KINDS = {"bf": "bfloat", "f": "float", "s": "int", "u": "uint"}

# Opcodes whose result shares another value's memory.
VIEWS = {"parameter", "get-tuple-element", "tuple", "bitcast", "while", "conditional", "call"}


class Array(NamedTuple):
    """The type of an array, and its memory."""

    dtype: str  # XLA's name, such as bf16
    shape: tuple[int, ...]
    on_host: bool

    @property
    def size(self) -> int:
        """Bytes."""
        digits = re.match(r"\D+(\d+)", self.dtype)  # of f8e4m3fn the first ones; pred has none
        return math.prod(self.shape) * math.ceil(int(digits[1] if digits else 8) / 8)

    def __str__(self) -> str:
        """The type with NumPy's name of the dtype, such as bfloat16[32,4096]."""
        named = re.fullmatch(r"(bf|f|s|u)(\d+)", self.dtype)
        dtype = _NUMPY_KINDS[named[1]] + named[2] if named else self.dtype
        return f"{'bool' if dtype == 'pred' else dtype}[{','.join(map(str, self.shape))}]"


class Instruction(NamedTuple):
    """One instruction of a computation."""

    name: str  # unique in the program
    opcode: str
    arrays: tuple[Array, ...]  # the result; more than one if it is a tuple
    operands: tuple[str, ...]  # names of instructions
    op_name: str  # the JAX operation with its scopes, "" if unknown
    subroutines: tuple[str, ...]  # computations that it runs, a loop's condition included
    trip_count: int | None  # of a loop; None if unknown
    attributes: str  # everything after the operands

    @property
    def size(self) -> int:
        """Bytes of the result."""
        return sum(array.size for array in self.arrays)

    @property
    def fused(self) -> str | None:
        """The computation inside the kernel of a fusion; None for other instructions."""
        called = _FUSED.search(self.attributes) if self.opcode.startswith("fusion") else None
        return called[1] if called else None


class Program(NamedTuple):
    """A compiled program."""

    entry: str
    computations: dict[str, list[Instruction]]  # in the order in which they run
    devices: int

    @classmethod
    def parse(cls, text: str) -> Self:
        """Parses scheduled HLO."""
        entry = ""
        computations: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in text.splitlines():
            if computation := _COMPUTATION.match(line):
                current = computations.setdefault(computation[2], [])
                entry = computation[2] if computation[1] else entry
            elif instruction := _INSTRUCTION.match(line):
                current.append(_parse_instruction(*instruction.groups()))
        partitions = re.search(r"num_partitions=(\d+)", text)
        return cls(entry, computations, int(partitions[1]) if partitions else 1)

    def instructions(self) -> dict[str, Instruction]:
        """Returns every instruction by its name, those inside kernels included."""
        return {i.name: i for found in self.computations.values() for i in found}

    def scheduled(self) -> Iterator[tuple[Sequence[Instruction], tuple[int | None, ...]]]:
        """Yields the computations whose instructions run one after the other.

        A computation that is called twice is yielded twice. The inside of a kernel is left out.

        Yields:
          The instructions, and the trip counts of the loops around them, the outermost first.
        """
        yield from self._scheduled(self.entry, ())

    def _scheduled(
        self, name: str, trips: tuple[int | None, ...]
    ) -> Iterator[tuple[Sequence[Instruction], tuple[int | None, ...]]]:
        yield self.computations[name], trips
        for instruction in self.computations[name]:
            is_loop = instruction.opcode == "while"
            inner = (*trips, instruction.trip_count) if is_loop else trips
            for subroutine in instruction.subroutines:
                yield from self._scheduled(subroutine, inner)


def _parse_instruction(
    name: str, shape: str, opcode: str, operands: str, attributes: str
) -> Instruction:
    op_name = re.search(r'op_name="([^"]*)"', attributes)
    trip_count = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
    calls = _SUBROUTINES[opcode].findall(attributes) if opcode in _SUBROUTINES else []
    return Instruction(
        name,
        opcode,
        tuple(
            Array(dtype, tuple(_numbers(dims)), _HOST in layout)
            for dtype, dims, layout in _ARRAY.findall(shape)
        ),
        tuple(_VALUE.findall(operands)),
        op_name[1] if op_name else "",
        tuple(name for called in calls for name in _VALUE.findall(called)),
        int(trip_count[1]) if trip_count else None,
        attributes,
    )


def replica_groups(instruction: Instruction, devices: int) -> np.ndarray:
    """Returns the groups of devices that communicate in a collective, int [groups, group size].

    XLA writes them in one of four forms:

    * `{{0,1},{2,3}}`, or `{}` for one group of all devices;
    * `[2,2]<=[4]` or `[2,2]<=[2,2]T(1,0)`, the shape of the result and how to fill it;
    * `mesh['a'=2,'b'=2], device_ids=([2,2]T(1,0)) {'a'}`, the axes along which a group extends.

    Args:
      instruction: a collective with replica groups; not a collective-permute.
      devices: number of devices of the program.

    Raises:
      ValueError: The form is unknown.
    """
    text = instruction.attributes.split("replica_groups=")[1]
    if mesh := re.match(r"mesh\[([^]]*)\](?:, device_ids=\((\S+)\))? \{([^}]*)\}", text):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        along = re.findall(r"'(\w+)'", mesh[3])
        if ":" in mesh[3]:
            raise ValueError(f"a group along a part of an axis: {mesh[0]}")
        ids = _iota(mesh[2] or f"[{devices}]").reshape(list(sizes.values()))
        ids = np.moveaxis(ids, [list(sizes).index(a) for a in along], range(-len(along), 0))
        return ids.reshape(-1, math.prod(sizes[a] for a in along))
    if iota := re.match(r"\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", text):
        return _iota(iota[2]).reshape(_numbers(iota[1]))
    if listed := re.match(r"\{(\{[\d,{}]*\})\}", text):
        return np.array([_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])])
    if text.startswith("{}"):
        return np.arange(devices)[None]
    raise ValueError(f"unknown replica groups: {text[:80]}")


def source_target_pairs(instruction: Instruction) -> np.ndarray:
    """Returns the pairs of devices of a collective-permute, int [pairs, 2]."""
    text = instruction.attributes.split("source_target_pairs=")[1]
    listed = re.match(r"\{(?:\{\d+,\d+\},?)*\}", text)
    assert listed is not None
    return np.array(re.findall(r"\{(\d+),(\d+)\}", listed[0]), int)


def _iota(text: str) -> np.ndarray:
    """Returns the values of `[2,3]T(1,0)`: 0, 1, 2, ... in this shape, transposed, then flat."""
    shape, *order = (_numbers(part) for part in re.findall(r"[\d,]*\d", text)[:2])
    return np.arange(math.prod(shape)).reshape(shape).transpose(*order).ravel()


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",") if number]
