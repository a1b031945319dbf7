"""Writes folders like those that runs of `train.py` leave."""

import json

CONFIG = {
    "model": {"path": "/models/llama-7b", "init": "checkpoint"},
    "optimizer": "adalomo",
    "optimizer_kwargs": {},
    "learning_rate": 0.001,
    "schedule": "cosine",
    "clip_norm": None,
    "batch_size": 8,
    "sequence_length": 512,
    "steps": 30,
    "param_dtype": "bfloat16",
    "seed": 0,
    "prompt": "Once <i>upon</i>",
    "workdir": "runs/default",
}
FACTS = {
    "source": "/models/llama-7b",
    "parameters": 6738415616,
    "device": "NVIDIA H100",
    "devices": 2,
    "processes": 1,
    "versions": {"python": "3.12.3", "jax": "0.12.0", "lomo_jax": "0.1.0"},
    "plan": {
        "total_gib": 14.17,
        "usable_gib": 71.25,
        "weights_gib": 12.55,
        "state_gib": 0.01,
        "layer_inputs_gib": 1.0,
        "temporaries_gib": 0.61,
        "host_gib": 0.25,
    },
}


def write(folder, records, *, config=CONFIG, facts=FACTS, end="\n"):
    """Writes a run; `end` follows its last record."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, value in (("config.json", config), ("run.json", facts)):
        if value is not None:
            (folder / name).write_text(json.dumps(value))
    lines = "\n".join(json.dumps(record) for record in records)
    (folder / "metrics.jsonl").write_text(lines + end)
    return folder


def step(number, loss, time=0.0, **more):
    rest = {"learning_rate": 1e-3, "tokens_per_second": 1000.0, "accuracy": 0.5}
    return {"step": number, "time": time, "loss": loss, **rest, **more}


def evaluation(number, loss, time=0.0):
    return {"step": number, "time": time, "eval_loss": loss, "eval_accuracy": 0.4}


def sample(number, text, time=0.0):
    return {"step": number, "time": time, "sample": text}


def resumed(number, time=0.0):
    return {"step": number, "time": time, "resumed": True}
