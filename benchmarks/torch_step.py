"""The PyTorch rows of `compare.py`: eager, with the Llama of transformers."""

import functools
import os
from collections.abc import Callable

import numpy as np
import torch
import transformers
from rows import LEARNING_RATES, Row, Size, batches

from lomo_jax import models
from lomo_jax.models.families import FAMILIES
from lomo_jax.models.hf_config import write_config
from lomo_jax.models.weights import disassemble, init_layer_by_layer

_MAX_COPIED = 2 * 10**9  # parameters; more take minutes to draw on a CPU, so torch draws them


class Run:
    """A model, its weights and its optimizer."""

    def __init__(self, row: Row, size: Size) -> None:
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.set_num_threads(os.cpu_count() or 1)
        config = models.DecoderConfig(**size.architecture(), max_length=size.length)
        dtype = getattr(torch, size.dtype)
        torch.set_default_dtype(dtype)
        with torch.device(self.device):
            self.model = transformers.LlamaForCausalLM(
                transformers.LlamaConfig(
                    **write_config(config, size.dtype), attn_implementation="sdpa", use_cache=False
                )
            )
        torch.set_default_dtype(torch.float32)
        if sum(p.numel() for p in self.model.parameters()) < _MAX_COPIED:
            self._copy_weights(config, size.dtype)
        self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.update = _UPDATES[row.optimizer](self.model)
        self.tokens = torch.as_tensor(batches(size)).long().to(self.device)
        name = torch.cuda.get_device_name() if self.device == "cuda" else None
        self.facts = {"device": name or f"CPU, {os.cpu_count()} cores"}
        self.count = 0

    def _copy_weights(self, config: models.DecoderConfig, dtype: str) -> None:
        params = init_layer_by_layer(config, 0, dtype)
        own = dict(self.model.named_parameters())
        for tensor in disassemble(config, params, FAMILIES[config.family].layout, dtype):
            with torch.no_grad():
                own[tensor.name].copy_(torch.from_numpy(tensor.read().astype(np.float32)))

    def __call__(self) -> float:
        """Runs one step and returns its loss."""
        tokens = self.tokens[self.count % len(self.tokens)]
        self.count += 1
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.update(loss)
        if self.device == "cuda":
            torch.cuda.synchronize()
        return loss.item()

    def device_peak(self) -> int | None:
        """Returns the peak of device memory in use, bytes; None on a CPU."""
        return torch.cuda.max_memory_allocated() if self.device == "cuda" else None


def _lomo(rule: str, model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    import lomo_optim

    # AdaLomo moves its state to a GPU even if there is none.
    if not torch.cuda.is_available():
        torch.Tensor.cuda = lambda self: self
    optimizer = getattr(lomo_optim, rule)(model)
    return lambda loss: optimizer.fused_backward(loss, LEARNING_RATES[rule.lower()])


def _adamw(model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATES["adamw"], weight_decay=1e-4)

    def update(loss: torch.Tensor) -> None:
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return update


def _in_backward(make: Callable, model: torch.nn.Module) -> Callable[[torch.Tensor], None]:
    """PyTorch's pattern: one optimizer per parameter, stepped as soon as its gradient is computed.

    References:
      docs.pytorch.org/tutorials/intermediate/optimizer_step_in_backward_tutorial.html
    """
    for parameter in model.parameters():
        optimizer = make([parameter])

        def hook(parameter: torch.Tensor, optimizer=optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(hook)
    return lambda loss: loss.backward()


_UPDATES = {
    "Lomo": functools.partial(_lomo, "Lomo"),
    "AdaLomo": functools.partial(_lomo, "AdaLomo"),
    "AdamW": _adamw,
    "AdamW in backward": functools.partial(
        _in_backward,
        functools.partial(torch.optim.AdamW, lr=LEARNING_RATES["adamw"], weight_decay=1e-4),
    ),
    "Adafactor in backward": functools.partial(
        _in_backward, functools.partial(torch.optim.Adafactor, lr=LEARNING_RATES["adafactor"])
    ),
}
