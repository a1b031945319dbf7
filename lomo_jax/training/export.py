"""`lomo-jax export`: a checkpoint of a run as a Hugging Face directory, with a model card.

    lomo-jax export WORKDIR OUT [--step N]

OUT gets weights as safetensors, config, tokenizer and model card. It appears when it is complete.
The run may be in progress: nothing in WORKDIR changes, and no GPU is used. An error is one line.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

import lomo_jax
from lomo_jax import models, run_files, sharding
from lomo_jax._json import read_json
from lomo_jax._schema import RUN_CONFIG
from lomo_jax.errors import ArgumentParser, CheckpointError, UserError

if TYPE_CHECKING:
    from lomo_jax.training.checkpoint import CheckpointMetadata


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    parser = ArgumentParser(
        prog="lomo-jax export",
        description="Exports a checkpoint of a run as a Hugging Face directory.",
        allow_abbrev=False,
    )
    parser.add_argument("workdir", metavar="WORKDIR", help="the folder of the run")
    parser.add_argument("out", metavar="OUT", help="the directory to write")
    parser.add_argument(
        "--step",
        help="the step of the checkpoint, or best: the lowest held-out loss; default: last",
    )
    try:
        arguments = parser.parse_args(argv[1:])
        # Reading a checkpoint needs no GPU, and the GPU may be busy with the run.
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        step = export(Path(arguments.workdir), Path(arguments.out), _step(arguments.step))
    except (UserError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported  step {step} of {arguments.workdir} to {arguments.out}")
    return 0


def export(workdir: Path, out: Path, step: int | str | None = None) -> int:
    """Writes a checkpoint's weights, config, tokenizer and model card to `out`.

    Args:
      workdir: The folder of the run.
      out: The directory to write. An earlier export there is replaced when this one is complete.
      step: The step of the checkpoint, "best" for the lowest held-out loss, None for the last one.

    Returns:
      The step.

    Raises:
      CheckpointError: There is no such run or checkpoint, or it is damaged.
      UserError: `out` is not an unchanged export, or lies inside a run's folder.
    """
    from lomo_jax.training.checkpoint import read_params  # slow to import: check the paths first

    _check_outside_of_runs(out)
    models.check_save_path(out)
    model = workdir / run_files.MODEL
    if not model.is_dir():
        raise CheckpointError(
            f"{workdir} is not the folder of a run: it has no folder {model.name}"
        )
    config = models.load_config(model)
    dtype = jnp.dtype(read_json(workdir / run_files.CONFIG, RUN_CONFIG)["param_dtype"])
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    graphdef, shapes = models.abstract(config, dtype)
    shapes = sharding.with_shardings(shapes, models.shardings(config, shapes, mesh))
    params, metadata = read_params(workdir, step, shapes)
    card = model_card(metadata, model)
    models.save(out, graphdef, params, like=model, tokenizer=models.tokenizer(model), card=card)
    return metadata.progress.step


def _paths(path: Any) -> str:
    if path is None:
        return "unknown"
    return ", ".join(f"`{part}`" for part in ([path] if isinstance(path, str) else path))


def _held_out(data: dict[str, Any]) -> str:
    if data["validation_path"] is not None:
        return f"validated on {_paths(data['validation_path'])}"
    if data["eval_documents"] is not None:
        return f"{data['eval_documents']:,} of the documents held out"
    return f"{data['eval_fraction']:.1%} of the documents held out"


def model_card(checkpoint: CheckpointMetadata, original: Path) -> str:
    """Returns the text of an export's README.md, with the metadata of the Hugging Face hub.

    Args:
      checkpoint: The metadata of the run when the weights were saved.
      original: The folder of a run that has the files of the model that it started from.
    """
    from huggingface_hub import ModelCard, ModelCardData

    from lomo_jax.models import hub

    config, progress = checkpoint.config, checkpoint.progress
    model, data, optimizer = config["model"], config["data"], config["optimizer"]
    path = model["path"]
    base = path if path and model["init"] != "random" and hub.is_id(path) else None
    metadata = ModelCardData(
        base_model=base and base.partition("@")[0],
        **_licence(original / "README.md"),
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["lomo_jax", optimizer],
    )
    tokens = progress.step * config["batch_size"] * config["sequence_length"]
    source = "Random weights" if model["init"] == "random" else f"`{model['path']}`"
    rows = {
        "initial weights": source,
        "dataset": f"{_paths(data['path'])}, {_held_out(data)}",
        "steps": f"{progress.step:,} of {config['steps']:,}, {tokens:,} tokens",
        "batch": f"{config['batch_size']} x {config['sequence_length']} tokens",
        "learning rate": f"{config['learning_rate']:g}, {config['schedule']}",
        "dtype": config["param_dtype"],
        "lowest held-out loss": None
        if progress.best is None or progress.best_step is None
        else f"{progress.best:.4f}, after step {progress.best_step:,}",
        "skipped updates": progress.skipped or None,
    }
    title = config["workdir"].rstrip("/").rpartition("/")[2]
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"{source}, fully fine-tuned with {optimizer} by lomo_jax {lomo_jax.__version__}.",
        "\n".join(["| | |", "|---|---|", *(f"| {k} | {v} |" for k, v in rows.items() if v)]),
        "The config of the run:",
        f"```json\n{json.dumps(config, indent=2)}\n```",
    ]
    return str(ModelCard("\n\n".join(lines) + "\n"))


def _licence(card: Path) -> dict[str, Any]:
    """Returns the fields of a model card about the licence; none if the card cannot be read."""
    from huggingface_hub import ModelCard

    try:
        data = ModelCard.load(card).data.to_dict()
    except Exception:  # people write cards by hand
        return {}
    return {key: value for key, value in data.items() if key.startswith("license")}


def _step(text: str | None) -> int | str | None:
    if text is None or text == "best":
        return text
    if not text.isdecimal():
        raise UserError(f"--step: {text!r} must be a number or best")
    return int(text)


def _check_outside_of_runs(out: Path) -> None:
    """Raises UserError if writing `out` would replace files of a run, except its export."""
    place = out.expanduser().absolute()
    for folder in (place, *place.parents):
        is_run = (folder / run_files.RUN).exists() and run_files.contains(folder, str(out))
        if is_run and place != folder / run_files.EXPORT:
            raise UserError(
                f"{out} would replace files of the run in {folder}; choose another path"
            )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
