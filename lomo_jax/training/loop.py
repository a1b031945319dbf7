"""A run, from its config to the exported model."""

import functools
import itertools
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from flax import nnx
from jax.sharding import Mesh

import lomo_jax
from lomo_jax import data, models
from lomo_jax.training import devices
from lomo_jax.training import model as model_lib
from lomo_jax.training.config import Config
from lomo_jax.training.display import Display
from lomo_jax.training.errors import ConfigError
from lomo_jax.training.evaluate import continue_prompt, make_evaluate
from lomo_jax.training.memory import MemoryGuard, describe, plan_step
from lomo_jax.training.model import Model
from lomo_jax.training.record import Recorder
from lomo_jax.training.step import batch_shapes, make_step


def train(config: Config) -> None:
    """Trains, evaluates and exports.

    `config.workdir` gets the config, `metrics.jsonl` with one JSON object for each logged step and
    each evaluation, and at the end the model in Hugging Face form in `export`. The export of an
    earlier run stays until this one's is complete.

    Args:
      config: A validated config.

    Raises:
      ConfigError: The config does not fit the model, or `workdir` cannot be written.
      NonFiniteError: The loss became NaN or infinite.
      OutOfMemoryError: The device's memory is too small for the run.
      LostProcessError: Another process of the run ended.
      FileNotFoundError, ValueError: The checkpoint or the text cannot be read.
    """
    started = time.perf_counter()
    mesh = devices.make_mesh(config)
    workdir = _make_workdir(config)
    quiet = jax.process_index() > 0
    with (
        devices.together(),
        jax.set_mesh(mesh),
        Display(config.steps, quiet=quiet) as display,
        MemoryGuard(config) as memory,
    ):
        display.status("reading the model")
        model, _ = model_lib.abstract(config, model_lib.compute_capability(), mesh)
        tokenizer = model_lib.load_tokenizer(config, model)
        params = model_lib.load_params(config, model, mesh)
        size = sum(leaf.size for leaf in jax.tree.leaves(params))
        source = config.model.path if config.model.init == "checkpoint" else "random weights"
        display.line("model", f"{source}, {size:,} parameters, {config.param_dtype}")
        if mesh.size > 1:
            display.line("devices", devices.describe(mesh))

        display.status("reading the text")
        batches, held_out = _load_text(config, tokenizer, mesh)
        display.line("text", f"{config.data.path}, {len(held_out)} held-out batches")

        display.status("compiling the step")
        compiling = time.perf_counter()
        step_fn, state = _compile(config, model, mesh, params)
        seconds = time.perf_counter() - compiling
        display.line("step", f"{config.optimizer}, compiled in {seconds:.0f} s")
        plan = plan_step(config, model, mesh, step_fn, params, state)
        memory.planned(plan)
        display.line("memory", describe(plan))

        evaluate = make_evaluate(model, held_out)
        with Recorder(config, model.config, workdir, display, mesh.size) as recorder:
            display.status("evaluating")
            recorder.evaluation(0, evaluate(params))
            _show_sample(config, display, model, tokenizer, params)
            recorder.restart_clock()
            late: tuple[int, lomo_jax.StepOutput] | None = None
            for step in range(1, config.steps + 1):
                params, state, out = step_fn(params, state, next(batches))
                # The step before is read while this one runs: the device never waits for the host.
                if late is not None:
                    recorder.step(*late)
                late = step, out
                if step == config.steps or (config.eval_every and step % config.eval_every == 0):
                    recorder.step(*late)
                    late = None
                    recorder.evaluation(step, evaluate(params))
                    recorder.restart_clock()

        _show_sample(config, display, model, tokenizer, params)
        display.status("exporting")
        models.save(workdir / "export", model.config, params, tokenizer=tokenizer)
        minutes = (time.perf_counter() - started) / 60
        display.line("exported", f"{workdir / 'export'}, {minutes:.1f} minutes in all")


def _make_workdir(config: Config) -> Path:
    workdir = Path(config.workdir).expanduser()
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=workdir):
            pass
    except OSError as error:
        raise ConfigError(
            f"workdir: {config.workdir!r} cannot be written: {error.strerror}; set --config.workdir"
        ) from error
    return workdir


def _show_sample(
    config: Config, display: Display, model: Model, tokenizer: Any, params: nnx.State
) -> None:
    if config.prompt:
        text = continue_prompt(model, tokenizer, params, config.prompt, config.prompt_tokens)
        display.line("sample", config.prompt + text)


def _load_text(config: Config, tokenizer: Any, mesh: Mesh) -> tuple[Iterator[Any], list[Any]]:
    """Returns the endless training batches, on the devices, and the held-out ones."""
    assert config.data.path is not None, "validate() asks for it"
    rows = devices.rows_here(config, mesh)
    batches, held_out = data.text_dataset(
        model_lib.resolve(config.data.path),
        tokenizer,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        eval_fraction=config.data.eval_fraction,
        text_key=config.data.text_key,
        rows=rows,
    )
    send = functools.partial(devices.put, config=config, mesh=mesh, rows=rows)
    return map(send, batches), [send(b) for b in itertools.islice(held_out, config.eval_batches)]


def _compile(config: Config, model: Model, mesh: Mesh, params: nnx.State) -> tuple[Any, Any]:
    """Returns the step, compiled to update parameters and state in place, and its first state."""
    step, batch = make_step(config, model), batch_shapes(config, mesh)
    state = jax.jit(lambda params: step.init(params, batch))(params)
    compiled = jax.jit(step, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    return compiled, state
