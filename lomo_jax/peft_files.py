"""Adapters of a `Decoder` in PEFT's files: adapter_config.json and adapter_model.safetensors.

Dimensions: I inputs, O outputs, R rank.
"""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy
from flax import nnx

from lomo_jax import lora, models
from lomo_jax._json import read_json, write_json
from lomo_jax._schema import ADAPTER_CONFIG, short
from lomo_jax.errors import UserError
from lomo_jax.fused import arrays
from lomo_jax.lora import LoRA
from lomo_jax.models import DecoderConfig, export_folder
from lomo_jax.models.families import FAMILIES
from lomo_jax.models.weights import swap_pairs

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Fields of adapter_config.json that change what an adapter computes, and the only value we have.
_PLAIN = {
    "peft_type": "LORA",
    "bias": "none",
    "fan_in_fan_out": False,
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "layers_to_transform": None,
    "layer_replication": None,
    "modules_to_save": None,
    "trainable_token_indices": None,
    "target_parameters": None,
    "rank_pattern": {},
    "alpha_pattern": {},
}


class _Module(NamedTuple):
    """A linear map of a model, as its adapters are stored in a file."""

    tensor: str  # the name of its weight, with {} for the layer
    pairs: tuple[int, int] | None  # (head_dim, rotary_dim) if files interleave rotary pairs

    def names(self, layer: int) -> dict[str, str]:
        """Returns the names of the tensors of one layer by those of our parameters."""
        prefix = _PREFIX + self.tensor.format(layer)
        return {"lora_a": f"{prefix}.lora_A.weight", "lora_b": f"{prefix}.lora_B.weight"}

    def turn(self, name: str, matrix: np.ndarray, *, to_file: bool) -> np.ndarray:
        """Returns a matrix of a file, [R, I] or [O, R], as our parameter, [I, R] or [R, O]."""
        matrix = matrix.T if to_file else matrix
        if name == "lora_b" and self.pairs is not None:
            matrix = swap_pairs(matrix, *self.pairs, to_file=to_file)
        return np.ascontiguousarray(matrix if to_file else matrix.T)


def save(
    path: str | os.PathLike[str],
    config: DecoderConfig,
    adapters: LoRA,
    params: nnx.State,
    *,
    base: str | None = None,
    card: str | None = None,
) -> None:
    """Writes the adapters of a `Decoder` as files that PEFT loads on the original model.

    Args:
      path: The directory. An earlier export there is replaced if its files are unchanged.
      config: The shape of the model.
      adapters: The adapters.
      params: The parameters of the adapters; others are ignored.
      base: The path or the id of the original model, for adapter_config.json.
      card: The text of README.md, the model card.

    Raises:
      UserError: The model's family stores several adapted linear maps as one, or `path` holds
        something else than an earlier export.
    """
    modules, tensors = _modules(config), {}
    found = _by_module(params)
    for module, matrices in found.items():
        place = _place(modules, module)
        for name, stack in matrices.items():
            layers = np.asarray(stack, np.float32).reshape(-1, *stack.shape[-2:])
            for layer, matrix in enumerate(layers):
                tensors[place.names(layer)[name]] = place.turn(name, matrix, to_file=True)
    targets = {_place(modules, module).tensor.rpartition(".")[2] for module in found}
    hf_config = _PLAIN | {
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.rank_stabilized,
        "target_modules": sorted(targets),
        "inference_mode": True,
    }
    with export_folder.replace(path) as folder:
        if jax.process_index() == 0:
            write_json(folder / CONFIG, hf_config)
            safetensors.numpy.save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
            if card is not None:
                (folder / "README.md").write_text(card, encoding="utf-8")


def load(path: str | os.PathLike[str], config: DecoderConfig) -> tuple[LoRA, nnx.State]:
    """Reads adapters that PEFT or `save` has written.

    Args:
      path: The directory.
      config: The shape of the model that the adapters belong to.

    Returns:
      The adapters and their parameters, float32, as `lora.init` returns them.

    Raises:
      UserError: A file is missing or damaged, the adapters belong to another model, or they are of
        a kind that is not supported.
    """
    path = Path(path)
    if not (path / CONFIG).is_file() or not (path / WEIGHTS).is_file():
        raise UserError(f"{path} has no {CONFIG} and {WEIGHTS}; give the folder of a LoRA adapter")
    hf_config = read_json(path / CONFIG, ADAPTER_CONFIG)
    for key, value in _PLAIN.items():
        found = hf_config.get(key, value)
        if found != value and (found or value):
            raise UserError(
                f"{path / CONFIG}: {key}={short(found)} is not supported, only {value!r}"
            )
    try:
        tensors = safetensors.numpy.load_file(path / WEIGHTS)
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path / WEIGHTS} is damaged ({error}); copy it again") from None
    adapters = LoRA(
        rank=hf_config["r"],
        alpha=hf_config["lora_alpha"],
        targets=tuple(sorted(_targets(path, config, tensors))),
        rank_stabilized=hf_config.get("use_rslora", False),
    )
    shapes = lora.split(lora.abstract(*models.abstract(config), adapters)[1])[0]
    leaves = [
        _read(path, tensors, place, name, shape) for place, name, shape in _leaves(config, shapes)
    ]
    return adapters, jax.tree.unflatten(jax.tree.structure(shapes), leaves)


def _read(
    path: Path, tensors: dict[str, np.ndarray], place: _Module, name: str, shape: Any
) -> jax.Array:
    """Returns one stacked parameter."""
    matrices = []
    for layer in range(math.prod(shape.shape[:-2])):
        tensor = place.names(layer)[name]
        if tensor not in tensors:
            raise UserError(f"{path / WEIGHTS} lacks {tensor}: the adapters are of another model")
        matrix = place.turn(name, tensors[tensor].astype(np.float32), to_file=False)
        if matrix.shape != shape.shape[-2:]:
            raise UserError(
                f"{path / WEIGHTS}: {tensor} has shape {list(tensors[tensor].shape)}, but rank and "
                f"model need {list(shape.shape[:-3:-1])}: the adapters are of another model or rank"
            )
        matrices.append(matrix)
    return jnp.asarray(np.stack(matrices).reshape(shape.shape))


def _targets(path: Path, config: DecoderConfig, tensors: dict[str, np.ndarray]) -> set[str]:
    """Returns the names of the linear maps that have adapters in a file."""
    known = {}
    for module, place in _modules(config).items():
        for layer in range(config.num_layers):
            known |= dict.fromkeys(place.names(layer).values(), module.rpartition("/")[2])
    if unknown := [name for name in tensors if name not in known]:
        raise UserError(
            f"{path / WEIGHTS} has {unknown[0]}, which is no adapter of this model: the adapters "
            "are of another model or kind"
        )
    return {known[name] for name in tensors}


def _modules(config: DecoderConfig) -> dict[str, _Module]:
    """Returns the linear maps of a model by their path, but for those that share a tensor."""
    layout = FAMILIES[config.family].layout
    names = list(layout.names.values())
    pairs = (config.head_dim, config.rotary_dim or config.head_dim) if layout.interleaved else None
    return {
        module: _Module(name, pairs if module[-2:] in ("/q", "/k") else None)
        for module, name in layout.names.items()
        if names.count(name) == 1 and module.startswith("layers/") and "/experts/" not in module
    }


def _place(modules: dict[str, _Module], module: str) -> _Module:
    if module not in modules:
        raise UserError(
            f"{module}: files of this family store it together with other linear maps, which an "
            "adapter of PEFT cannot express; merge the adapters into the model"
        )
    return modules[module]


def _by_module(params: nnx.State) -> dict[str, dict[str, jax.Array]]:
    """Returns the adapters' parameters by the path of the linear map and their own name."""
    found: dict[str, dict[str, jax.Array]] = {}
    for path, leaf in zip(arrays.names(params), jax.tree.leaves(params), strict=True):
        if lora.is_adapter(path):
            module, _, name = path.removesuffix("/value").rpartition("/")
            found.setdefault(module, {})[name] = leaf
    return found


def _leaves(config: DecoderConfig, shapes: nnx.State) -> list[tuple[_Module, str, Any]]:
    """Returns the module, name and shape of each parameter of the adapters, in their order."""
    modules = _modules(config)
    return [
        (_place(modules, module), name, shape)
        for module, matrices in _by_module(shapes).items()
        for name, shape in matrices.items()
    ]
