"""The model of a run, its initial weights and its tokenizer."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AbstractMesh, Mesh

from lomo_jax import lora, models, peft_files, run_files, sharding
from lomo_jax._json import read_json
from lomo_jax.data import resolve
from lomo_jax.errors import ConfigError, UserError
from lomo_jax.lora import LoRA
from lomo_jax.losses import Metrics, next_token_loss
from lomo_jax.training.config import LoraConfig, ModelConfig

if TYPE_CHECKING:  # slow to import
    from transformers import PreTrainedTokenizerBase


class Model(NamedTuple):
    """A model without its weights."""

    config: models.DecoderConfig
    graphdef: nnx.GraphDef[models.Decoder]
    shapes: nnx.State  # of its weights: jax.ShapeDtypeStruct, with shardings if there is a mesh
    folder: Path | None = None  # of its config.json and tokenizer, if it comes from one
    adapters: LoRA | None = None
    is_base_frozen: bool = False  # only the adapters are trained
    quantized: str = "none"  # the kernels of the base: "int8" or "nf4"

    def loss(self, params: nnx.State, batch: Any) -> tuple[jax.Array, Metrics]:
        """Returns the mean next-token loss of a `data.Batch`, and its accuracy and weight.

        A batch with seeds is for training, with dropout.
        """
        model = nnx.merge(self.graphdef, params)
        key = jax.random.key(batch["seeds"].sum()) if "seeds" in batch else None
        x_BxTxD, balance = model.hidden_and_balance(
            batch["tokens"], batch["positions"], batch["segments"], key
        )
        loss, metrics = next_token_loss(
            x_BxTxD,
            model.head(),
            batch["targets"],
            batch["weights"],
            cap=self.config.logit_cap,
        )
        if balance is not None and self.config.router_loss:
            loss += self.config.router_loss * balance
        return loss, metrics

    @property
    def has_dropout(self) -> bool:
        """Whether batches for training need seeds."""
        return self.adapters is not None and self.adapters.dropout > 0

    def saved(self, params: nnx.State) -> nnx.State:
        """Returns the parameters that a checkpoint holds: the adapters alone of a frozen base."""
        return lora.split(params)[0] if self.is_base_frozen else params


def abstract(
    source: ModelConfig,
    param_dtype: str,
    sequence_length: int,
    attention: str = "auto",
    *,
    capability: tuple[int, int] | None = None,
    mesh: Mesh | AbstractMesh | None = None,
    on_host: bool = False,
    adapters: LoraConfig | None = None,
) -> Model:
    """Builds the model without reading or computing weights.

    Args:
      source: The source of the model. Without a checkpoint it has `source.architecture`.
      param_dtype: The dtype of the weights.
      sequence_length: Tokens in a row of a batch.
      attention: "auto", "xla" or "cudnn".
      capability: The compute capability of the NVIDIA GPU to run on, None for another device.
      mesh: The devices to run on; None for the default device.
      on_host: Whether the weights are in host memory; ignored without a mesh.
      adapters: The adapters to add, if any.

    Raises:
      ConfigError: The model is too short for `sequence_length`, or the model or the GPU does not
        support `attention`, `param_dtype` or `mesh`.
      UserError: The checkpoint does not exist, is damaged or is not supported.
    """
    shape, folder = source.architecture, None
    if source.init == "checkpoint" and source.path is not None:
        path = models.local_path(hf_path(source.path), weights=False)
        shape, folder = models.load_config(path), path if path.is_dir() else None
    if sequence_length > shape.max_length:
        raise ConfigError(
            f"sequence_length: {sequence_length} is longer than the model allows, "
            f"{shape.max_length} tokens; lower it"
        )
    attention = _attention(attention, param_dtype, shape, sequence_length, capability)
    if param_dtype == "bfloat16" and capability is not None and capability < (8, 0):
        raise ConfigError(
            "param_dtype: 'bfloat16' needs an Ampere GPU or newer; set "
            "--config.param_dtype=float16 --config.dynamic_loss_scale=true"
        )
    adapters = adapters or LoraConfig()
    graphdef, shapes = models.abstract(
        shape, jnp.dtype(param_dtype), attention, quantized=adapters.quantize
    )
    if (added := adapters.adapters()) is not None:
        try:
            graphdef, shapes = lora.abstract(graphdef, shapes, added)
        except UserError as error:
            raise ConfigError(f"lora.targets: {error}") from None
    if mesh is not None:
        try:
            shardings = models.shardings(shape, shapes, mesh)
        except ValueError as error:
            raise ConfigError(f"mesh: {error}") from error
        if on_host:
            shardings = jax.tree.map(lambda x: x.with_memory_kind("pinned_host"), shardings)
        shapes = sharding.with_shardings(shapes, shardings)
    return Model(shape, graphdef, shapes, folder, added, adapters.is_frozen, adapters.quantize)


def download(source: ModelConfig) -> None:
    """Downloads a model of the hub, which plans do without; nothing for a path on disk."""
    if source.init == "checkpoint" and source.path is not None:
        models.local_path(source.path, weights=True)


def load_params(
    source: ModelConfig,
    model: Model,
    *,
    seed: int = 0,
    on_host: bool = False,
    mesh: Mesh | None = None,
    adapter_path: str | None = None,
) -> nnx.State:
    """Reads the weights of the checkpoint, or draws random ones.

    Args:
      source: The source of the weights.
      model: The model, from `abstract`; its shapes are those of the result.
      seed: The seed of random weights.
      on_host: Whether to put the weights in host memory; a device never holds all of them.
      mesh: The devices to shard the weights over; None for the default device.
      adapter_path: The folder of the adapters; None: new ones.

    Raises:
      UserError: The checkpoint or one of its files does not exist, is damaged or is not supported.
    """
    base = _load_base(source, model, seed=seed, on_host=on_host, mesh=mesh)
    if model.adapters is None:
        return base
    return nnx.merge_state(_load_adapters(adapter_path, model, seed), base)


def _load_adapters(path: str | None, model: Model, seed: int) -> nnx.State:
    """Returns adapters from a folder, or new ones."""
    assert model.adapters is not None
    shapes, _ = lora.split(model.shapes)
    if path is None:
        adapters = jax.jit(lambda: lora.init(shapes, seed))()
    else:
        found, adapters = peft_files.load(path, model.config)
        same = jax.tree.map(jnp.shape, adapters) == jax.tree.map(jnp.shape, shapes)
        if not same or found.scale != model.adapters.scale:
            raise ConfigError(
                f"lora.path: {path} has adapters of rank {found.rank}, alpha {found.alpha:g} and "
                f"rank_stabilized={found.rank_stabilized} on {', '.join(found.targets)}; set the "
                "fields of lora to these values"
            )
    return jax.tree.map(lambda x, shape: jax.device_put(x, shape.sharding), adapters, shapes)


def _load_base(
    source: ModelConfig, model: Model, *, seed: int, on_host: bool, mesh: Mesh | None
) -> nnx.State:
    """Returns the parameters without adapters."""
    placement: Any = {"on_host": on_host, "mesh": mesh, "quantized": model.quantized}
    dtype = jax.tree.leaves(model.shapes)[0].dtype
    if source.init == "random":
        return models.init_layer_by_layer(model.config, seed, dtype, **placement)
    assert source.path is not None, "validate() requires it"
    run = find_run(source.path)
    if run is None:
        return models.load(resolve(source.path), dtype, **placement)[1]
    if model.quantized != "none":
        raise UserError(
            f"{source.path}: a checkpoint of a run cannot be quantised; start from its export, "
            f"lomo-jax export {run[0]} OUT"
        )
    if read_json(run[0] / run_files.CONFIG).get("lora", {}).get("rank") is not None:
        raise UserError(
            f"{source.path} is a run with adapters; start from a whole model, which "
            f"lomo-jax export --merge {run[0]} OUT writes"
        )
    from lomo_jax.training import checkpoint  # slow to import, and not needed for a plan

    return checkpoint.read_params(*run, lora.split(model.shapes)[1])[0]


def load_tokenizer(path: str | None, shape: models.DecoderConfig) -> PreTrainedTokenizerBase:
    """Reads the tokenizer of a model; without a path, each byte is a token.

    Its vocabulary may be larger than the model's: only tokens that a text has are compared.

    Args:
      path: See `ModelConfig.path`.
      shape: The model, whose end of text is used if the tokenizer has none.

    Raises:
      UserError: The files do not exist or are damaged.
    """
    if path is None:
        return _byte_tokenizer()
    tokenizer = models.tokenizer(hf_path(path))
    if tokenizer.eos_token_id is None and shape.eos_id is not None:
        end = shape.eos_id if isinstance(shape.eos_id, int) else shape.eos_id[0]
        tokenizer.eos_token = tokenizer.convert_ids_to_tokens(end)
    return tokenizer


def check_prompt(
    prompt: str, prompt_tokens: int, tokenizer: PreTrainedTokenizerBase, shape: models.DecoderConfig
) -> None:
    """Raises ConfigError if the model cannot continue a prompt by `prompt_tokens` tokens."""
    tokens = tokenizer(prompt)["input_ids"] if prompt else []
    if max(tokens, default=0) >= shape.vocab_size:
        raise ConfigError(
            f"prompt: it has the token {max(tokens)}, but the model only {shape.vocab_size} "
            "tokens, from 0; use the tokenizer that the model was trained with"
        )
    if tokens and len(tokens) + prompt_tokens > shape.max_length:
        raise ConfigError(
            f"prompt: its {len(tokens)} tokens and prompt_tokens={prompt_tokens} are more than the "
            f"model allows, {shape.max_length}; shorten it"
        )


def compute_capability() -> tuple[int, int] | None:
    """Returns the compute capability of the NVIDIA GPU that JAX runs on; None on other devices."""
    capability = getattr(jax.devices()[0], "compute_capability", "")
    # AMD GPUs have a name instead, such as gfx942.
    major, _, minor = str(capability).partition(".")
    return (int(major), int(minor)) if major.isdigit() and minor.isdigit() else None


def hf_path(path: str) -> str:
    """Returns the folder of config.json and tokenizer; for a checkpoint, that is in its run."""
    run = find_run(path)
    return resolve(path) if run is None else str(run[0] / run_files.MODEL)


def find_run(path: str) -> tuple[Path, int | None] | None:
    """Returns (workdir, step) if a path is the workdir of a run (step None) or a checkpoint."""
    place = Path(path).expanduser()
    if (place / run_files.CHECKPOINTS).is_dir() and (place / run_files.MODEL).is_dir():
        return place, None
    folder = place.parent.parent
    is_checkpoint = place.parent.name == run_files.CHECKPOINTS and place.name.isdecimal()
    if is_checkpoint and place.is_dir() and (folder / run_files.MODEL).is_dir():
        return folder, int(place.name)
    return None


def _attention(
    attention: str,
    param_dtype: str,
    shape: models.DecoderConfig,
    sequence_length: int,
    capability: tuple[int, int] | None,
) -> str:
    """Returns the implementation of attention; "auto" selects cuDNN where it is supported."""
    head_dim = shape.head_dim
    # Requirements of cuDNN's flash attention. No check for cuDNN itself: without it JAX neither
    # finds an NVIDIA GPU nor compiles for one.
    obstacles = {
        "there is no NVIDIA GPU": capability is None,
        "the GPU is older than Ampere": capability is not None and capability < (8, 0),
        f"param_dtype={param_dtype}": param_dtype not in ("bfloat16", "float16"),
        f"the model has head_dim={head_dim}": head_dim > 128 or head_dim % 8 != 0,
        f"the model caps its scores at {shape.attention_cap}": shape.attention_cap is not None,
        f"sequence_length={sequence_length} is odd": sequence_length % 2 != 0,
    }
    why_not = next(itertools.compress(obstacles, obstacles.values()), None)
    if attention in ("cudnn", "pallas") and why_not is not None:
        raise ConfigError(
            f"attention: {attention!r} is not possible, {why_not}; it needs an Ampere GPU or "
            "newer, bfloat16 or float16, head_dim a multiple of 8 up to 128 and an even "
            "sequence_length; set auto"
        )
    if attention == "auto":
        # cuDNN takes packed rows with a mask, [B, 1, T, T], which long rows have no memory for.
        flash = "pallas" if sequence_length > 8192 else "cudnn"
        return "xla" if why_not is not None else flash
    return attention


def _byte_tokenizer() -> PreTrainedTokenizerBase:
    """Returns a tokenizer without training: its tokens are the bytes and an end of text."""
    from tokenizers import Tokenizer, decoders, pre_tokenizers
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    end = "<|endoftext|>"
    bytes_ = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = {token: index for index, token in enumerate([end, *bytes_])}
    backend = Tokenizer(BPE(tokens, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=end)
