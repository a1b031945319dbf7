"""A run, from its config to the exported model."""

import contextlib
import time
from pathlib import Path

import jax
import numpy as np
from jax.experimental import multihost_utils

from lomo_jax import models, run_files
from lomo_jax.errors import CheckpointError, NonFiniteError
from lomo_jax.run_files import MetricsWriter
from lomo_jax.training import devices
from lomo_jax.training import workdir as workdir_lib
from lomo_jax.training.checkpoint import Checkpoints, Facts
from lomo_jax.training.config import Config, to_dict
from lomo_jax.training.display import Display
from lomo_jax.training.evaluate import continue_prompt, make_evaluate
from lomo_jax.training.export import model_card
from lomo_jax.training.memory import MemoryGuard
from lomo_jax.training.prepare import Run, prepare
from lomo_jax.training.record import Recorder
from lomo_jax.training.sinks import Sink, TensorBoard, WeightsAndBiases
from lomo_jax.training.stop import Stop


def train(config: Config) -> bool:
    """Trains, evaluates and exports; goes on where an earlier run in the same folder has stopped.

    `config.workdir` gets, by the names in `lomo_jax.training.workdir`, the config, the metrics, a
    log, checkpoints and at the end the model in Hugging Face form. A run that starts anew moves
    what it finds there aside. SIGTERM and SIGINT end the run after the step that it is making, with
    a checkpoint and without an export; a second SIGINT raises KeyboardInterrupt.

    Args:
      config: A validated config.

    Returns:
      False if a signal came before the first step. Its exception may have gone right through JAX,
      which has crashed at the end of such a process.

    Raises:
      ConfigError: The config does not fit the model or the checkpoint, or `workdir` cannot be
        written or is in use.
      CheckpointError: No checkpoint can be read, or the last one not be written.
      NonFiniteError: The loss, a gradient or a parameter became NaN or infinite.
      OutOfMemoryError: The device's memory is too small for the run.
      LostProcessError: Another process of the run ended.
      FileNotFoundError, ValueError: The model or the text cannot be read.
    """
    quiet = jax.process_index() > 0
    with Stop() as stop, Display(config.steps, quiet=quiet) as display:
        try:
            _train(config, display, stop)
        except KeyboardInterrupt:
            if stop.is_urgent:
                raise
            display.line("stopped", "before it made a step")
            return False
    return True


def _train(config: Config, display: Display, stop: Stop) -> None:
    started = time.perf_counter()
    mesh = devices.make_mesh(config)
    workdir = workdir_lib.make(config.workdir)
    is_first = jax.process_index() == 0
    with (
        workdir_lib.lock(workdir) if is_first else contextlib.nullcontext(),
        devices.together(),
        jax.set_mesh(mesh),
        MemoryGuard(config) as memory,
        Checkpoints(
            workdir / run_files.CHECKPOINTS,
            keep=config.keep_checkpoints,
            keep_best=config.keep_best,
            warn=lambda text: display.line("warning", text),
        ) as checkpoints,
    ):
        run = prepare(config, mesh, workdir, checkpoints, display, memory)
        stop.begin()
        # One that was lost before its first checkpoint has left records, too.
        is_resumed = run.progress.step > 0 or (workdir / run_files.METRICS).exists()
        sinks = _sinks(config, workdir, run.progress.step if is_resumed else None)
        with Recorder(
            config, run.model.config, run.progress, display, sinks, mesh.size, is_resumed
        ) as recorder:
            run, is_stopped = _make_steps(config, run, checkpoints, recorder, display, stop)
        checkpoints.wait()
        step = run.progress.step
        if is_stopped and step == 0:
            raise KeyboardInterrupt
        if is_stopped:
            _check_saved(config, step, checkpoints.last)
            display.line(
                "stopped", f"after step {step}, saved; the same command goes on from there"
            )
            return
        display.status("exporting")
        export = workdir / run_files.EXPORT
        card = model_card(to_dict(config), run.progress)
        models.save(export, run.model.config, run.params, tokenizer=run.tokenizer, card=card)
        minutes = (time.perf_counter() - started) / 60
        display.line("exported", f"{export}, {minutes:.1f} minutes in all")


def _check_saved(config: Config, step: int, last: int | None) -> None:
    """Raises CheckpointError if the run was stopped after a step that is not the last one saved."""
    if last != step:
        there = f"the last checkpoint is of step {last}" if last else "there is no checkpoint"
        raise CheckpointError(
            f"stopped after step {step}, which could not be saved; {there}; make room on the disk "
            f"of {config.workdir!r}"
        )


def _sinks(config: Config, workdir: Path, resumed: int | None) -> list[Sink]:
    if jax.process_index() > 0:  # every process computes the same metrics, the first writes them
        return []
    sinks: list[Sink] = []
    if config.wandb is not None:
        sinks.append(WeightsAndBiases(config.wandb, workdir, to_dict(config)))
    sinks.append(MetricsWriter(workdir))
    sinks.append(TensorBoard(workdir / run_files.TENSORBOARD, resumed))
    return sinks


def _make_steps(
    config: Config,
    run: Run,
    checkpoints: Checkpoints,
    recorder: Recorder,
    display: Display,
    stop: Stop,
) -> tuple[Run, bool]:
    """Makes the steps that are left, with the evaluations and checkpoints that are due.

    Returns:
      The run as it is then, and whether it was asked to stop.
    """
    evaluate = make_evaluate(
        run.model, run.held_out, run.send, config.microbatches, lambda: stop.is_wanted
    )
    params, state, progress = run.params, run.state, run.progress
    saved_at = time.monotonic()
    recorder.restart_clock()
    while True:
        step = progress.step
        is_last = step >= config.steps
        is_best = False
        wants_evaluation = is_last or _is_due(step, config.eval_every)
        if wants_evaluation and progress.evaluated < step and not stop.is_wanted:
            recorder.flush()
            display.status("evaluating")
            result = evaluate(params)
            if result is not None:
                is_best = recorder.evaluation(step, result)
                _show_sample(config, recorder, run, params, step)
            recorder.restart_clock()
        is_asked = stop.after(step)
        is_due = step > 0 and _is_due(step, config.checkpoint_every)
        if step > 0 and (
            is_last
            or is_asked
            or is_due
            or (is_best and config.keep_best)
            or (step % config.log_every == 0 and _is_long_ago(saved_at, config))
        ):
            recorder.flush()
            progress.data = run.text.train.get_state()
            facts = Facts(progress, to_dict(config), run.text.fingerprint, {})
            in_place = config.offload.params or config.offload.state
            if not checkpoints.save(params, state, facts, in_place=in_place):
                raise NonFiniteError(
                    f"a parameter or the optimizer's state is not finite after step {step}: the "
                    f"run stopped, and saved and exported nothing; lower learning_rate "
                    f"({config.learning_rate:g}) or lengthen warmup"
                )
            saved_at = time.monotonic()
            recorder.restart_clock()
        if is_last or is_asked:
            return run._replace(params=params, state=state), is_asked
        batch = run.send(next(run.text.train))
        params, state, out, scale = run.step(params, state, batch)
        progress.step = step + 1
        recorder.step(step + 1, out, scale)
        checkpoints.poll()


def _is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps, 0 for never, is done after this one."""
    return step == 0 or (every > 0 and step % every == 0)


def _is_long_ago(saved_at: float, config: Config) -> bool:
    """Whether the last checkpoint is older than the config allows, by the first process's clock."""
    minutes = config.checkpoint_minutes
    if not minutes:
        return False
    over = time.monotonic() - saved_at > 60 * minutes
    if jax.process_count() > 1:
        over = bool(multihost_utils.broadcast_one_to_all(np.array(over)))
    return over


def _show_sample(config: Config, recorder: Recorder, run: Run, params, step: int) -> None:
    if config.prompt:
        text = continue_prompt(
            run.model, run.tokenizer, params, config.prompt, config.prompt_tokens
        )
        recorder.sample(step, config.prompt, text)
