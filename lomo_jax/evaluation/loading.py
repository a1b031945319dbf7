"""Loads what is evaluated: a model, a run, or one checkpoint of a run."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from flax import nnx
from jax.sharding import Mesh

from lomo_jax import lora, models, run_files
from lomo_jax.errors import UserError
from lomo_jax.training import model as model_lib
from lomo_jax.training.config import LoraConfig, ModelConfig
from lomo_jax.training.config_reader import read_config

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase


class Loaded(NamedTuple):
    """A model with its weights."""

    graphdef: nnx.GraphDef[models.Decoder]
    params: nnx.State
    tokenizer: PreTrainedTokenizerBase
    config: models.DecoderConfig
    step: int | None  # of the checkpoint, for a run
    run: Path | None  # its folder


def load(
    path: str, *, step: int | str | None = None, dtype: str | None = None, mesh: Mesh | None = None
) -> Loaded:
    """Loads a model with its tokenizer.

    Args:
      path: The folder of a run, or what `ModelConfig.path` accepts.
      step: The step of a checkpoint of a run, "best", or None for the last one.
      dtype: The dtype of the weights; by default that of the run, and float32 for a model.
      mesh: The devices to shard the weights over; None for the default device.

    Raises:
      UserError: There is no such model or checkpoint, it is damaged, or does not fit the mesh.
    """
    from lomo_jax.training import checkpoint  # slow to import
    from lomo_jax.training.resume import check_same_base

    run = model_lib.find_run(path)
    if run is None:
        if step is not None:
            raise UserError(f"--step: {path} is not the folder of a run")
        source, adapters = ModelConfig(path=path), LoraConfig()
    else:
        folder, number = run
        step = number if step is None else step
        trained = read_config(str(folder / run_files.CONFIG))
        source, adapters = ModelConfig(path=str(folder / run_files.MODEL)), trained.lora
        dtype = dtype or trained.param_dtype
    model_lib.download(source)
    found = model_lib.abstract(source, dtype or "float32", 1, "xla", mesh=mesh, adapters=adapters)
    tokenizer = model_lib.load_tokenizer(source.path, found.config)
    if run is None:
        params = model_lib.load_params(source, found, mesh=mesh)
        return Loaded(found.graphdef, params, tokenizer, found.config, None, None)
    params, metadata = checkpoint.read_params(run[0], step, found.saved(found.shapes))
    if found.is_base_frozen:
        base = model_lib.load_params(trained.model, found, seed=trained.seed, mesh=mesh)
        base = lora.split(base)[1]
        check_same_base(metadata, checkpoint.checksums(base).sums, str(trained.model.path))
        params = nnx.merge_state(params, base)
    done = metadata.progress.step
    return Loaded(found.graphdef, params, tokenizer, found.config, done, run[0])
