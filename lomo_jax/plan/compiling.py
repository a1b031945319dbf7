"""Compiling a step for a GPU that need not be there."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lomo_jax import sharding
from lomo_jax.fused import Step, StepState
from lomo_jax.plan.gpus import GPU


def make_mesh(gpu: GPU, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh, as of `lomo_jax.sharding`, of GPUs that can be compiled for and not run on.

    Args:
      gpu: to compile for.
      data: GPUs along the axis.
      fsdp: likewise.
      tensor: likewise.

    Raises:
      ModuleNotFoundError: XLA's compiler for NVIDIA GPUs is not installed.
      RuntimeError: JAX has already looked for a GPU, where there is none.
    """
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise ModuleNotFoundError(
            "XLA's compiler for NVIDIA GPUs is missing: pip install 'lomo_jax[cuda]'; no GPU is "
            "needed for it"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=gpu.title,
            target_config=gpu.target_config(),
            topology=f"1x1x{data * fsdp * tensor}",
        )
    except NotImplementedError:
        raise RuntimeError(
            "JAX looked for a GPU, found none and left XLA's compiler for GPUs out: set "
            "JAX_PLATFORMS=cpu before JAX is first used"
        ) from None
    return sharding.make_mesh(data, fsdp, tensor, devices=topology.devices)


def compile_step(
    step: Step,
    params: Any,
    batch: Any,
    mesh: Mesh,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[jax.stages.Compiled, StepState]:
    """Compiles a step as it will run, parameters and state donated.

    Args:
      step: made by `fused_step` or `reference_step`.
      params: pytree of `jax.ShapeDtypeStruct`, with the shardings of `sharding.shardings`; without
        one a parameter is on every device.
      batch: likewise.
      mesh: of `make_mesh`.
      compiler_options: for XLA, as of `jax.jit`.

    Returns:
      The compiled step, which has a `memory_analysis()` and cannot be called, and the shapes of
      its state.
    """

    def place(tree: Any, *, on_host: bool = False) -> Any:
        # Devices to compile for report no kinds of memory, and a sharding over them drops the kind
        # that it is given. One over an abstract mesh keeps it, and the batch names the devices.
        where, kind = (mesh.abstract_mesh, "pinned_host") if on_host else (mesh, None)

        def place_leaf(x):
            spec = PartitionSpec() if x.sharding is None else x.sharding.spec
            return jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(where, spec, memory_kind=kind)
            )

        return jax.tree.map(place_leaf, tree)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        state = jax.eval_shape(step.init, place(params), place(batch))
        arguments = (
            place(params, on_host=step.offload.params),
            place(state)._replace(optimizer=place(state.optimizer, on_host=step.offload.state)),
            place(batch),
        )
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    # Of devices under a mesh JAX does not ask which kind of GPU they are.
    lowered = traced.lower(lowering_platforms=("cuda",))
    return lowered.compile(compiler_options), state
