"""Trains with the authors' optimizers in PyTorch, for `learning.py`.

    python benchmarks/learning_torch.py AdaLomo [--updates 4] --config quickstart ...

takes the flags of `lomo-jax train` and uses the same weights, batches, loss and learning rates. It
writes the held-out loss and accuracy to WORKDIR/curve.json. With --updates each step is as many
updates, one for each part of the batch, with the same learning rate.
"""

import json
import sys
from collections.abc import Mapping
from itertools import islice
from pathlib import Path

import lomo_optim
import numpy as np
import torch
import transformers
from absl import flags

from lomo_jax import data, models
from lomo_jax.training.config_reader import parse


def main(argv: list[str]) -> None:
    """Runs the command line."""
    values = flags.FlagValues()
    updates = flags.DEFINE_integer("updates", 1, "in a step", flag_values=values)
    rule = argv.pop(1)
    config = parse(argv, values, usage=__doc__)
    workdir, steps = Path(config.workdir), config.steps
    path = data.resolve(config.model.path)
    model = _load(path, workdir / "initial")
    tokenizer = models.tokenizer(path)
    dataset = data.text_dataset(
        tokenizer=tokenizer,
        sequence_length=config.sequence_length,
        batch_size=config.batch_size,
        seed=config.seed,
        vocab_size=model.config.vocab_size,
        **vars(config.data),
    )
    held_out = list(islice(dataset.held_out, config.eval_batches))
    if not torch.cuda.is_available():  # AdaLomo moves its state to a GPU even if there is none
        torch.Tensor.cuda = lambda self: self
    optimizer = getattr(lomo_optim, rule)(model, clip_grad_norm=config.clip_norm)
    schedule, batches, curve = config.make_schedule(), iter(dataset.train), []
    for step in range(steps + 1):
        if step % config.eval_every == 0 or step == steps:
            curve.append({"step": step, **_evaluate(model, held_out)})
            print(json.dumps(curve[-1]), flush=True)
            (workdir / "curve.json").write_text(json.dumps(curve))
        if step < steps:
            rate = float(schedule(step))
            batch = next(batches)
            for first in range(updates.value):
                part = {name: array[first :: updates.value] for name, array in batch.items()}
                if config.clip_norm is not None:
                    optimizer.grad_norm(_loss(model, part)[0])
                optimizer.fused_backward(_loss(model, part)[0], rate)


def _load(path: str, folder: Path) -> torch.nn.Module:
    """Returns a model of lomo_jax as transformers' in float32."""
    graphdef, params = models.load(path)
    models.save(folder, graphdef, params)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa"
    )


def _loss(
    model: torch.nn.Module, batch: Mapping[str, np.ndarray]
) -> tuple[torch.Tensor, float, float]:
    """Returns the mean cross-entropy of a batch, its accuracy and its weight."""
    tensors = {name: torch.as_tensor(np.asarray(value)) for name, value in batch.items()}
    segments, targets = tensors["segments"], tensors["targets"].long()
    same = segments[:, None, :, None] == segments[:, None, None, :]
    logits = model(
        input_ids=tensors["tokens"].long(),
        position_ids=tensors["positions"].long(),
        attention_mask=same.tril(),
        use_cache=False,
    ).logits
    # Flat, because along another axis than the last PyTorch sums term by term, 1e-4 off.
    losses = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="none"
    ).view(targets.shape)
    weights = tensors["weights"]
    correct = (logits.argmax(-1) == targets) * weights
    weight = weights.sum()
    return (losses * weights).sum() / weight, float(correct.sum() / weight), float(weight)


@torch.no_grad()
def _evaluate(model: torch.nn.Module, held_out: list[Mapping[str, np.ndarray]]) -> dict[str, float]:
    """Returns means over the tokens of all batches."""
    losses, accuracies, weights = zip(*(_loss(model, batch) for batch in held_out), strict=True)
    return {
        "loss": float(np.average([float(loss) for loss in losses], weights=weights)),
        "accuracy": float(np.average(accuracies, weights=weights)),
    }


if __name__ == "__main__":
    main(sys.argv)
