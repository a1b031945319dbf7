"""A checkpoint of a run, turned into a Hugging Face directory."""

from pathlib import Path

import jax
import jax.numpy as jnp

from lomo_jax import models, run_files, sharding
from lomo_jax.errors import CheckpointError
from lomo_jax.training import workdir as workdir_lib
from lomo_jax.training.card import model_card
from lomo_jax.training.checkpoint import read_params


def export(workdir: Path, out: Path, step: int | str | None = None) -> int:
    """Writes the weights of a checkpoint, config, tokenizer and model card to `out`.

    Args:
      workdir: Of the run.
      out: The directory; an earlier export there is replaced when this one is complete.
      step: Of the checkpoint; "best" for that of the lowest held-out loss, None for the last one.

    Returns:
      The step.

    Raises:
      CheckpointError: There is no such run or checkpoint, or it is damaged.
      ValueError: `out` exists and is not an export, or is of what a run keeps.
    """
    _check_out(out)
    model = workdir / run_files.MODEL
    if not model.is_dir():
        raise CheckpointError(
            f"{workdir} is not the workdir of a run: it has no folder {model.name}"
        )
    config = models.load_config(model)
    dtype = jnp.dtype(run_files.read_json(workdir / run_files.CONFIG)["param_dtype"])
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    shapes = models.abstract(config, dtype)[1]
    shapes = sharding.with_shardings(shapes, models.shardings(config, shapes, mesh))
    params, facts = read_params(workdir, step, shapes)
    card = model_card(facts.config, facts.progress)
    models.save(out, config, params, tokenizer=models.tokenizer(model), card=card)
    return facts.progress.step


def _check_out(out: Path) -> None:
    """Raises ValueError if `out` is, or lies in, what a run keeps, other than its export."""
    place = out.expanduser().absolute()
    for folder in (place, *place.parents):
        is_run = (folder / run_files.RUN).exists() and workdir_lib.is_inside(str(out), folder)
        if is_run and place != folder / run_files.EXPORT:
            raise ValueError(
                f"{out} would replace what the run in {folder} keeps; choose another path"
            )
