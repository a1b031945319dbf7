"""The training loop: sets up the run, makes the steps, evaluates, saves and exports."""

import itertools
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import jax
from flax import nnx
from jax.sharding import Mesh

import lomo_jax
from lomo_jax import data, models, run_files
from lomo_jax._json import write_json
from lomo_jax.errors import CheckpointError, NonFiniteError, os_errors_are_the_users
from lomo_jax.plan import MemoryPlan
from lomo_jax.run_files import RunInfo
from lomo_jax.training import devices, resume
from lomo_jax.training import model as model_lib
from lomo_jax.training import workdir as workdir_lib
from lomo_jax.training.checkpoint import CheckpointMetadata, Checkpoints, Progress
from lomo_jax.training.config import Config, ModelConfig, to_dict
from lomo_jax.training.evaluate import continue_prompt, make_evaluate
from lomo_jax.training.export import model_card
from lomo_jax.training.log import Display, Recorder, Stopwatch, open_sinks
from lomo_jax.training.model import Model
from lomo_jax.training.planning import MemoryGuard, describe, plan_step
from lomo_jax.training.step import (
    batch_shapes,
    compile_step,
    init_missing,
    learning_rates,
    make_step,
    schedule_of,
)
from lomo_jax.training.stop import Stop


class Run(NamedTuple):
    """The state of a run between two steps."""

    model: Model
    tokenizer: Any
    dataset: data.TextSplits
    held_out: list[Any]  # batches, in host memory
    send: Callable[[Any], Any]  # sends a batch to the devices
    update: jax.stages.Compiled  # the compiled step
    params: nnx.State
    state: lomo_jax.StepState
    progress: Progress


def train(config: Config) -> None:
    """Trains, evaluates and exports; resumes an earlier run in the same folder.

    `config.workdir` gets the files named in `lomo_jax.run_files`: config, metrics, log, checkpoints
    and at the end the model in Hugging Face form. A new run moves the files of an earlier one
    aside. SIGTERM, SIGINT and SIGUSR1 stop the run after the current step, with a checkpoint and
    without an export; see `Stop`.

    Args:
      config: A validated config.

    Raises:
      ConfigError: The config does not fit the model or the checkpoint, or `workdir` cannot be
        written or is in use.
      CheckpointError: No checkpoint is readable, or the last one cannot be written.
      NonFiniteError: The loss, a gradient or a parameter became NaN or infinite.
      OutOfMemoryError: The run needs more memory than the device has.
      LostProcessError: Another process of the run ended.
      UserError: The model or the dataset cannot be read, or the export cannot be written. A resumed
        run refuses to replace an earlier export that was changed.
      UnexpectedError: Any other error; its traceback is in log.txt.
      KeyboardInterrupt: A second SIGINT.
    """
    quiet = jax.process_index() > 0
    with Stop() as stop, Display(config.steps, quiet=quiet) as display:
        started = time.perf_counter()
        mesh = devices.make_mesh(config.mesh, config.batch_size, config.microbatches)
        workdir = workdir_lib.make(config.workdir)
        with (
            workdir_lib.lock(workdir),
            devices.lost_process_errors(),
            jax.set_mesh(mesh),
            MemoryGuard(config) as memory,
            Checkpoints(
                workdir / run_files.CHECKPOINTS,
                keep=config.keep_checkpoints,
                keep_best=config.keep_best,
                warn=display.warn,
            ) as checkpoints,
        ):
            run = _set_up(config, mesh, workdir, checkpoints, display, memory)
            with _open_recorder(config, run, mesh.size, workdir, display) as recorder:
                run, is_stopped = _make_steps(config, run, checkpoints, recorder, display, stop)
            checkpoints.wait()
            step = run.progress.step
            if is_stopped:
                _report_stop(display, step, checkpoints.last, config.workdir)
                return
            display.status("exporting")
            _export(workdir / run_files.EXPORT, run, to_dict(config))
            minutes = (time.perf_counter() - started) / 60
            display.line("exported", f"{workdir / run_files.EXPORT}, {minutes:.1f} minutes in all")


def _set_up(
    config: Config,
    mesh: Mesh,
    workdir: Path,
    checkpoints: Checkpoints,
    display: Display,
    memory: MemoryGuard,
) -> Run:
    """Loads model and dataset, compiles the step, and starts or resumes the run."""
    settings = to_dict(config)
    checkpoint = resume.find_checkpoint(checkpoints, settings, display)
    display.status("reading the model")
    source = config.model
    if checkpoint is None:
        workdir_lib.check_is_of_a_run(workdir)
        resume.check_start(source.path, workdir)
    else:  # the config and tokenizer saved by the run: `model.path` may be gone
        source = ModelConfig(path=str(workdir / run_files.MODEL))
        with os_errors_are_the_users():  # now, and not only after the training
            models.check_save_path(workdir / run_files.EXPORT)
    model, shapes, tokenizer = _load_model(config, source, mesh, display)
    params: Any = None
    if checkpoint is None:
        with os_errors_are_the_users():
            params = model_lib.load_params(
                source,
                model,
                config.param_dtype,
                seed=config.seed,
                on_host=config.offload.params,
                mesh=mesh,
            )

    display.status("reading the dataset")
    dataset, held_out = _load_dataset(
        config, tokenizer, devices.local_rows(mesh, config.batch_size)
    )
    display.line("dataset", f"{config.data.path}, {len(held_out)} held-out batches")
    if checkpoint is not None:
        resume.check_same_dataset(checkpoint, settings, dataset.fingerprint)

    display.status("compiling the step")
    shapes = model_lib.on_host_like(shapes) if config.offload.params else shapes
    batch = batch_shapes(config.batch_size, config.sequence_length, mesh)
    started = time.perf_counter()
    step = make_step(config, model)
    compiled = compile_step(step, shapes, batch, config.optimizer)
    seconds = time.perf_counter() - started
    display.line("step", f"{config.optimizer}, compiled in {seconds:.0f} s")
    plan = plan_step(config, model, mesh, compiled.update, shapes, compiled.state)
    memory.planned(plan)
    display.line("memory", describe(plan))

    if checkpoint is None:
        state, progress = compiled.init(params), Progress()
        _move_aside(workdir, display)
        checkpoints.start_anew()
    else:
        display.status("reading the checkpoint")
        checkpoint, params, state = resume.restore(
            checkpoints, checkpoint, settings, shapes, compiled.state, display
        )
        state = init_missing(state, step, compiled, params, batch)
        progress = checkpoint.progress
        dataset.train.set_state(progress.data)
    send = devices.batch_sender(mesh, config.batch_size, config.sequence_length)
    run = Run(model, tokenizer, dataset, held_out, send, compiled.update, params, state, progress)
    if jax.process_index() == 0:
        _write_run_files(workdir, settings, run, plan, mesh, is_new=checkpoint is None)
        with os_errors_are_the_users():
            display.log_to(workdir / run_files.LOG)
    return run


def _load_model(
    config: Config, source: ModelConfig, mesh: Mesh, display: Display
) -> tuple[Model, nnx.State, Any]:
    """Returns the model, the shapes of its weights, and its tokenizer."""
    with os_errors_are_the_users():
        model, shapes = model_lib.abstract(
            source,
            config.param_dtype,
            config.sequence_length,
            config.attention,
            capability=model_lib.compute_capability(),
            mesh=mesh,
        )
        tokenizer = model_lib.load_tokenizer(source.path, model.config.vocab_size)
    model_lib.check_prompt(config.prompt, config.prompt_tokens, tokenizer, model.config.max_length)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    display.line("model", f"{_source(config.model)}, {size:,} parameters, {config.param_dtype}")
    if mesh.size > 1:
        display.line("devices", devices.describe(mesh))
    return model, shapes, tokenizer


def _source(model: ModelConfig) -> str:
    return "random weights" if model.init == "random" else str(model.path)


def _load_dataset(
    config: Config, tokenizer: Any, rows: list[int]
) -> tuple[data.TextSplits, list[Any]]:
    """Returns the dataset and its held-out batches."""
    assert config.data.path is not None, "validate() requires it"
    with os_errors_are_the_users():
        dataset = data.text_dataset(
            model_lib.resolve(config.data.path),
            tokenizer,
            sequence_length=config.sequence_length,
            batch_size=config.batch_size,
            seed=config.seed,
            eval_fraction=config.data.eval_fraction,
            text_key=config.data.text_key,
            rows=rows,
        )
    return dataset, list(itertools.islice(dataset.held_out, config.eval_batches))


def _move_aside(workdir: Path, display: Display) -> None:
    if jax.process_index() == 0:
        aside = workdir_lib.set_aside(workdir)
        if aside is not None:
            display.line("moved", f"the files of an earlier run in {workdir} to {aside.name}")


def _write_run_files(
    workdir: Path,
    settings: dict[str, Any],
    run: Run,
    plan: MemoryPlan,
    mesh: Mesh,
    *,
    is_new: bool,
) -> None:
    info = RunInfo(
        source=_source(ModelConfig(settings["model"]["path"], settings["model"]["init"])),
        parameters=sum(leaf.size for leaf in jax.tree.leaves(run.params)),
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
    with os_errors_are_the_users():
        info.write(workdir)  # first: it marks the folder as a run's
        write_json(workdir / run_files.CONFIG, settings)
        if is_new:
            folder = workdir / run_files.MODEL
            folder.mkdir(exist_ok=True)
            models.save_config(folder, run.model.config, settings["param_dtype"], run.tokenizer)


def _open_recorder(
    config: Config, run: Run, num_devices: int, workdir: Path, display: Display
) -> Recorder:
    # A run that was killed before its first checkpoint may have written metrics.
    is_resumed = run.progress.step > 0 or (workdir / run_files.METRICS).exists()
    with os_errors_are_the_users():
        sinks = open_sinks(
            workdir, config.wandb, to_dict(config), run.progress.step if is_resumed else None
        )
    return Recorder(
        run.progress,
        display,
        sinks,
        Stopwatch(run.model.config, config.batch_size, config.sequence_length, num_devices),
        learning_rates(schedule_of(config), config.steps),
        log_every=config.log_every,
        skip_nonfinite=config.skip_nonfinite,
        dynamic_loss_scale=config.dynamic_loss_scale,
        is_resumed=is_resumed,
    )


def _make_steps(
    config: Config,
    run: Run,
    checkpoints: Checkpoints,
    recorder: Recorder,
    display: Display,
    stop: Stop,
) -> tuple[Run, bool]:
    """Makes the remaining steps, and evaluates and saves when it is due.

    Returns:
      The run after its last step, and whether a stop was requested.
    """
    evaluate = make_evaluate(
        run.model, run.held_out, run.send, config.microbatches, lambda: stop.requested
    )
    params, state, progress = run.params, run.state, run.progress
    saved_at = time.monotonic()
    recorder.restart_clock()
    while True:
        step = progress.step
        is_last = step >= config.steps
        is_best = False
        eval_is_due = is_last or step == 0 or _is_multiple(step, config.eval_every)
        if eval_is_due and progress.evaluated < step and not stop.requested:
            recorder.flush()
            display.status("evaluating")
            result = evaluate(params)
            if result is not None:
                is_best = recorder.evaluation(step, result)
                _record_sample(recorder, run, params, config.prompt, config.prompt_tokens)
            recorder.restart_clock()

        should_stop = stop.should_stop(step)
        if step > 0 and (
            is_last
            or should_stop
            or _is_multiple(step, config.checkpoint_every)
            or (is_best and config.keep_best)
            or (
                step % config.log_every == 0
                and _is_older(saved_at, minutes=config.checkpoint_minutes)
            )
        ):
            recorder.flush()
            on_host = config.offload.params or config.offload.state
            now = run._replace(params=params, state=state)
            if not _save(checkpoints, now, to_dict(config), block=on_host):
                raise NonFiniteError(
                    f"a parameter or the optimizer's state is not finite after step {step}: the "
                    f"run stopped, and saved and exported nothing; lower learning_rate "
                    f"({config.learning_rate:g}) or lengthen warmup"
                )
            saved_at = time.monotonic()
            recorder.restart_clock()
        if is_last or should_stop:
            return run._replace(params=params, state=state), should_stop

        batch = run.send(next(run.dataset.train))
        params, state, out, scale = run.update(params, state, batch)
        progress.step = step + 1
        recorder.step(step + 1, out, scale)
        checkpoints.poll()


def _is_multiple(step: int, every: int) -> bool:
    """Whether something is due after this step; `every` is its interval, 0 for never."""
    return step > 0 and every > 0 and step % every == 0


def _is_older(saved_at: float, *, minutes: float) -> bool:
    """Whether `minutes` have passed since the last save, by the first process; 0: never."""
    return minutes > 0 and devices.first_says(time.monotonic() - saved_at > 60 * minutes)


def _record_sample(
    recorder: Recorder, run: Run, params: nnx.State, prompt: str, max_new_tokens: int
) -> None:
    if prompt:
        text = continue_prompt(run.model, run.tokenizer, params, prompt, max_new_tokens)
        recorder.sample(run.progress.step, prompt, text)


def _save(checkpoints: Checkpoints, run: Run, config: dict[str, Any], *, block: bool) -> bool:
    """Saves the run; see `Checkpoints.save`."""
    run.progress.data = run.dataset.train.get_state()
    metadata = CheckpointMetadata(run.progress, config, run.dataset.fingerprint, {})
    return checkpoints.save(run.params, run.state, metadata, block=block)


def _report_stop(display: Display, step: int, saved: int | None, workdir: str) -> None:
    """Logs that the run stopped.

    Raises:
      CheckpointError: The last step was not saved.
    """
    if step == 0:
        display.line("stopped", "before the first step")
        return
    if saved != step:
        last = f"the last checkpoint is of step {saved}" if saved else "there is no checkpoint"
        raise CheckpointError(
            f"stopped after step {step}, which could not be saved; {last}; make room on the disk "
            f"of {workdir!r}"
        )
    display.line("stopped", f"after step {step}, saved; the same command resumes the run")


def _export(folder: Path, run: Run, config: dict[str, Any]) -> None:
    card = model_card(config, run.progress)
    with os_errors_are_the_users():
        models.save(folder, run.model.config, run.params, tokenizer=run.tokenizer, card=card)
