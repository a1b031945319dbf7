"""Writes folders of runs with the writers of the trainer."""

from lomo_jax._json import write_json
from lomo_jax.plan import MemoryPlan
from lomo_jax.run_files import CONFIG, MetricsWriter, RunInfo
from lomo_jax.training.config import Config, to_dict

PLAN = MemoryPlan(
    weights_gib=12.55,
    state_gib=0.01,
    layer_inputs_gib=1.0,
    temporaries_gib=0.61,
    host_gib=0.25,
    total_gib=14.17,
    device_gib=80.0,
    usable_gib=71.25,
    fits=True,
    gpu="NVIDIA H100",
    devices=2,
)
INFO = RunInfo(
    source="/models/llama-7b",
    parameters=6_738_415_616,
    device="NVIDIA H100",
    devices=2,
    processes=1,
    versions={"python": "3.12.3", "jax": "0.12.0", "lomo_jax": "0.1.0"},
    memory=PLAN,
)


def write(folder, records, *, config=None, info=INFO, end=""):
    """Writes a run; `end` follows its last record."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / CONFIG, to_dict(config or Config(steps=30)))
    if info is not None:
        info.write(folder)
    (folder / "metrics.jsonl").unlink(missing_ok=True)
    writer = MetricsWriter(folder)
    for record in records:
        writer.write(record)
    writer.close()
    with (folder / "metrics.jsonl").open("a") as file:
        file.write(end)
    return folder


def step(number, loss, time=0.0, **more):
    rest = {"learning_rate": 1e-3, "tokens_per_second": 1000.0, "accuracy": 0.5}
    return {"step": number, "time": time, "loss": loss, **rest, **more}


def evaluation(number, loss, time=0.0):
    return {"step": number, "time": time, "eval_loss": loss, "eval_accuracy": 0.4}


def sample(number, text, time=0.0, prompt="Once <i>upon</i> "):
    return {"step": number, "time": time, "prompt": prompt, "sample": text}


def resumed(number, time=0.0):
    return {"step": number, "time": time, "resumed": True}
