"""What an instruction of a compiled program does: FLOPs, bytes in memory, bytes that it sends."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

from lomo_jax.plan.program import VIEWS, Instruction, Program, replica_groups

# Bytes that a device sends for each byte of its operand, in a ring of n devices.
SENT = {
    "all-gather": lambda n: n - 1,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1,
}

_FREE = VIEWS | {"constant", "optimization-barrier", "after-all", "partition-id", "replica-id"}

# Contracted axes of a `dot`, and of cuBLAS's custom call in JSON.
_CONTRACTED = re.compile(r'lhs_contracting_dim(?:ension)?s"?[=:][{\[]([\d,"]*)')
# Flash attention: the number of products of the size of the scores. Backward passes recompute the
# scores; cuDNN's kernel has five products, JAX's Triton kernel has two loops with four and three.
_CUDNN = {"forward": 2, "backward": 5}
_TRITON = {"mha_forward/": 2, "mha_backward/": 7}


def is_free(instruction: Instruction) -> bool:
    """Returns whether an instruction neither runs a kernel nor moves anything."""
    return instruction.opcode in _FREE or "AllocateBuffer" in instruction.attributes


class Product(NamedTuple):
    """A matrix product, or one kernel of flash attention."""

    flops: float
    dtype: str  # of the operands, XLA's name
    exact: bool  # float32 is not rounded to TF32
    is_attention: bool  # a kernel of flash attention


class Traffic(NamedTuple):
    """Bytes that a kernel or a copy moves."""

    device: int  # read and written in device memory
    from_host: int
    to_host: int


class Reader:
    """Reads what the instructions of one program do."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._by_name = program.instructions()

    def products(self, instruction: Instruction) -> Iterator[Product]:
        """Yields the matrix products of an instruction, those inside its kernel included."""
        target = re.search(r'custom_call_target="([^"]*)"', instruction.attributes)
        if target and (flash := self._flash_attention(target[1], instruction)):
            yield flash
        elif instruction.opcode == "dot" or (target and target[1].startswith("__cublas")):
            lhs = self._by_name[instruction.operands[0]].arrays[0]
            axes = _CONTRACTED.search(instruction.attributes)
            contracted = [lhs.shape[axis] for axis in _numbers(axes[1] if axes else "")]
            flops = 2.0 * math.prod(instruction.arrays[0].shape) * math.prod(contracted)
            exact = re.search("operand_precision.{0,3}highest", instruction.attributes, re.I)
            yield Product(flops, lhs.dtype, bool(exact), is_attention=False)
        for inner in self._inside(instruction):
            yield from self.products(inner)

    def _flash_attention(self, target: str, instruction: Instruction) -> Product | None:
        attributes = instruction.attributes
        if "fmha" in target:
            scores = re.search(
                r'"intermediate_tensor_shape".*?"dimensions": ?\[([^]]*)\]', attributes
            )
            assert scores is not None
            size = math.prod(_numbers(scores[1]))
            products = _CUDNN["backward" if "Backward" in target else "forward"]
            is_causal = "CAUSAL" in attributes
        else:
            products = next((n for name, n in _TRITON.items() if name in instruction.op_name), 0)
            if not products:
                return None
            query, key = (self._by_name[name].arrays[0] for name in instruction.operands[:2])
            batch, length, heads, _ = query.shape
            size, is_causal = batch * heads * length * key.shape[1], True  # as `models` calls it
        query = self._by_name[instruction.operands[0]].arrays[0]
        flops = 2.0 * products * size * query.shape[-1] / (2 if is_causal else 1)
        return Product(flops, query.dtype, exact=False, is_attention=True)

    def _inside(self, instruction: Instruction) -> list[Instruction]:
        """Returns the instructions inside the kernel of a fusion."""
        return self.program.computations[instruction.fused] if instruction.fused else []

    def scope(self, instruction: Instruction) -> str:
        """Returns the JAX operation of an instruction, or that of the end of its kernel."""
        named = [i.op_name for i in (*self._inside(instruction), instruction) if i.op_name]
        return named[-1] if named else ""

    def traffic(self, instruction: Instruction) -> Traffic:
        """Returns the bytes that an instruction moves, as if no cache helped.

        A slice of a stack is read, not the stack, and an update in place writes the slice.
        """
        inside = self._inside(instruction) or [instruction]
        same: dict[str, str] = {}  # a bitcast inside a kernel, and what it is another shape of
        users = collections.defaultdict(list)
        for user in inside:
            operands = [same.get(name, name) for name in user.operands]
            if user.opcode == "bitcast":
                same[user.name] = operands[0]
            for position, name in enumerate(operands):
                users[name].append((user, position))
        moved = collections.Counter[str]()

        inputs = [i.name for i in inside if i.opcode == "parameter"]
        for name in dict.fromkeys(inputs if instruction.fused else instruction.operands):
            value = self._by_name[name]
            read = sum(_read(value.size, user, position) for user, position in users[name])
            on_host = any(array.on_host for array in value.arrays)
            moved["from host" if on_host else "device"] += min(value.size, read)

        root = inside[-1]
        outputs = root.operands if root.opcode == "tuple" else (root.name,)
        for name in dict.fromkeys(same.get(name, name) for name in outputs):
            value = self._by_name[name]
            # The other results of a start are its operand and its context.
            arrays = value.arrays[:1] if value.opcode == "copy-start" else value.arrays
            written = sum(array.size for array in arrays)
            if value.opcode == "dynamic-update-slice":
                written = self._by_name[value.operands[1]].size
            elif value.opcode == "scatter":  # it reads what it changes
                written = 2 * self._by_name[value.operands[-1]].size
            moved["to host" if any(array.on_host for array in arrays) else "device"] += written
        return Traffic(moved["device"], moved["from host"], moved["to host"])

    def sent(self, instruction: Instruction) -> float | None:
        """Returns the bytes that a device sends in a collective, None for other instructions."""
        kind = instruction.opcode.removesuffix("-start")
        if kind not in SENT:
            return None
        operand = sum(self._by_name[name].size for name in instruction.operands)
        if kind == "collective-permute":
            return operand
        return operand * SENT[kind](replica_groups(instruction, self.program.devices).shape[1])


def _read(size: int, user: Instruction, position: int) -> int:
    """Returns the bytes that a user reads of an operand of a size."""
    if position == 0 and user.opcode in ("dynamic-slice", "gather", "slice"):
        return user.size
    in_place = position == 0 and user.opcode in ("dynamic-update-slice", "scatter")
    return 0 if in_place or user.opcode == "bitcast" else size


def _numbers(text: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", text)]
