"""The memory of a run: its plan, and how to lower it when the device has too little."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple, Self

import jax
import numpy as np
from jax.sharding import AbstractMesh, Mesh

from lomo_jax import sharding
from lomo_jax.errors import ConfigError, OutOfMemoryError, UserError
from lomo_jax.fused import Offload, StepState
from lomo_jax.plan import GPU, MemoryPlan, TimePlan, compile_step, read_memory, read_time
from lomo_jax.plan import make_mesh as make_plan_mesh
from lomo_jax.plan.memory import PARTS, Buffer, argument_buffers, temporary_buffers
from lomo_jax.training import model as model_lib
from lomo_jax.training.config import Config, MeshConfig
from lomo_jax.training.devices import batch_sender, batch_shapes, check_batch, make_mesh
from lomo_jax.training.model import Model
from lomo_jax.training.step import CompiledStep, make_step

_REQUEST = re.compile(r"allocat\w+ ([\d.]+ ?(?:[KMGT]i?B|bytes))")

Changes = dict[str, Any]  # fields of a config by name, such as "offload.params", and new values


class CompiledRun(NamedTuple):
    """The step of a run, compiled for a GPU."""

    config: Config  # with the `remat` that was compiled, which is not "auto"
    plan: MemoryPlan
    executable: jax.stages.Compiled
    params: Any  # pytree of jax.ShapeDtypeStruct
    state: StepState  # of jax.ShapeDtypeStruct
    offload: Offload
    layer_inputs: int  # bytes on each device
    time: TimePlan

    def argument_buffers(self) -> list[Buffer]:
        """Returns the buffers of parameters and optimizer state, the largest first."""
        params = argument_buffers(self.params, on_host=self.offload.params)
        state = argument_buffers(self.state.optimizer, on_host=self.offload.state)
        return sorted(params + state, key=lambda buffer: -buffer.size)

    def temporary_buffers(self) -> list[Buffer]:
        """Returns the buffers of temporaries, the largest first."""
        text, arguments = self.executable.as_text() or "", (self.params, self.state)
        found = temporary_buffers(text, arguments, self.layer_inputs)
        return sorted(found, key=lambda buffer: -buffer.size)


def compile_run(
    config: Config,
    gpu: GPU,
    devices: int | None = None,
    compiler_options: dict[str, Any] | None = None,
) -> CompiledRun:
    """Compiles the step of a run for GPUs that need not be installed.

    With `remat="auto"` it compiles more and more recomputation until the step fits.

    Args:
      config: a config that is valid for a plan: it needs neither dataset nor checkpoint.
      gpu: kind of the GPUs.
      devices: number of GPUs; see `mesh_shape`.
      compiler_options: options of XLA in addition to the step's own.

    Raises:
      UserError: The config cannot run on these GPUs, or XLA's compiler for them is missing.
    """
    for remat in config.remats():
        one = dataclasses.replace(config, remat=remat)
        compiled = _compile_run(one, gpu, devices, compiler_options)
        if compiled.plan.fits:
            break
    return compiled


def _compile_run(
    config: Config, gpu: GPU, devices: int | None, compiler_options: dict[str, Any] | None
) -> CompiledRun:
    sizes = mesh_shape(config.mesh, devices)
    # Problems of the run are reported before a missing compiler.
    mesh = sharding.abstract_mesh(sizes)
    check_batch(mesh, config.batch_size, config.microbatches)
    model = _abstract_model(config, gpu, mesh)
    step = make_step(model.loss, config.make_optimizer(), **config.step_options())
    batch = batch_shapes(config.batch_size, config.sequence_length, mesh, seeds=model.has_dropout)
    inputs = layer_inputs(batch, model)
    plan_mesh = make_plan_mesh(gpu, *sizes)
    executable, state = compile_step(step, model.shapes, batch, plan_mesh, compiler_options)
    plan = read_memory(
        executable,
        model.shapes,
        state,
        gpu=gpu.device_kind,
        device_gib=gpu.memory_gib,
        usable_gib=gpu.usable_gib,
        layer_inputs=inputs,
        offload=step.offload,
        devices=plan_mesh.size,
    )
    tokens = config.batch_size * config.sequence_length
    time = read_time(executable, gpu, tokens=tokens)
    return CompiledRun(config, plan, executable, model.shapes, state, step.offload, inputs, time)


def mesh_shape(mesh: MeshConfig, devices: int | None) -> tuple[int, int, int]:
    """Returns the sizes of the mesh to plan for.

    Args:
      mesh: sizes of the axes, of which one may be -1.
      devices: number of devices; None for the product of the sizes, -1 taken for 1.

    Raises:
      ConfigError: The sizes do not fit the number of devices.
    """
    sizes: dict[str, int] = vars(mesh)
    product = math.prod(size for size in sizes.values() if size > 0)
    if devices is None:
        devices = product
    if devices < 1:
        raise ConfigError(f"--devices: {devices}; set 1 or more")
    if devices != product and min(sizes.values()) > 0:
        axes = " * ".join(f"mesh.{name}={size}" for name, size in sizes.items())
        raise ConfigError(
            f"--devices: {devices}, but {axes} is {product}; leave --devices out, or set one size "
            "to -1"
        )
    try:
        return sharding.mesh_shape(devices, **sizes)
    except ValueError as error:
        raise ConfigError(str(error)) from error


def layer_inputs(batch: Mapping[str, jax.ShapeDtypeStruct], model: Model) -> int:
    """Returns the bytes of layer inputs that each device saves for the backward pass.

    Args:
      batch: The shapes from `devices.batch_shapes`.
      model: The model; its activations have the dtype of its weights.
    """
    tokens, dtype = batch["tokens"], jax.tree.leaves(model.shapes)[0].dtype
    assert tokens.sharding is not None
    shape = tokens.sharding.shard_shape(tokens.shape)
    return math.prod(shape) * model.config.num_layers * model.config.width * dtype.itemsize


def plan_step(compiled: CompiledStep, model: Model) -> MemoryPlan:
    """Returns the plan of a step that is compiled for the devices of this process."""
    sharded: Any = compiled.batch["tokens"].sharding
    return read_memory(
        compiled.update,
        model.shapes,
        compiled.state,
        gpu=jax.local_devices()[0].device_kind,
        usable_gib=_usable_gib(),
        layer_inputs=layer_inputs(compiled.batch, model),
        offload=compiled.step.offload,
        devices=sharded.mesh.size,
    )


def describe(plan: MemoryPlan) -> str:
    """Returns a plan as one line."""
    limit = "" if plan.usable_gib is None else f" of {plan.usable_gib:.1f}"
    parts = ", ".join(f"{label} {getattr(plan, field):.1f}" for label, field in PARTS.items())
    host = f"; in host memory {plan.host_gib:.1f}" if plan.host_gib else ""
    return f"{plan.total_gib:.1f}{limit} GiB planned for the step: {parts}{host}"


def memory_savings(config: Config, devices: int, *, state_gib: float = 0.0) -> Iterator[Changes]:
    """Yields changes of a config, each of which lowers the memory of the run on its own.

    Args:
      config: a config that can run on `devices`.
      devices: number of devices of the run.
      state_gib: optimizer state in device memory, GiB; a small one is not worth offloading.
    """
    if not config.fused:
        yield {"fused": True}
    else:
        if config.remats()[-1] != "full":
            yield {"remat": "full"}
        if not config.offload.activations:
            yield {"offload.activations": True}
        if not config.offload.params:
            yield {"offload.params": True, "offload.activations": True}
        if not config.offload.state and state_gib > 0.1:
            yield {"offload.state": True}
    data, fsdp, _ = sharding.mesh_shape(devices, **vars(config.mesh))
    rows = config.batch_size // (data * fsdp)  # of the batch, on each device
    microbatches = 2 * config.microbatches
    while rows % microbatches == 0:
        yield {"microbatches": microbatches}
        microbatches *= 2
    if rows % (2 * config.microbatches) == 0:
        yield {"batch_size": config.batch_size // 2}
    if config.sequence_length % 2 == 0:
        yield {"sequence_length": config.sequence_length // 2}


def as_flags(changes: Changes) -> str:
    """Returns changes as flags of the command line."""
    values = {name: str(value).lower() for name, value in changes.items()}
    return " ".join(f"--config.{name}={value}" for name, value in values.items())


class MemoryGuard:
    """A context manager that turns XLA's RESOURCE_EXHAUSTED into `OutOfMemoryError`."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self.plan: MemoryPlan | None = None  # set it: its total is part of the message

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            facts = [f"the step needs {self.plan.total_gib:.1f} GiB"] if self.plan else []
            if request := _REQUEST.search(str(error)):
                facts.append(f"an allocation of {request[1]} failed")
            raise OutOfMemoryError(
                f"the device is out of memory{': ' if facts else ''}{' and '.join(facts)}; "
                f"{_advice(self._config, self.plan)}"
            ) from error


def _advice(config: Config, plan: MemoryPlan | None) -> str:
    """Returns advice for a run that needs too much memory."""
    state_gib = plan.state_gib if plan else 0.0
    flags: dict[str, str] = {}
    for changes in memory_savings(config, jax.device_count(), state_gib=state_gib):
        flags.setdefault(next(iter(changes)), as_flags(changes))
    if not flags:
        return "use a smaller model or a device with more memory"
    return f"try {', or '.join(flags.values())}; `lomo-jax plan --suggest` plans each"


def measure(config: Config, gpu: GPU, steps: int = 3) -> float:
    """Runs steps of a run on random weights and tokens, on the GPU of this machine.

    Args:
      config: a config that is valid for a plan.
      gpu: the expected kind of the GPU.
      steps: number of steps.

    Returns:
      The peak of device memory in use, GiB.

    Raises:
      UserError: JAX runs on another device than `gpu`.
    """
    device = jax.devices()[0]
    if device.device_kind != gpu.device_kind:
        raise UserError(
            f"--measure: this machine has no {gpu.device_kind}, JAX runs on {device.device_kind}; "
            "leave --measure out to plan only"
        )
    mesh = make_mesh(config.mesh, config.batch_size, config.microbatches)
    with jax.set_mesh(mesh):
        model = _abstract_model(config, gpu, mesh)
        source = dataclasses.replace(config.model, init="random")
        params = model_lib.load_params(source, model, on_host=config.offload.params, mesh=mesh)
        step = make_step(model.loss, config.make_optimizer(), **config.step_options())
        shapes = batch_shapes(
            config.batch_size, config.sequence_length, mesh, seeds=model.has_dropout
        )
        tokens = np.random.default_rng(0).integers(
            model.config.vocab_size, size=shapes["tokens"].shape, dtype=np.int32
        )
        batch = {name: np.ones(x.shape, x.dtype) for name, x in shapes.items()}
        batch = batch_sender(shapes)(batch | {"tokens": tokens})
        state = jax.jit(lambda params: step.init(params, shapes))(params)
        run = jax.jit(step, donate_argnums=(0, 1), compiler_options=step.compiler_options)
        for _ in range(steps):
            params, state, out = run(params, state, batch)
            out.loss.block_until_ready()
    return (device.memory_stats() or {})["peak_bytes_in_use"] / 2**30


def _abstract_model(config: Config, gpu: GPU, mesh: Mesh | AbstractMesh) -> Model:
    return model_lib.abstract(
        config.model,
        config.param_dtype,
        config.sequence_length,
        config.attention,
        capability=gpu.compute_capability,
        mesh=mesh,
        adapters=config.lora,
    )


def _usable_gib() -> float | None:
    """Returns the memory that JAX may allocate on a device, None if the backend does not say."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit / 2**30
