"""The training loop: sets up the run, makes the steps, evaluates, saves and exports."""

from __future__ import annotations

import dataclasses
import itertools
import math
import platform
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh

import lomo_jax
from lomo_jax import data, lora, models, run_files
from lomo_jax._json import write_json
from lomo_jax.errors import (
    CheckpointError,
    NonFiniteError,
    library_errors_are_the_users,
    os_errors_are_the_users,
)
from lomo_jax.fused.microbatches import split
from lomo_jax.plan import MemoryPlan
from lomo_jax.run_files import RunInfo
from lomo_jax.training import devices, meeting, resume, validation
from lomo_jax.training import model as model_lib
from lomo_jax.training.checkpoint import CheckpointMetadata, Checkpoints, Progress, checksums
from lomo_jax.training.config import Config, ModelConfig, to_dict
from lomo_jax.training.export import write_export
from lomo_jax.training.log import Display, Evaluation, Recorder, Stopwatch, open_sinks
from lomo_jax.training.model import Model
from lomo_jax.training.planning import MemoryGuard, describe, plan_step
from lomo_jax.training.step import (
    CompiledStep,
    compile_step,
    learning_rates,
    make_step,
)

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase

    from lomo_jax.evaluation.tasks import Tasks


class Run(NamedTuple):
    """A run between two steps."""

    config: Config  # with the number of steps, which may follow from the dataset
    model: Model
    tokenizer: PreTrainedTokenizerBase
    dataset: data.TextSplits
    held_out: list[data.Batch]  # in host memory
    tasks: Tasks | None  # to evaluate besides
    rows: list[int]  # of each batch, those that this process reads
    send: Callable[[Any], Any]  # sends them to the devices
    update: jax.stages.Compiled  # the compiled step
    params: nnx.State
    state: lomo_jax.StepState
    metadata: CheckpointMetadata  # of the next checkpoint

    @property
    def progress(self) -> Progress:
        """The progress, which the loop and the recorder update in place."""
        return self.metadata.progress


def train(config: Config) -> None:
    """Trains, evaluates and exports; resumes an earlier run in the same folder.

    `config.workdir` gets the files named in `lomo_jax.run_files`: config, metrics, log, checkpoints
    and at the end the model in Hugging Face form. A new run moves the files of an earlier one
    aside. SIGTERM, SIGINT and SIGUSR1 stop the run after the current step, with a checkpoint and
    without an export; see `devices.Stop`.

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
    with devices.Stop() as stop, Display(config.steps, quiet=quiet) as display:
        started = time.perf_counter()
        if jax.process_count() > 1:
            meeting.check_same({**to_dict(config), **meeting.versions()})
        mesh = devices.make_mesh(config.mesh, config.batch_size, config.microbatches)
        with (
            resume.open_workdir(config.workdir) as workdir,
            devices.lost_process_errors(),
            jax.set_mesh(mesh),
            MemoryGuard(config) as memory,
            Checkpoints(
                workdir / run_files.CHECKPOINTS,
                keep=config.keep_checkpoints,
                keep_best=bool(config.keep_best),
                warn=display.warn,
            ) as checkpoints,
        ):
            run = _set_up(config, mesh, workdir, checkpoints, display, memory)
            config = run.config
            with _open_recorder(config, run, mesh.size, workdir, display) as recorder:
                run, is_stopped = _make_steps(config, run, checkpoints, recorder, display, stop)
            checkpoints.wait()
            if is_stopped:
                _report_stop(display, run.progress.step, checkpoints.last, config.workdir)
                return
            display.status("exporting")
            _export(run, workdir / run_files.EXPORT)
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
    checkpoint = resume.find_checkpoint(workdir, checkpoints, settings, display)
    source = config.model
    if checkpoint is not None:  # the run has saved config and tokenizer: `model.path` may be gone
        source = ModelConfig(path=str(workdir / run_files.MODEL))
    model, tokenizer = _load_model(config, source, mesh, display)
    params: Any = None
    if checkpoint is None or model.is_base_frozen:
        adapter_path = config.lora.path if checkpoint is None else None
        params = _load_params(config, model, mesh, adapter_path)
    base = lora.split(params)[1] if model.is_base_frozen else None
    base_sums = None if base is None else checksums(base).sums
    batch = devices.batch_shapes(
        config.batch_size, config.sequence_length, mesh, seeds=model.has_dropout
    )
    rows, send = devices.local_rows(batch), devices.batch_sender(batch)
    dataset, held_out = _load_dataset(config, tokenizer, model.config.vocab_size, rows, display)
    tasks = _load_tasks(config, display)
    if jax.process_count() > 1:
        meeting.check_same({"the fingerprint of the dataset": dataset.fingerprint})
    if config.epochs is not None:
        steps = math.ceil(config.epochs * dataset.rows_per_epoch / config.batch_size)
        config = dataclasses.replace(config, steps=steps)
        settings = to_dict(config)
        display.set_steps(steps)
    if checkpoint is not None:
        resume.check_steps(checkpoint, settings)
        resume.check_same_dataset(checkpoint, settings, dataset.fingerprint)
        resume.check_same_base(checkpoint, base_sums, _source_name(config))
    for message in validation.warnings(config):
        display.warn(message)
    compiled, memory.plan = _compile(config, model, batch, display)
    display.line("memory", describe(memory.plan))

    if checkpoint is None:
        state, progress = compiled.init(params), Progress()
        # One process for all: they share the folder.
        if jax.process_index() == 0 and (aside := resume.set_aside(workdir)):
            display.line("moved", f"the files of an earlier run in {workdir} to {aside.name}")
        checkpoints.start_anew()
    else:
        display.status("reading the checkpoint")
        progress, params, state = resume.restore(
            checkpoints, checkpoint, settings, model.saved(model.shapes), compiled, display, base
        )
        position = f"the position in the dataset in the checkpoint of step {progress.step}"
        with library_errors_are_the_users(position, "restore the checkpoint"):
            dataset.train.set_state(progress.data)
    metadata = CheckpointMetadata(progress, settings, dataset.fingerprint, {}, base_sums)
    run = Run(
        *(config, model, tokenizer, dataset, held_out, tasks, rows, send),
        *(compiled.update, params, state, metadata),
    )
    if jax.process_index() == 0:
        _write_run_files(workdir, run, mesh, memory.plan, is_new=checkpoint is None)
    with os_errors_are_the_users():
        display.log_to(workdir / run_files.LOG)
    return run


@os_errors_are_the_users()
def _load_model(
    config: Config, source: ModelConfig, mesh: Mesh, display: Display
) -> tuple[Model, PreTrainedTokenizerBase]:
    """Returns the model without its weights, and the tokenizer."""
    display.status("reading the model")
    model_lib.download(source)
    model = model_lib.abstract(
        source,
        config.param_dtype,
        config.sequence_length,
        config.attention,
        capability=model_lib.compute_capability(),
        mesh=mesh,
        on_host=config.offload.params,
        adapters=config.lora,
    )
    tokenizer = model_lib.load_tokenizer(source.path, model.config)
    if tokenizer.eos_token_id is None:
        display.warn("neither tokenizer nor model name an end-of-text token: texts have no end")
    model_lib.check_prompt(config.prompt, config.prompt_tokens, tokenizer, model.config)
    adapters, base = lora.split(model.shapes)
    size = f"{_size(base):,} parameters, {config.param_dtype}"
    display.line("model", f"{_source_name(config)}, {size}")
    if model.adapters is not None:
        of = f"base: {config.lora.base}"
        display.line(
            "adapters", f"rank {model.adapters.rank}, {_size(adapters):,} parameters; {of}"
        )
    if mesh.size > 1:
        display.line("devices", devices.describe(mesh))
    return model, tokenizer


@os_errors_are_the_users()
def _load_params(config: Config, model: Model, mesh: Mesh, adapter_path: str | None) -> nnx.State:
    """Returns the initial weights."""
    return model_lib.load_params(
        config.model,
        model,
        seed=config.seed,
        on_host=config.offload.params,
        mesh=mesh,
        adapter_path=adapter_path,
    )


@os_errors_are_the_users()
def _load_dataset(
    config: Config,
    tokenizer: PreTrainedTokenizerBase,
    vocab_size: int,
    rows: list[int],
    display: Display,
) -> tuple[data.TextSplits, list[data.Batch]]:
    """Returns the dataset and its held-out batches."""
    display.status("reading the dataset")
    dataset = data.text_dataset(
        tokenizer=tokenizer,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=vocab_size,
        rows=rows,
        **vars(config.data),
    )
    held_out = list(itertools.islice(dataset.held_out, config.eval_batches))
    if config.data.template is not None and dataset.summary.kind == "chat":
        tokenizer.chat_template = data.read_template(config.data.template)  # exported as well
    display.line("dataset", f"{dataset.summary.describe()}; {len(held_out)} held-out batches")
    return dataset, held_out


@os_errors_are_the_users()
def _load_tasks(config: Config, display: Display) -> Tasks | None:
    """Returns the tasks to evaluate, if there are any."""
    if not config.task_names():
        return None
    display.status("reading the tasks")
    from lomo_jax.evaluation.tasks import Tasks  # slow to import

    names, folders = config.task_names(), config.task_folders()
    return Tasks(names, data=folders, limit=config.eval_examples)


def _compile(
    config: Config, model: Model, batch: Any, display: Display
) -> tuple[CompiledStep, MemoryPlan]:
    """Returns the step and its plan; the first of `Config.remats` that fits, or the last."""
    started = time.perf_counter()
    remats = config.remats()
    for remat in remats:
        display.status(f"compiling the step, remat={remat}")
        config = dataclasses.replace(config, remat=remat)
        step = make_step(model.loss, config.make_optimizer(), **config.step_options())
        compiled = compile_step(step, model.shapes, batch, config.optimizer)
        plan = plan_step(compiled, model)
        # Some devices do not report their memory: then nothing is known to fit.
        if len(remats) == 1 or devices.agree(plan.fits is True):
            break
    seconds = time.perf_counter() - started
    display.line("step", f"{config.optimizer}, remat={remat}, compiled in {seconds:.0f} s")
    return compiled, plan


@os_errors_are_the_users()
def _write_run_files(
    workdir: Path, run: Run, mesh: Mesh, plan: MemoryPlan, *, is_new: bool
) -> None:
    settings = run.metadata.config
    info = RunInfo(
        source=_source_name(run.config),
        parameters=_size(run.params),
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
    info.write(workdir)  # first: it marks the folder as a run's
    write_json(workdir / run_files.CONFIG, settings)
    if is_new:
        folder = workdir / run_files.MODEL
        shutil.rmtree(folder, ignore_errors=True)  # of a run that ended before its first checkpoint
        folder.mkdir()
        models.save_config(
            folder,
            run.model.config,
            settings["param_dtype"],
            run.tokenizer,
            like=run.model.folder,
        )
        if run.model.folder is not None and (run.model.folder / "README.md").is_file():
            shutil.copyfile(run.model.folder / "README.md", folder / "README.md")  # for the licence


def _source_name(config: Config) -> str:
    return "random weights" if config.model.init == "random" else str(config.model.path)


def _size(params: nnx.State) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


def _open_recorder(
    config: Config, run: Run, num_devices: int, workdir: Path, display: Display
) -> Recorder:
    rates = learning_rates(config.make_schedule(), config.steps)
    # A run that was killed before its first checkpoint may have written metrics.
    is_resumed = run.progress.step > 0 or (workdir / run_files.METRICS).exists()
    with os_errors_are_the_users():
        resumed = run.progress.step if is_resumed else None
        sinks = open_sinks(workdir, config.wandb, run.metadata.config, resumed)
    return Recorder(
        run.progress,
        display,
        sinks,
        Stopwatch(run.model.config, config.batch_size, config.sequence_length, num_devices),
        rates,
        log_every=config.log_every,
        skip_nonfinite=config.skip_nonfinite,
        dynamic_loss_scale=config.dynamic_loss_scale,
        is_resumed=is_resumed,
        best_metric=config.best_metric(),
    )


def _make_steps(
    config: Config,
    run: Run,
    checkpoints: Checkpoints,
    recorder: Recorder,
    display: Display,
    stop: devices.Stop,
) -> tuple[Run, bool]:
    """Makes the remaining steps, and evaluates and saves when it is due.

    Returns:
      The run after its last step, and whether a stop was requested.
    """
    evaluate = make_evaluate(
        run.model, run.held_out, run.send, config.microbatches, lambda: stop.requested
    )
    saved_at = time.monotonic()
    while True:
        step = run.progress.step
        is_last = step >= config.steps
        is_best = False
        eval_is_due = is_last or step == 0 or _is_multiple(step, config.eval_every)
        if eval_is_due and run.progress.evaluated < step and not stop.requested:
            with recorder.pause():
                display.status("evaluating")
                is_best = _evaluate(run, evaluate, recorder, stop)

        should_stop = stop.should_stop(step)
        save_is_due = is_last or should_stop or (is_best and config.keep_best)
        if step > 0 and (save_is_due or _checkpoint_is_due(config, step, saved_at)):
            with recorder.pause():
                _save(run, checkpoints)
            saved_at = time.monotonic()
        if is_last or should_stop:
            return run, should_stop

        batch: dict[str, Any] = {**next(run.dataset.train)}
        if run.model.has_dropout:
            batch["seeds"] = devices.row_seeds(config.seed, step, run.rows)
        params, state, out, scale = run.update(run.params, run.state, run.send(batch))
        run = run._replace(params=params, state=state)
        run.progress.step = step + 1
        recorder.step(step + 1, out, scale)
        checkpoints.poll()


def _is_multiple(step: int, every: int) -> bool:
    """Whether something is due after this step; `every` is its interval, 0 for never."""
    return step > 0 and every > 0 and step % every == 0


def _checkpoint_is_due(config: Config, step: int, saved_at: float) -> bool:
    """Whether `checkpoint_every` or `checkpoint_minutes` demands one; the first process decides."""
    if _is_multiple(step, config.checkpoint_every):
        return True
    if config.checkpoint_minutes == 0:
        return False
    if jax.process_count() > 1 and step % config.log_every:
        return False  # asking the first process costs a message
    return devices.first_says(time.monotonic() - saved_at > 60 * config.checkpoint_minutes)


def _evaluate(
    run: Run,
    evaluate: Callable[[nnx.State], Evaluation | None],
    recorder: Recorder,
    stop: devices.Stop,
) -> bool:
    """Records the held-out loss, the tasks and a sample; returns whether it is the best so far."""
    result, config = evaluate(run.params), run.config
    if result is not None and run.tasks is not None:
        result = _evaluate_tasks(run, run.tasks, stop, result)
    if result is None:  # a stop was requested
        return False
    is_best = recorder.evaluation(run.progress.step, result)
    if config.prompt:
        text = models.generate_text(
            *(run.model.graphdef, run.params, run.tokenizer, [config.prompt]), config.prompt_tokens
        )[0]
        recorder.sample(run.progress.step, config.prompt, text)
    return is_best


class _StopRequestedError(Exception):
    """Ends the evaluation of tasks."""


def _evaluate_tasks(
    run: Run, tasks: Tasks, stop: devices.Stop, evaluation: Evaluation
) -> Evaluation | None:
    """Returns the evaluation with the metrics of the tasks, or None if a stop was requested."""
    from lomo_jax.evaluation.tasks import lower_is_better, metrics  # slow to import

    def check() -> None:
        if stop.requested:
            raise _StopRequestedError

    try:
        results = tasks.evaluate(
            *(run.model.graphdef, run.params, run.tokenizer),
            batch_size=run.config.batch_size // run.config.microbatches,
            on_batch=check,
        )
    except _StopRequestedError:
        return None
    return evaluation._replace(tasks=metrics(results), lower_is_better=lower_is_better(results))


def make_evaluate(
    model: Model,
    batches: Sequence[data.Batch],
    send: Callable[[data.Batch], Any],
    microbatches: int = 1,
    should_stop: Callable[[], bool] = lambda: False,
) -> Callable[[nnx.State], Evaluation | None]:
    """Returns a function that evaluates parameters.

    Args:
      model: The model.
      batches: Held-out batches in host memory.
      send: Sends a batch to the devices.
      microbatches: Number of microbatches; a whole batch may not fit in memory.
      should_stop: Called before each batch; if it returns True the evaluation is abandoned.

    Returns:
      A function from parameters to their `Evaluation`, or None if it was abandoned.
    """

    @jax.jit
    def sums(params: nnx.State, batch: Any) -> jax.Array:
        def of_part(part: Any) -> jax.Array:
            loss, metrics = model.loss(params, part)
            return metrics.weight * jnp.stack([loss, metrics.accuracy, jnp.ones_like(loss)])

        if microbatches == 1:
            return of_part(batch)
        return jax.lax.map(of_part, split(batch, microbatches)).sum(0)

    def evaluate(params: nnx.State) -> Evaluation | None:
        running: list[jax.Array] = []
        for batch in batches:
            if should_stop():
                return None
            running.append(sums(params, send(batch)))
            # At most two batches at a time: the next one runs while the host waits for this one.
            jax.block_until_ready(running[-2:-1])
        sums_of_all = np.asarray(jax.device_get(running), np.float64)
        loss, accuracy, weight = sums_of_all.sum(axis=0).tolist()
        return Evaluation(loss / weight, accuracy / weight)

    return evaluate


def _save(run: Run, checkpoints: Checkpoints) -> None:
    run.progress.data = run.dataset.train.get_state()
    if not checkpoints.save(run.model.saved(run.params), run.state, run.metadata):
        raise NonFiniteError(
            f"a parameter or the optimizer's state is not finite after step {run.progress.step}: "
            "the run stopped, and saved and exported nothing; lower learning_rate "
            f"({run.metadata.config['learning_rate']:g}) or lengthen warmup"
        )


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


@os_errors_are_the_users()
def _export(run: Run, folder: Path) -> None:
    write_export(
        folder,
        run.model,
        run.params,
        like=folder.parent / run_files.MODEL,
        tokenizer=run.tokenizer,
        metadata=run.metadata,
    )
