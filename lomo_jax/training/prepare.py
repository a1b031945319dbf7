"""All that a run needs before its first step."""

import dataclasses
import functools
import itertools
import platform
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

import lomo_jax
from lomo_jax import data, models, run_files, sharding
from lomo_jax.errors import CheckpointError, ConfigError
from lomo_jax.run_files import RunInfo, write_json
from lomo_jax.training import devices, resume
from lomo_jax.training import model as model_lib
from lomo_jax.training import workdir as workdir_lib
from lomo_jax.training.checkpoint import Checkpoints, Facts, Progress
from lomo_jax.training.config import Config, ModelConfig, to_dict
from lomo_jax.training.display import Display
from lomo_jax.training.memory import MemoryGuard, describe, plan_step
from lomo_jax.training.model import Model
from lomo_jax.training.step import batch_shapes, make_step


class Run(NamedTuple):
    """A run, about to make its next step."""

    model: Model
    tokenizer: Any
    text: data.TextSplits
    held_out: list[Any]  # batches, in host memory
    send: Callable[[Any], Any]  # a batch to the devices
    step: jax.stages.Compiled
    params: nnx.State
    state: lomo_jax.StepState
    progress: Progress


def prepare(
    config: Config,
    mesh: Mesh,
    workdir: Path,
    checkpoints: Checkpoints,
    display: Display,
    memory: MemoryGuard,
) -> Run:
    """Reads the model and the text, compiles the step, and finds where the run starts.

    Raises what `loop.train` does, but for what happens in steps.
    """
    warn = functools.partial(display.line, "warning")
    candidates = resume.candidates(config, checkpoints, warn)
    facts = next(candidates, None)

    display.status("reading the model")
    model_config, params = config, None
    if facts is None:
        workdir_lib.check_is_of_a_run(workdir)
        resume.check_start(config, workdir)
    else:
        # Only the weights are in the checkpoint, and where the rest came from may be gone.
        model_config = dataclasses.replace(
            config, model=ModelConfig(path=str(workdir / run_files.MODEL))
        )
    capability = model_lib.compute_capability()
    model, shapes = model_lib.abstract(model_config, capability, mesh)
    tokenizer = model_lib.load_tokenizer(model_config, model)
    if facts is None:
        params: Any = model_lib.load_params(config, model, mesh)
    _check_prompt(config, model, tokenizer)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    source = "random weights" if config.model.init == "random" else str(config.model.path)
    display.line("model", f"{source}, {size:,} parameters, {config.param_dtype}")
    if mesh.size > 1:
        display.line("devices", devices.describe(mesh))

    display.status("reading the text")
    text, held_out, send = _load_text(config, tokenizer, mesh)
    display.line("text", f"{config.data.path}, {len(held_out)} held-out batches")
    if facts is not None:
        resume.check_same_text(facts, config, text.fingerprint)

    display.status("compiling the step")
    compiling = time.perf_counter()
    if config.offload.params:
        shapes = model_lib.on_host_like(shapes)
    step, init, state_shapes = _compile(config, model, mesh, shapes)
    seconds = time.perf_counter() - compiling
    display.line("step", f"{config.optimizer}, compiled in {seconds:.0f} s")
    plan = plan_step(config, model, mesh, step, shapes, state_shapes)
    memory.planned(plan)
    display.line("memory", describe(plan))

    run_info = RunInfo(
        source=source,
        parameters=size,
        device=mesh.devices.flat[0].device_kind,
        devices=mesh.size,
        processes=jax.process_count(),
        versions={
            "python": platform.python_version(),
            "jax": jax.__version__,
            "lomo_jax": lomo_jax.__version__,
        },
        memory=plan,
    )
    is_first = jax.process_index() == 0
    if facts is None:
        state, progress = init(params), Progress()
        if is_first:
            _move_aside(workdir, display)
        checkpoints.begin()
    else:
        display.status("reading the checkpoint")
        params, state, progress = _restore(
            config, checkpoints, display, facts, candidates, shapes, state_shapes
        )
        state = _add_missing(config, model, mesh, params, state, state_shapes)
        text.train.set_state(progress.data)
    if is_first:
        run_info.write(workdir)  # marks the other files as those of a run
        write_json(workdir / run_files.CONFIG, to_dict(config))
        if facts is None:
            folder = workdir / run_files.MODEL
            folder.mkdir(exist_ok=True)
            models.save_config(folder, model.config, config.param_dtype, tokenizer)
        display.log_to(workdir / run_files.LOG)
    return Run(model, tokenizer, text, held_out, send, step, params, state, progress)


def _move_aside(workdir: Path, display: Display) -> None:
    aside = workdir_lib.set_aside(workdir)
    if aside is not None:
        display.line("moved", f"what an earlier run left in {workdir}, to {aside.name}")


def _check_prompt(config: Config, model: Model, tokenizer: Any) -> None:
    """Raises ConfigError if the prompt cannot be continued."""
    if not config.prompt:
        return
    tokens = len(tokenizer(config.prompt)["input_ids"])
    if tokens + config.prompt_tokens > model.config.max_length:
        raise ConfigError(
            f"prompt: its {tokens} tokens and prompt_tokens={config.prompt_tokens} are more than "
            f"the model allows, {model.config.max_length}; shorten it"
        )


def _restore(
    config: Config,
    checkpoints: Checkpoints,
    display: Display,
    facts: Facts,
    candidates: Iterator[Facts],
    shapes: nnx.State,
    state_shapes: lomo_jax.StepState,
) -> tuple[nnx.State, lomo_jax.StepState, Progress]:
    """Reads the last checkpoint that is whole."""
    while True:
        try:
            params, state = checkpoints.restore(facts, shapes, state_shapes)
            break
        except CheckpointError as error:
            display.line("warning", f"{error}; trying the one before")
            facts = next(candidates)  # which raises if there is none
    if facts.config["dynamic_loss_scale"] != config.dynamic_loss_scale:
        state = state._replace(loss_scale=None)  # that of skip_nonfinite is 1, and stays so
    progress = facts.progress
    if facts.config["eval_batches"] != config.eval_batches:
        progress.best = progress.best_step = None  # of other text
    damaged = [step for step in checkpoints.steps() if step > progress.step]
    if damaged:
        checkpoints.set_aside(damaged)
    for change in resume.changes(facts, config):
        display.line("changed", change)
    display.line("resumed", f"after step {progress.step} of {config.steps}")
    return params, state, progress


def _add_missing(
    config: Config,
    model: Model,
    mesh: Mesh,
    params: nnx.State,
    state: lomo_jax.StepState,
    shapes: lomo_jax.StepState,
) -> lomo_jax.StepState:
    """Starts what the config has switched on since the checkpoint: loss scale, rounding."""
    missing = [name for name in shapes._fields if getattr(state, name) is None]
    missing = [name for name in missing if getattr(shapes, name) is not None]
    if not missing:
        return state
    step, batch = make_step(config, model), batch_shapes(config, mesh)
    first = jax.jit(lambda params: step.init(params, batch)._replace(optimizer={}))(params)
    return state._replace(
        **{
            name: jax.tree.map(
                lambda x, like: jax.device_put(x, like.sharding),
                getattr(first, name),
                getattr(shapes, name),
            )
            for name in missing
        }
    )


def _load_text(
    config: Config, tokenizer: Any, mesh: Mesh
) -> tuple[data.TextSplits, list[Any], Callable[[Any], Any]]:
    """Returns the text, its held-out batches, and what sends a batch to the devices."""
    assert config.data.path is not None, "validate() asks for it"
    rows = devices.rows_here(config, mesh)
    text = data.text_dataset(
        model_lib.resolve(config.data.path),
        tokenizer,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        eval_fraction=config.data.eval_fraction,
        text_key=config.data.text_key,
        rows=rows,
    )
    held_out = list(itertools.islice(text.held_out, config.eval_batches))
    return text, held_out, devices.sender(config, mesh, rows)


def _compile(
    config: Config, model: Model, mesh: Mesh, params: nnx.State
) -> tuple[jax.stages.Compiled, jax.stages.Compiled, lomo_jax.StepState]:
    """Compiles for parameters of these shapes, wherever they are.

    Returns:
      The step, which updates parameters and state in place and gives a `StepOutput` and the loss
      scale that it took; what makes its first state; and the shapes of the state.
    """
    step, batch = make_step(config, model), batch_shapes(config, mesh)

    def step_and_scale(params, state, batch):
        params, new_state, out = step(params, state, batch)
        return params, new_state, out, state.loss_scale and state.loss_scale.scale

    try:
        lowered = jax.jit(lambda params: step.init(params, batch)).lower(params)
    except TypeError as error:  # it takes more than gradients, or does not work layer by layer
        why = str(error).splitlines()[0]
        raise ConfigError(f"optimizer: {config.optimizer!r} cannot be used here: {why}") from error
    if any(jnp.issubdtype(x.dtype, jax.dtypes.extended) for x in jax.tree.leaves(lowered.out_info)):
        raise ConfigError(
            f"optimizer: {config.optimizer!r} keeps a random key in its state, which a checkpoint "
            "cannot hold; choose another"
        )
    init = lowered.compile()
    state = sharding.struct(lowered.out_info, init.output_shardings)
    compiled = jax.jit(step_and_scale, donate_argnums=(0, 1)).lower(params, state, batch).compile()
    return compiled, init, state
