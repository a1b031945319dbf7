"""What a step keeps in host memory."""

import dataclasses
from typing import Any

import jax


@dataclasses.dataclass(frozen=True)
class Offload:
    """What lives in pinned host memory and is brought to the device a layer at a time.

    Results are those without it. On GPUs it trades memory for transfers over PCIe; on CPUs it
    changes nothing.

    Args:
      params: the parameters. Put them there before the first step, `jax.device_put(params,
        jax.memory.Space.Host)`; the step leaves them there, updated in place. A layer is fetched
        for the forward pass, fetched again for the backward pass, and written back once.
      activations: the layer inputs that the forward pass keeps for the backward pass.
      state: the state of the optimizer; `step.init` puts it there.
    """

    params: bool = False
    activations: bool = False
    state: bool = False


def is_on_host(x: Any) -> bool:
    """Whether an array, traced or not, is in host memory."""
    return getattr(jax.typeof(x), "memory_space", None) == jax.memory.Space.Host


def to_host(tree: Any) -> Any:
    """Moves every array to host memory."""
    move = lambda x: x if is_on_host(x) else jax.device_put(x, jax.memory.Space.Host)  # noqa: E731
    return jax.tree.map(move, tree)


def to_device(tree: Any) -> Any:
    """Moves every array to device memory."""
    move = lambda x: jax.device_put(x, jax.memory.Space.Device) if is_on_host(x) else x  # noqa: E731
    return jax.tree.map(move, tree)


def beside(tree: Any, like: Any) -> Any:
    """Moves every array to where the array of the tree `like` is."""
    return jax.tree.map(lambda x, y: to_host(x) if is_on_host(y) else to_device(x), tree, like)
