"""Plans the rows of `compare.py` for a GPU that need not be there."""

import time
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from jax_step import Step, planned_gib
from rows import Row, Size

from lomo_jax import models, plan, sharding
from lomo_jax.plan.gpus import GPU, GPUS


def find(name: str) -> GPU:
    """Returns a GPU by its name in `lomo_jax.plan` or by the title that its driver gives it."""
    titles = {gpu.title: gpu for gpu in GPUS.values()}
    return titles.get(name) or plan.find(name)


def plan_row(row: Row, size: Size, gpu: GPU) -> dict[str, Any]:
    """Returns `planned_gib` of a JAX row, and `compile_seconds` of this machine.

    Raises:
      ModuleNotFoundError, RuntimeError: see `lomo_jax.plan.make_mesh`.
    """
    start = time.perf_counter()
    compiled = compile_row(row, size, gpu)
    return {
        "device": gpu.title,
        "planned_gib": planned_gib(compiled),
        "compile_seconds": time.perf_counter() - start,
    }


def compile_row(row: Row, size: Size, gpu: GPU) -> jax.stages.Compiled:
    """Compiles a JAX row for a GPU."""
    step, mesh = Step(row, size, on_gpu=True), plan.make_mesh(gpu)
    tokens = jax.ShapeDtypeStruct((size.batch_size, size.length), jnp.int32)
    if row.kind == "fused":
        # In host memory or not, which only a mesh can say of devices that are not there.
        divided = models.shardings(step.config, step.shapes, mesh)
        batch = jax.ShapeDtypeStruct(
            tokens.shape, tokens.dtype, sharding=NamedSharding(mesh, P(sharding.BATCH))
        )
        params = sharding.with_shardings(step.shapes, divided)
        compiled, _ = plan.compile_step(step.fused, params, batch, mesh)
    else:
        on_gpu = SingleDeviceSharding(mesh.devices.item())

        def place(tree):
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_gpu), tree
            )

        params = jax.eval_shape(step.arrange, step.shapes)
        state = jax.eval_shape(step.init, params, tokens)
        arguments = map(place, (params, state, tokens))
        compiled = jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()
    return compiled
