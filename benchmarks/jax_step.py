"""The JAX rows of `compare.py`: run on this machine, or planned for a GPU."""

import os
import time
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import NamedSharding, SingleDeviceSharding
from jax.sharding import PartitionSpec as P
from rows import LEARNING_RATES, Row, Size, batches

import lomo_jax
from lomo_jax import models, plan, sharding
from lomo_jax.losses import next_token_loss
from lomo_jax.models.embedding import look_up
from lomo_jax.models.weights import init_layer_by_layer
from lomo_jax.plan import GPU
from lomo_jax.plan.memory import device_memory

_OFFLOADS = {
    None: lomo_jax.Offload(),
    "activations": lomo_jax.Offload(activations=True),
    "all": lomo_jax.Offload(params=True, activations=True),
}


class Step:
    """The function of a step: `(params, state, tokens_BxT) -> (params, state, loss)`."""

    def __init__(self, row: Row, size: Size, *, on_gpu: bool) -> None:
        self.row, self.size = row, size
        self.config = models.DecoderConfig(**size.architecture(), max_length=size.length)
        attention = "cudnn" if on_gpu and size.dtype == "bfloat16" else "xla"
        self.graphdef, self.shapes = models.abstract(self.config, size.dtype, attention)
        make = {"adalomo": lomo_jax.adalomo, "lomo": lomo_jax.lomo, "none": optax.sgd}
        make = make | {"sgd": optax.sgd, "adamw": optax.adamw, "adafactor": optax.adafactor}
        self.tx = make[row.optimizer](LEARNING_RATES[row.optimizer])
        options = dict(row.options)
        self.offload = _OFFLOADS[options.pop("offload", None)]
        if "microbatches" in options:
            options["microbatches"] = size.microbatches
        self.fused = lomo_jax.fused_step(self.loss, self.tx, offload=self.offload, **options)

    def arrange(self, params: nnx.State) -> Any:
        """Returns stacked parameters in the form of the row: unrolled, with a list of layers."""
        if self.row.kind != "unrolled":
            return params
        layers = [
            jax.tree.map(lambda x, i=i: x[i], params["layers"])
            for i in range(self.config.num_layers)
        ]
        return {"layers": layers, "others": _without_layers(params)}

    def init(self, params: Any, tokens_BxT: Any) -> Any:
        """Returns the state before the first step."""
        if self.row.kind == "fused":
            return self.fused.init(params, tokens_BxT)
        if self.row.kind == "floor":  # the gradients overwrite the previous ones, donated as state
            return jax.tree.map(jnp.zeros_like, params)
        return self.tx.init(params)

    def __call__(self, params: Any, state: Any, tokens_BxT: jax.Array) -> tuple[Any, Any, Any]:
        if self.row.kind == "fused":
            params, state, out = self.fused(params, state, tokens_BxT)
            return params, state, out.loss
        loss = self.loss_unrolled if self.row.kind == "unrolled" else self.loss
        value, grads = jax.value_and_grad(loss)(params, tokens_BxT)
        if self.row.kind == "floor":
            return params, grads, value
        updates, state = self.tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state, value

    def loss(self, params: nnx.State, tokens_BxT: jax.Array) -> jax.Array:
        model = nnx.merge(self.graphdef, params)
        return _next_token(model.hidden(tokens_BxT), model.head(), tokens_BxT)

    def loss_unrolled(self, params: dict[str, Any], tokens_BxT: jax.Array) -> jax.Array:
        """The same loss, with a Python loop over the layers."""
        first = jax.tree.map(lambda x: x[None], params["layers"][0])
        model = nnx.merge(self.graphdef, nnx.merge_state(params["others"], {"layers": first}))
        layer_graphdef = nnx.graphdef(model.layers)
        context = model.context(jnp.arange(tokens_BxT.shape[1])[None], None)

        @jax.checkpoint
        def apply(x_BxTxD, layer):
            return nnx.merge(layer_graphdef, layer)(x_BxTxD, context)[0]

        x_BxTxD = look_up(model.embedding[...], tokens_BxT)
        for layer in params["layers"]:
            x_BxTxD = apply(x_BxTxD, layer)
        return _next_token(model.norm(x_BxTxD), model.head(), tokens_BxT)


class Run:
    """A compiled step and its weights, on the device of this machine."""

    def __init__(self, row: Row, size: Size) -> None:
        device = jax.devices()[0]
        step = Step(row, size, on_gpu=device.platform == "gpu")
        self.tokens = jax.device_put(batches(size))
        # Unstack on the host: a device's peak of memory cannot be reset.
        unrolled = row.kind == "unrolled"
        with jax.default_device(jax.local_devices(backend="cpu")[0] if unrolled else device):
            params = init_layer_by_layer(step.config, 0, size.dtype, on_host=step.offload.params)
            self.params = step.arrange(params)
        if unrolled:
            self.params = jax.device_put(self.params, device)
        del params
        self.state = step.init(self.params, self.tokens[0])
        start = time.perf_counter()
        self.step = (
            jax.jit(step, donate_argnums=(0, 1))
            .lower(self.params, self.state, self.tokens[0])
            .compile()
        )
        self.facts = {
            "compile_seconds": time.perf_counter() - start,
            "planned_gib": device_memory(self.step) / 2**30,
            "device": device.device_kind if device.platform == "gpu" else _processor(),
        }
        self.count = 0

    def __call__(self) -> float:
        """Runs one step and returns its loss."""
        tokens = self.tokens[self.count % len(self.tokens)]
        self.params, self.state, loss = self.step(self.params, self.state, tokens)
        self.count += 1
        jax.block_until_ready((self.params, self.state))
        return float(loss)

    def device_peak(self) -> int | None:
        """Returns the peak of device memory in use, bytes; None on a CPU."""
        return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")


def plan_row(row: Row, size: Size, gpu: GPU) -> dict[str, Any]:
    """Plans a row for a GPU that need not be installed.

    Returns:
      `device`; `planned_gib`; `modelled_seconds` of a step; and `compile_seconds`, of this machine.

    Raises:
      UserError: See `lomo_jax.plan.make_mesh`.
    """
    start = time.perf_counter()
    compiled = compile_row(row, size, gpu)
    seconds = time.perf_counter() - start
    return {
        "device": gpu.device_kind,
        "planned_gib": device_memory(compiled) / 2**30,
        "modelled_seconds": plan.read_time(compiled, gpu, tokens=size.tokens).step_seconds,
        "compile_seconds": seconds,
    }


def compile_row(row: Row, size: Size, gpu: GPU) -> jax.stages.Compiled:
    """Compiles a row for a GPU that need not be installed."""
    step, mesh = Step(row, size, on_gpu=True), plan.make_mesh(gpu)
    tokens = jax.ShapeDtypeStruct((size.batch_size, size.length), jnp.int32)
    if row.kind == "fused":
        # Offloading to host memory needs shardings over a mesh: see `plan.compile_step`.
        params = sharding.with_shardings(
            step.shapes, models.shardings(step.config, step.shapes, mesh)
        )
        batch = jax.ShapeDtypeStruct(
            tokens.shape, tokens.dtype, sharding=NamedSharding(mesh, P(sharding.BATCH))
        )
        return plan.compile_step(step.fused, params, batch, mesh)[0]
    on_gpu = SingleDeviceSharding(mesh.devices.item())
    params = jax.eval_shape(step.arrange, step.shapes)
    arguments = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=on_gpu),
        (params, jax.eval_shape(step.init, params, tokens), tokens),
    )
    return jax.jit(step, donate_argnums=(0, 1)).lower(*arguments).compile()


def _next_token(x_BxTxD: jax.Array, head_DxV: jax.Array, tokens_BxT: jax.Array) -> jax.Array:
    weights_BxT = jnp.ones(tokens_BxT.shape).at[:, -1].set(0.0)
    return next_token_loss(x_BxTxD, head_DxV, jnp.roll(tokens_BxT, -1, 1), weights_BxT)[0]


def _without_layers(params: nnx.State) -> nnx.State:
    return nnx.State({name: value for name, value in params.items() if name != "layers"})


def _processor() -> str:
    return f"CPU, {os.cpu_count()} cores"
