"""The memory of a run: what its step is planned to need, and what to do where there is less."""

import re
from typing import Any, Self

import jax
from jax.sharding import Mesh

from lomo_jax.errors import OutOfMemoryError
from lomo_jax.plan import MemoryPlan, read_memory
from lomo_jax.training.config import Config
from lomo_jax.training.model import Model
from lomo_jax.training.step import batch_shapes, layer_inputs

_ASKED = re.compile(r"allocat\w+ ([\d.]+ ?(?:[KMGT]i?B|bytes))")


class MemoryGuard:
    """Turns XLA's report of a lack of memory into `OutOfMemoryError`; use as a context."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._facts: list[str] = []

    def __enter__(self) -> Self:
        return self

    def planned(self, plan: MemoryPlan) -> None:
        """Takes in what the step needs, for the error to say."""
        self._facts.append(f"the step needs {plan.total_gib:.1f} GiB")

    def __exit__(self, _kind: object, error: BaseException | None, _traceback: object) -> None:
        if isinstance(error, jax.errors.JaxRuntimeError) and "RESOURCE_EXHAUSTED" in str(error):
            asked = _ASKED.search(str(error))
            facts = self._facts + ([f"there was no room for {asked[1]}"] if asked else [])
            what = " and ".join(facts) or "it says no more"
            raise OutOfMemoryError(
                f"the device is out of memory: {what}; {advice(self._config)}"
            ) from error


def advice(config: Config) -> str:
    """Says what lowers the memory of a run, of all that it does not do yet."""
    knobs = []
    if config.fused:
        offloads = {"activations": config.offload.activations, "params": config.offload.params}
        knobs += [f"--config.offload.{name}=true" for name, is_on in offloads.items() if not is_on]
        knobs += ["--config.remat=full"] if config.remat != "full" else []
    else:
        knobs.append("--config.fused=true")
    if config.microbatches < config.batch_size:
        knobs.append(f"more microbatches than {config.microbatches}")
    if config.batch_size > 1:
        knobs.append(f"a batch_size below {config.batch_size}")
    knobs.append(f"a sequence_length below {config.sequence_length}")
    return f"try {', '.join(knobs)}; python -m lomo_jax.plan --suggest plans what each would give"


def plan_step(
    config: Config,
    model: Model,
    mesh: Mesh,
    compiled: jax.stages.Compiled,
    params: Any,
    state: Any,
) -> MemoryPlan:
    """Returns what the compiled step of a run needs of each device."""
    device = jax.local_devices()[0]
    return read_memory(
        compiled,
        params,
        state,
        gpu=device.device_kind,
        usable_gib=usable_gib(),
        layer_inputs=layer_inputs(
            batch_shapes(config.batch_size, config.sequence_length, mesh), model, config.param_dtype
        ),
        offload=config.offload,
        devices=mesh.size,
    )


def usable_gib() -> float | None:
    """Returns what JAX may allocate of the device's memory, None where the backend is silent."""
    limit = (jax.local_devices()[0].memory_stats() or {}).get("bytes_limit")
    return None if limit is None else limit / 2**30


def describe(plan: MemoryPlan) -> str:
    """Says in a line what a step needs of the device that is there."""
    parts = {
        "weights": plan.weights_gib,
        "optimizer state": plan.state_gib,
        "layer inputs": plan.layer_inputs_gib,
        "temporaries": plan.temporaries_gib,
    }
    usable = usable_gib()
    there = "" if usable is None else f" of {usable:.1f}"
    host = f"; in host memory {plan.host_gib:.1f}" if plan.host_gib else ""
    listed = ", ".join(f"{name} {gib:.1f}" for name, gib in parts.items())
    return f"{plan.total_gib:.1f}{there} GiB planned for the step: {listed}{host}"
