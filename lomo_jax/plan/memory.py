"""The memory of a compiled step: how much each part needs, and the largest buffers."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax

from lomo_jax.fused import Offload, StepState
from lomo_jax.plan.program import VIEWS, Program

# The parts of a device's memory: label and field of `MemoryPlan`. They add up to the total.
PARTS = {
    "weights": "weights_gib",
    "optimizer state": "state_gib",
    "layer inputs": "layer_inputs_gib",
    "other temporaries": "temporaries_gib",
}

# The end of an asynchronous operation returns memory that its start has allocated.
_NO_NEW_MEMORY = VIEWS | {"copy-done", "async-done", "all-gather-done", "optimization-barrier"}
_COPIES = {"copy", "copy-start"}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory that one step needs on each device, in GiB, as planned by XLA."""

    weights_gib: float  # parameters in device memory
    state_gib: float  # optimizer state in device memory
    layer_inputs_gib: float  # saved for the backward pass in device memory
    temporaries_gib: float  # everything else in device memory, batch and outputs included
    host_gib: float  # everything in host memory
    total_gib: float  # device memory: the sum of the first four
    device_gib: float | None  # memory of the device; None if unknown
    usable_gib: float | None  # the part of it that JAX may allocate; None if unknown
    fits: bool | None  # whether the total is at most `usable_gib`; None if that is unknown
    gpu: str  # kind of the device, GPU or not, as JAX names it
    devices: int


def read_memory(
    compiled: jax.stages.Compiled,
    params: Any,
    state: StepState,
    *,
    gpu: str,
    device_gib: float | None = None,
    usable_gib: float | None = None,
    layer_inputs: int = 0,
    offload: Offload | None = None,
    devices: int = 1,
) -> MemoryPlan:
    """Reads the memory that XLA planned for a step.

    Args:
      compiled: the compiled step.
      params: its parameters, pytree of arrays or `jax.ShapeDtypeStruct`.
      state: its state, pytree of arrays or `jax.ShapeDtypeStruct`.
      gpu: kind of the device, as JAX names it.
      device_gib: memory of the device, GiB.
      usable_gib: the part of it that JAX may allocate, GiB.
      layer_inputs: bytes of the saved layer inputs on each device, offloaded or not.
      offload: the step's; ignored if the program uses no host memory, as on a CPU.
      devices: number of devices.

    Returns:
      The plan for one of the devices.
    """
    stats = compiled.memory_analysis()
    assert stats is not None, "CPUs, GPUs and TPUs have one"
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    total = device_memory(compiled)
    if offload is None or host == 0:
        offload = Offload()
    weights = 0 if offload.params else _size(params)
    optimizer = 0 if offload.state else _size(state.optimizer)
    inputs = 0 if offload.activations else layer_inputs
    return MemoryPlan(
        weights_gib=weights / 2**30,
        state_gib=optimizer / 2**30,
        layer_inputs_gib=inputs / 2**30,
        temporaries_gib=(total - weights - optimizer - inputs) / 2**30,
        host_gib=host / 2**30,
        total_gib=total / 2**30,
        device_gib=device_gib,
        usable_gib=usable_gib,
        fits=None if usable_gib is None else total / 2**30 <= usable_gib,
        gpu=gpu,
        devices=devices,
    )


def device_memory(compiled: jax.stages.Compiled) -> int:
    """Returns the device memory that XLA planned for a program, bytes on each device."""
    stats = compiled.memory_analysis()
    assert stats is not None, "CPUs, GPUs and TPUs have one"
    # An aliased output is the memory of a donated argument.
    outputs = stats.output_size_in_bytes - stats.alias_size_in_bytes
    return stats.argument_size_in_bytes + outputs + stats.temp_size_in_bytes


class Buffer(NamedTuple):
    """An array in memory."""

    name: str  # of a parameter, or of the operation that computes a temporary
    shape: str  # on one device, with the dtype, such as bfloat16[32,4096,11008]
    size: int  # bytes
    on_host: bool


def argument_buffers(tree: Any, *, on_host: bool) -> list[Buffer]:
    """Returns one device's buffers of a pytree of arrays or shapes, named by path."""
    return [
        Buffer(
            jax.tree_util.keystr(path, simple=True, separator="/").removesuffix("/value"),
            f"{leaf.dtype}[{','.join(map(str, shard_shape(leaf)))}]",
            math.prod(shard_shape(leaf)) * leaf.dtype.itemsize,
            on_host,
        )
        for path, leaf in jax.tree.leaves_with_path(tree)
    ]


def temporary_buffers(text: str, arguments: Any, layer_inputs: int) -> list[Buffer]:
    """Returns the temporaries of a step, one for each pair of operation and shape.

    Args:
      text: scheduled HLO of the step.
      arguments: pytree of arrays or shapes. A result with the shape of one of them counts as its
        update in place and is omitted, unless it is a copy.
      layer_inputs: bytes of the saved layer inputs, by which their buffer is recognised.
    """
    updated = {(shard_shape(leaf), leaf.dtype.itemsize) for leaf in jax.tree.leaves(arguments)}
    found: dict[tuple[str, str, bool], Buffer] = {}
    for instructions, _ in Program.parse(text).scheduled():
        for instruction in instructions:
            if instruction.opcode in _NO_NEW_MEMORY:
                continue
            for array in instruction.arrays:
                itemsize = array.size // (math.prod(array.shape) or 1)
                is_copy = instruction.opcode in _COPIES
                if (array.shape, itemsize) in updated and not is_copy:
                    continue
                name = instruction.op_name.rsplit("/", 1)[-1] or instruction.opcode
                if array.size == layer_inputs and len(array.shape) > 3:
                    name = "layer inputs"
                buffer = Buffer(name, str(array), array.size, array.on_host)
                found[name, buffer.shape, array.on_host] = buffer
    return list(found.values())


def shard_shape(leaf: jax.ShapeDtypeStruct | jax.Array) -> tuple[int, ...]:
    """Returns the shape of an array's shard on one device."""
    sharding = getattr(leaf, "sharding", None)  # NumPy's arrays have none
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def _size(tree: Any) -> int:
    """Bytes on one device."""
    return sum(math.prod(shard_shape(x)) * x.dtype.itemsize for x in jax.tree.leaves(tree))
