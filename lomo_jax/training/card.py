"""The model card of an export: what the model is, and how it was made."""

import json
from typing import Any

import lomo_jax
from lomo_jax.training.checkpoint import Progress

_CARD = """\
---
library_name: transformers
pipeline_tag: text-generation
tags:
- lomo_jax
- {optimizer}
---

# {title}

{source}, all of its parameters trained with {optimizer} by lomo_jax {version}.

| | |
|---|---|
{rows}

The config of the run:

```json
{config}
```
"""


def model_card(config: dict[str, Any], progress: Progress) -> str:
    """Returns the text of README.md, for a person and for the Hugging Face hub.

    Args:
      config: Of the run, as of `config.to_dict`.
      progress: Where it was when the weights were taken.
    """
    model, data = config["model"], config["data"]
    tokens = progress.step * config["batch_size"] * config["sequence_length"]
    is_random = model["init"] == "random"
    source = "Random weights" if is_random else f"`{model['path']}`"
    rows = {
        "starts from": source,
        "trained on": f"`{data['path']}`, {data['eval_fraction']:.1%} of the documents held out",
        "steps": f"{progress.step:,} of {config['steps']:,}, {tokens:,} tokens",
        "batch": f"{config['batch_size']} x {config['sequence_length']} tokens",
        "learning rate": f"{config['learning_rate']:g}, {config['schedule']}",
        "weights": config["param_dtype"],
        "lowest held-out loss": None
        if progress.best is None
        else f"{progress.best:.4f}, after step {progress.best_step:,}",
        "updates skipped": progress.skipped or None,
    }
    return _CARD.format(
        title=config["workdir"].rstrip("/").rpartition("/")[2],
        source=source,
        optimizer=config["optimizer"],
        version=lomo_jax.__version__,
        rows="\n".join(f"| {name} | {value} |" for name, value in rows.items() if value),
        config=json.dumps(config, indent=2),
    )
