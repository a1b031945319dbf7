"""The experiments of the two papers: what each is, its command, and what has been run of it.

    python benchmarks/paper.py                                       list them
    python benchmarks/paper.py superglue boolq --model DIR           run a task for all methods
    python benchmarks/paper.py superglue boolq copa --model DIR --data DIR -- --config.epochs=1

The last two write the data to data/superglue, train with `configs/superglue.py`, and print a table
of the best accuracy of each method in percent. What follows `--` goes to each training run.
"""

import argparse
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

_ROOT = Path(__file__).parents[1]
METHODS = ("zero_shot", "lora", "lora_lomo", "lomo")


class Experiment(NamedTuple):
    """One experiment of a paper."""

    paper: str
    what: str
    figures: str  # the paper's
    command: str
    run: str  # what has been run of it here


EXPERIMENTS = (
    Experiment(
        "LOMO, table 1",
        "memory of LLaMA-7B by parts, batch 8 x 512",
        "LOMO 14.58 GiB, AdamW 102.20",
        "lomo-jax plan --config llama7b --gpu rtx3090 --config.optimizer=lomo",
        "planned: docs/benchmarks.md",
    ),
    Experiment(
        "LOMO, table 2",
        "memory and throughput, 7B to 65B on one to eight RTX 3090",
        "7B 13.61 GB, 769.92 tokens/s; 65B 19.18 GB, 4.93",
        "bash benchmarks/gpu.sh; lomo-jax plan --config llama65b_8gpus --gpu rtx3090 --devices 8",
        "memory planned: docs/benchmarks.md; throughput not on this card",
    ),
    Experiment(
        "LOMO, table 3",
        "SuperGLUE with LLaMA-7B: zero-shot, LoRA, LOMO",
        "averages 56.2, 78.8, 80.8",
        "python benchmarks/paper.py superglue boolq rte wsc wic multirc copa --model DIR",
        "not run with LLaMA-7B",
    ),
    Experiment(
        "LOMO, section 4.4",
        "LoRA and LOMO together on SuperGLUE",
        "each better than LoRA alone",
        "python train.py --config configs/superglue.py:boolq:lora_lomo --config.model.path=DIR",
        "not run with LLaMA-7B",
    ),
    Experiment(
        "AdaLomo, instruction tuning",
        "Alpaca-GPT4, three epochs; MMLU, BBH, GSM8K, HumanEval, AlpacaFarm",
        "see the paper",
        "python train.py --config configs/alpaca.py --config.model.path=DIR --config.data.path=FILE"
        " && lomo-jax eval runs/alpaca --tasks mmlu,bbh,gsm8k",
        "not run with LLaMA-7B; HumanEval and AlpacaFarm need programs of their own",
    ),
    Experiment(
        "AdaLomo, further pre-training",
        "Python code or Chinese text; perplexity and accuracy on 2000 held-out documents",
        "curves",
        "python train.py --config configs/further_pretraining.py --config.model.path=DIR"
        " --config.data.path=TEXT --config.data.eval_documents=2000",
        "not run with LLaMA-7B",
    ),
)


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    argv, extra = list(argv[1:]), []
    if "--" in argv:
        place = argv.index("--")
        argv, extra = argv[:place], argv[place + 1 :]
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="what")
    superglue = commands.add_parser("superglue")
    superglue.add_argument("tasks", nargs="+")
    superglue.add_argument("--model", required=True, help="as --config.model.path")
    superglue.add_argument("--data", nargs="+", default=[], help="folders with SuperGLUE's data")
    superglue.add_argument("--methods", default=",".join(METHODS))
    options = parser.parse_args(argv)
    if options.what is None:
        print(listing())
        return 0
    methods = options.methods.split(",")
    rows = {
        task: {method: measure(task, method, options, extra) for method in methods}
        for task in options.tasks
    }
    print(table(rows))
    return 0


def listing() -> str:
    """Returns all experiments as a Markdown table."""
    lines = ["| paper | experiment | figures | command | run here |", "|---|---|---|---|---|"]
    for each in EXPERIMENTS:
        cells = (each.paper, each.what, each.figures, f"`{each.command}`", each.run)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(task: str, method: str, options: argparse.Namespace, extra: Sequence[str]) -> float:
    """Returns the best accuracy of a method on a task, in percent."""
    folder = Path("data", "superglue", task)
    questions = folder / f"{task}.jsonl"
    if not questions.exists():
        data = ["--data", *options.data] if options.data else []
        _run("-m", "lomo_jax.evaluation.superglue", task, str(folder), *data)
    if method == "zero_shot":
        out = folder / "zero_shot.json"
        model = [options.model, "--dtype", "bfloat16", "--tasks", str(questions)]
        _run("-m", "lomo_jax", "eval", *model, "--json", str(out))
        return 100 * json.loads(out.read_text())["results"][str(questions)]["acc,none"]
    workdir = Path("runs", "superglue", f"{task}_{method}")
    config = str(_ROOT / "configs" / f"superglue.py:{task}:{method}")
    flags = [f"--config.model.path={options.model}", f"--config.workdir={workdir}", *extra]
    _run(str(_ROOT / "train.py"), "--config", config, *flags)
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    key = f"eval_{task}_acc"
    return 100 * max(line[key] for line in lines if key in line and line["step"] > 0)


def table(rows: dict[str, dict[str, float]]) -> str:
    """Returns accuracies in percent, a row for each method and a column for each task."""
    methods = list(next(iter(rows.values())))
    lines = [f"| | {' | '.join(rows)} | average |", "|---" * (len(rows) + 2) + "|"]
    for method in methods:
        values = [row[method] for row in rows.values()]
        cells = [f"{value:.1f}" for value in (*values, sum(values) / len(values))]
        lines.append(f"| {method} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _run(*arguments: str) -> None:
    if status := subprocess.run([sys.executable, *arguments]).returncode:
        sys.exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv))
