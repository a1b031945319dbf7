"""Compiles a step for a GPU that need not be installed."""

from __future__ import annotations

import importlib.util
from typing import Any

import jax
from jax.experimental import topologies
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from lomo_jax import sharding
from lomo_jax.errors import UserError
from lomo_jax.fused import Step, StepState
from lomo_jax.plan.gpus import GPU


def make_mesh(gpu: GPU, data: int = 1, fsdp: int = 1, tensor: int = 1) -> Mesh:
    """Returns a mesh of compile-only GPUs, with the axes of `lomo_jax.sharding.make_mesh`.

    Args:
      gpu: kind of the GPUs.
      data: GPUs along the axis `data`.
      fsdp: GPUs along the axis `fsdp`.
      tensor: GPUs along the axis `tensor`.

    Raises:
      UserError: XLA's compiler for NVIDIA GPUs is not installed, or JAX was initialized without it.
    """
    if not any(map(importlib.util.find_spec, ("jax_cuda13_plugin", "jax_cuda12_plugin"))):
        raise UserError(
            "XLA's compiler for NVIDIA GPUs is missing: pip install 'lomo_jax[cuda]'; it needs no "
            "GPU"
        )
    try:
        topology = topologies.get_topology_desc(
            platform="cuda",
            topology_name=gpu.device_kind,
            target_config=gpu.target_config(),
            topology=f"1x1x{data * fsdp * tensor}",
        )
    except NotImplementedError:
        raise UserError(
            "JAX found no GPU and did not load XLA's compiler for GPUs: set JAX_PLATFORMS=cpu "
            "before JAX is first used"
        ) from None
    return sharding.make_mesh(data, fsdp, tensor, devices=topology.devices)


def compile_step(
    step: Step,
    params: Any,
    batch: Any,
    mesh: Mesh,
    compiler_options: dict[str, Any] | None = None,
) -> tuple[jax.stages.Compiled, StepState]:
    """Compiles a step, with parameters and state donated.

    Args:
      step: a step of `fused_step` or `reference_step`.
      params: pytree of arrays or `jax.ShapeDtypeStruct` with the shardings of `sharding.shardings`.
        A leaf without a `NamedSharding` is replicated on every device.
      batch: pytree of arrays or `jax.ShapeDtypeStruct`, in the same way.
      mesh: a mesh of `make_mesh`.
      compiler_options: options of XLA in addition to the step's own.

    Returns:
      The compiled step, which has a `memory_analysis()` but cannot be called, and the state as a
      pytree of `jax.ShapeDtypeStruct`.
    """

    def place(tree: Any, *, on_host: bool = False) -> Any:
        # Compile-only devices report no memory kinds, and a sharding over them silently drops the
        # kind that it is given. A sharding over an abstract mesh keeps the kind; the batch then
        # gives JAX the devices.
        where, kind = (mesh.abstract_mesh, "pinned_host") if on_host else (mesh, None)

        def place_leaf(x):
            spec = getattr(getattr(x, "sharding", None), "spec", PartitionSpec())
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
        options = step.compiler_options | (compiler_options or {})
        traced = jax.jit(step, donate_argnums=(0, 1)).trace(*arguments)
    # JAX does not look up the platform of the devices under an abstract mesh.
    lowered = traced.lower(lowering_platforms=("cuda",))
    return lowered.compile(options), state
