"""Plans of the runs of `train.py`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from lomo_jax import sharding
from lomo_jax.fused import Offload, StepState
from lomo_jax.plan import buffers
from lomo_jax.plan.buffers import Buffer
from lomo_jax.plan.compiling import compile_step, make_mesh
from lomo_jax.plan.gpus import GPU
from lomo_jax.plan.memory import MemoryPlan, read_memory
from lomo_jax.training import Config
from lomo_jax.training import model as model_lib
from lomo_jax.training.devices import check_batch, sender
from lomo_jax.training.devices import make_mesh as make_run_mesh
from lomo_jax.training.step import batch_shapes, layer_inputs, make_step


class Compiled(NamedTuple):
    """A run's step, compiled for a GPU."""

    plan: MemoryPlan
    executable: jax.stages.Compiled
    params: Any  # pytree of jax.ShapeDtypeStruct
    state: StepState  # of jax.ShapeDtypeStruct
    offload: Offload
    layer_inputs: int  # bytes

    def given(self) -> list[Buffer]:
        """Returns what the step is given, the largest first."""
        given = buffers.arguments(self.params, on_host=self.offload.params)
        given += buffers.arguments(self.state.optimizer, on_host=self.offload.state)
        return sorted(given, key=lambda buffer: -buffer.size)

    def made(self) -> list[Buffer]:
        """Returns what the step makes on the way, the largest first."""
        made = buffers.temporaries(self.executable, (self.params, self.state), self.layer_inputs)
        return sorted(made, key=lambda buffer: -buffer.size)


def compile_run(
    config: Config,
    gpu: GPU,
    devices: int = 1,
    compiler_options: dict[str, Any] | None = None,
) -> Compiled:
    """Compiles the step that `train.py` would run.

    Args:
      config: valid for a plan: neither text nor checkpoint need be there.
      gpu: to compile for.
      devices: how many of it.
      compiler_options: for XLA, as of `jax.jit`.

    Raises:
      ConfigError, FileNotFoundError, ValueError: see `training.model.abstract`.
      ModuleNotFoundError, ValueError: see `make_mesh`.
    """
    if devices < 1:
        raise ValueError(f"--devices: {devices}; set 1 or more")
    sizes = sharding.mesh_shape(devices, **vars(config.mesh))
    # What is wrong with the run is told before what is missing to compile it.
    mesh = sharding.abstract_mesh(sizes)
    check_batch(config, mesh)
    model, params = model_lib.abstract(config, gpu.compute_capability, mesh)
    step, inputs = make_step(config, model), layer_inputs(config, model, mesh)
    batch = batch_shapes(config, mesh)
    executable, state = compile_step(step, params, batch, make_mesh(gpu, *sizes), compiler_options)
    plan = read_memory(
        executable,
        params,
        state,
        gpu=gpu.title,
        device_gib=gpu.memory_gib,
        usable_gib=gpu.usable_gib,
        layer_inputs=inputs,
        offload=step.offload,
        devices=devices,
    )
    return Compiled(plan, executable, params, state, step.offload, inputs)


def knobs(config: Config, plan: MemoryPlan) -> Iterator[tuple[str, Config]]:
    """Yields what lowers the memory of a run, one thing at a time.

    Args:
      config: the run.
      plan: its plan.

    Yields:
      The flags to add to the command line, and the config that they make.
    """
    change = dataclasses.replace
    if config.fused:
        if config.remat != "full":
            yield "--config.remat=full", change(config, remat="full")
        on = config.offload
        if not on.activations:
            offload = change(on, activations=True)
            yield _offload_flags("activations"), change(config, offload=offload)
        if not on.params:
            offload = change(on, params=True, activations=True)
            yield _offload_flags("params", "activations"), change(config, offload=offload)
        if not on.state and plan.state_gib > 0.1:
            yield _offload_flags("state"), change(config, offload=change(on, state=True))
    else:
        yield "--config.fused=true", change(config, fused=True)
    parts = 2 * config.microbatches
    while config.batch_size % parts == 0:
        yield f"--config.microbatches={parts}", change(config, microbatches=parts)
        parts *= 2
    half = config.batch_size // 2
    if config.batch_size % 2 == 0 and half % config.microbatches == 0:
        yield f"--config.batch_size={half}", change(config, batch_size=half)
    if config.sequence_length % 2 == 0:
        half = config.sequence_length // 2
        yield f"--config.sequence_length={half}", change(config, sequence_length=half)


def measure(config: Config, gpu: GPU, steps: int = 3) -> float:
    """Runs the step on random weights and tokens, on the GPU that is there.

    Returns:
      The most device memory that was ever in use, GiB.

    Raises:
      ValueError: JAX runs on something other than `gpu`.
    """
    device = jax.devices()[0]
    if device.device_kind != gpu.title:
        raise ValueError(
            f"--measure: there is no {gpu.title} here, JAX runs on {device.device_kind}; leave it "
            "out to plan only"
        )
    mesh = make_run_mesh(config)
    with jax.set_mesh(mesh):
        return _measure(config, gpu, mesh, steps)


def _measure(config: Config, gpu: GPU, mesh: Mesh, steps: int) -> float:
    model, _ = model_lib.abstract(config, gpu.compute_capability, mesh)
    source = dataclasses.replace(config.model, init="random")
    params = model_lib.load_params(dataclasses.replace(config, model=source), model, mesh)
    step, shapes = make_step(config, model), batch_shapes(config, mesh)
    tokens = np.random.default_rng(0).integers(
        model.config.vocab_size, size=shapes["tokens"].shape, dtype=np.int32
    )
    batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()} | {"tokens": tokens}
    batch = sender(config, mesh, range(config.batch_size))(batch)
    state = jax.jit(lambda params: step.init(params, shapes))(params)
    run = jax.jit(step, donate_argnums=(0, 1))
    for _ in range(steps):
        params, state, out = run(params, state, batch)
        out.loss.block_until_ready()
    return (jax.devices()[0].memory_stats() or {})["peak_bytes_in_use"] / 2**30


def _offload_flags(*names: str) -> str:
    return " ".join(f"--config.offload.{name}=true" for name in names)
