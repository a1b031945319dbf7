"""The memory that a compiled step needs, and what it is for."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax

from lomo_jax.fused import Offload, StepState

# What a device's memory is for: label and field of `MemoryPlan`. They add up to the total.
PARTS = {
    "weights": "weights_gib",
    "optimizer state": "state_gib",
    "layer inputs": "layer_inputs_gib",
    "other temporaries": "temporaries_gib",
}


@dataclasses.dataclass(frozen=True)
class MemoryPlan:
    """The memory that one step needs on each device, in GiB, as XLA planned it."""

    weights_gib: float  # parameters in device memory
    state_gib: float  # of the optimizer, in device memory
    layer_inputs_gib: float  # kept for the backward pass, in device memory
    temporaries_gib: float  # everything else on the device, the batch and the outputs too
    host_gib: float  # whatever is in host memory
    total_gib: float  # of the device: the first four
    device_gib: float | None  # what the device has; None if that is not known
    usable_gib: float | None  # what JAX may allocate of it; None if that is not known
    fits: bool | None  # whether the total is at most `usable_gib`
    gpu: str
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
      compiled: the step, compiled.
      params: its parameters, arrays or shapes.
      state: its state, likewise.
      gpu: what to call the device.
      device_gib: what the device has.
      usable_gib: what JAX may allocate of it.
      layer_inputs: bytes of them on each device, wherever they are.
      offload: the step's.
      devices: how many there are.
    """
    offload = offload or Offload()
    stats = compiled.memory_analysis()
    assert stats is not None, "CPUs, GPUs and TPUs have one"
    host = (
        stats.host_argument_size_in_bytes
        + stats.host_output_size_in_bytes
        - stats.host_alias_size_in_bytes
        + stats.host_temp_size_in_bytes
    )
    if host == 0:  # a CPU has one memory, and all of it is the device's
        offload = Offload()
    total = (
        stats.argument_size_in_bytes
        + stats.output_size_in_bytes
        - stats.alias_size_in_bytes
        + stats.temp_size_in_bytes
    )
    weights = 0 if offload.params else _bytes(params)
    optimizer = 0 if offload.state else _bytes(state.optimizer)
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


def part(leaf: jax.ShapeDtypeStruct | jax.Array) -> tuple[int, ...]:
    """Returns the shape of what each device has of an array."""
    sharding = getattr(leaf, "sharding", None)  # NumPy's arrays have none
    return leaf.shape if sharding is None else sharding.shard_shape(leaf.shape)


def _bytes(tree: Any) -> int:
    return sum(math.prod(part(leaf)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
