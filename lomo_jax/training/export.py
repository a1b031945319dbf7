"""`lomo-jax export`: a checkpoint of a run as a Hugging Face directory, with a model card.

    lomo-jax export WORKDIR OUT [--step N] [--merge]

OUT gets weights as safetensors, config, tokenizer and model card. It appears when it is complete.
Of a run that trains adapters on a frozen base, OUT gets the adapters as files of PEFT; --merge
writes the whole model instead.
The run may be in progress: nothing in WORKDIR changes, and no GPU is used. An error is one line.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
from flax import nnx

import lomo_jax
from lomo_jax import lora, models, peft_files, run_files, sharding
from lomo_jax.errors import ArgumentParser, CheckpointError, UserError
from lomo_jax.training import model as model_lib
from lomo_jax.training.config import FROZEN, ModelConfig
from lomo_jax.training.config_reader import read_config

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
        help="the step of the checkpoint, or best, see keep_best of the config; default: last",
    )
    parser.add_argument(
        "--merge", action="store_true", help="add the adapters to the base: a whole model"
    )
    try:
        arguments = parser.parse_args(argv[1:])
        # Reading a checkpoint needs no GPU, and the GPU may be busy with the run.
        jax.config.update("jax_platforms", "cpu")
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from lomo_jax.training.checkpoint import parse_step  # slow to import

        workdir, out = Path(arguments.workdir), Path(arguments.out)
        step = export(workdir, out, parse_step(arguments.step), merge=arguments.merge)
    except (UserError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"exported  step {step} of {arguments.workdir} to {arguments.out}")
    return 0


def export(workdir: Path, out: Path, step: int | str | None = None, *, merge: bool = False) -> int:
    """Writes a checkpoint's weights, config, tokenizer and model card to `out`.

    Args:
      workdir: The folder of the run.
      out: The directory to write. An earlier export there is replaced when this one is complete.
      step: The step of the checkpoint, "best" for the lowest held-out loss, None for the last one.
      merge: Whether to write a whole model although the run has trained adapters alone. Their base
        is read from where the run read it.

    Returns:
      The step.

    Raises:
      CheckpointError: There is no such run or checkpoint, or it is damaged.
      UserError: `out` is not an unchanged export, or lies inside a run's folder; the run has no
        adapters to merge, or their base cannot be read.
    """
    # Slow to import: check the paths first.
    from lomo_jax.training.checkpoint import checksums, read_params
    from lomo_jax.training.resume import check_same_base

    _check_outside_of_runs(out)
    models.check_save_path(out)
    model = workdir / run_files.MODEL
    if not model.is_dir():
        raise CheckpointError(
            f"{workdir} is not the folder of a run: it has no folder {model.name}"
        )
    run = read_config(str(workdir / run_files.CONFIG))
    if merge and run.lora.rank is None:
        raise UserError(f"--merge: the run in {workdir} has no adapters; leave it out")
    mesh = sharding.make_mesh(1, 1, 1, devices=jax.devices()[:1])
    source = ModelConfig(str(model))
    # Merged into the original weights, not into their quantised ones.
    adapters = dataclasses.replace(run.lora, quantize="none") if merge else run.lora
    found = model_lib.abstract(source, run.param_dtype, 1, "xla", mesh=mesh, adapters=adapters)
    params, metadata = read_params(workdir, step, found.saved(found.shapes))
    if merge and found.is_base_frozen:
        base = model_lib.load_params(run.model, found, seed=run.seed, mesh=mesh)
        base = lora.split(base)[1]
        if run.lora.quantize == "none":
            check_same_base(metadata, checksums(base).sums, str(run.model.path))
        params = nnx.merge_state(params, base)
        found = found._replace(is_base_frozen=False)
    tokenizer = models.tokenizer(model)
    with jax.set_mesh(mesh):
        write_export(out, found, params, like=model, tokenizer=tokenizer, metadata=metadata)
    return metadata.progress.step


def write_export(
    out: Path,
    model: model_lib.Model,
    params: nnx.State,
    *,
    like: Path,
    tokenizer: Any,
    metadata: CheckpointMetadata,
) -> None:
    """Writes adapters as files of PEFT if the base is frozen, otherwise a whole model.

    Args:
      out: The directory to write.
      model: The model.
      params: Its parameters; kernels with adapters are donated.
      like: See `models.save`.
      tokenizer: See `models.save`.
      metadata: The metadata of the run, for the model card.
    """
    card = model_card(metadata, like)
    if model.adapters is not None and model.is_base_frozen:
        base = metadata.config["model"]["path"]
        peft_files.save(out, model.config, model.adapters, params, base=base, card=card)
        return
    graphdef, params = lora.merge(model.graphdef, params)
    models.save(out, graphdef, params, like=like, tokenizer=tokenizer, card=card)


def _paths(path: Any) -> str:
    if path is None:
        return "unknown"
    return ", ".join(f"`{part}`" for part in ([path] if isinstance(path, str) else path))


def _adapter_rows(lora: dict[str, Any]) -> dict[str, str]:
    targets = lora["targets"]
    names = targets if isinstance(targets, str) else ", ".join(targets)
    return {
        "adapters": f"rank {lora['rank']}, alpha {lora['alpha']:g}, on {names}",
        "other parameters": lora["base"],
    }


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
    adapters = config["lora"] if config["lora"]["rank"] is not None else None
    is_peft = adapters is not None and adapters["base"] == FROZEN
    metadata = ModelCardData(
        base_model=base and base.partition("@")[0],
        **_licence(original / "README.md"),
        library_name="peft" if is_peft else "transformers",
        pipeline_tag="text-generation",
        tags=["lomo_jax", optimizer],
    )
    metric = config.get("keep_best")
    tokens = progress.step * config["batch_size"] * config["sequence_length"]
    source = "Random weights" if model["init"] == "random" else f"`{model['path']}`"
    rows = {
        "initial weights": source,
        "dataset": f"{_paths(data['path'])}, {_held_out(data)}",
        "steps": f"{progress.step:,} of {config['steps']:,}, {tokens:,} tokens",
        "batch": f"{config['batch_size']} x {config['sequence_length']} tokens",
        "learning rate": f"{config['learning_rate']:g}, {config['schedule']}",
        **(_adapter_rows(adapters) if adapters else {}),
        "dtype": config["param_dtype"],
        f"best {metric}" if isinstance(metric, str) else "lowest held-out loss": None
        if progress.best is None or progress.best_step is None
        else f"{progress.best:.4f}, after step {progress.best_step:,}",
        "skipped updates": progress.skipped or None,
    }
    how = "fully fine-tuned" if adapters is None else "fine-tuned by adapters (LoRA)"
    title = config["workdir"].rstrip("/").rpartition("/")[2]
    lines = [
        f"---\n{metadata.to_yaml()}\n---",
        f"# {title}",
        f"{source}, {how} with {optimizer} by lomo_jax {lomo_jax.__version__}.",
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
