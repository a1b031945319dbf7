"""Evaluates a run or a model on tasks, without an export.

    lomo-jax eval runs/quickstart --tasks boolq,piqa --limit 200
    lomo-jax eval MODEL --tasks mmlu --data DIR --json results.json

RUN_OR_MODEL is the folder of a run, one of its checkpoints, a Hugging Face directory, the id of a
model on the hub, or a .gguf file. The weights are sharded over all devices.

Tasks are those of lm-evaluation-harness (`lm-eval ls tasks` lists them), superglue/boolq and the
like as the authors of LOMO run them, and files of questions: FILE.jsonl with `prompt`, `choices`,
and `answer`, an index. Their data come from the hub, or from the folders of --data: DIR/boolq, or
DIR/super_glue/boolq as on the hub, with files or folders named after the splits.

The results of a run are added to evaluations.jsonl in its folder, which `lomo-jax report` shows.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from lomo_jax.errors import ArgumentParser, UserError


def main(argv: Sequence[str]) -> int:
    """Runs the command line `argv`; returns the exit status."""
    parser = ArgumentParser(
        prog="lomo-jax eval",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("path", metavar="RUN_OR_MODEL")
    parser.add_argument("--tasks", required=True, help="names of tasks or groups: boolq,mmlu")
    parser.add_argument("--limit", type=int, metavar="N", help="at most N examples of each task")
    parser.add_argument("--num_fewshot", type=int, metavar="K", help="examples in each prompt")
    parser.add_argument("--data", nargs="+", type=Path, default=[], metavar="DIR")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the harness's results")
    parser.add_argument("--step", help="a checkpoint's step, or best; default: the last one")
    parser.add_argument("--batch_size", type=int, default=8, help="prompts at a time; default: 8")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of weights")
    parser.add_argument("--tensor", type=int, default=1, help="shards of each matrix product")
    parser.add_argument("--gen_kwargs", metavar="SETTINGS", help="such as temperature=0.8,top_p=1")
    for name, kind in (("coordinator", str), ("num_processes", int), ("process_id", int)):
        parser.add_argument(f"--{name}", type=kind, help=argparse.SUPPRESS)
    try:
        _evaluate(parser.parse_args(argv[1:]))
    except (UserError, OSError) as error:
        if sys.flags.dev_mode:
            raise
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def _evaluate(options: argparse.Namespace) -> None:
    for name in ("limit", "batch_size", "tensor"):
        if (value := getattr(options, name)) is not None and value < 1:
            raise UserError(f"--{name}: {value} must be 1 or more")
    if options.num_fewshot is not None and options.num_fewshot < 0:
        raise UserError(f"--num_fewshot: {options.num_fewshot} must be 0 or more")
    if options.json is not None and not options.json.absolute().parent.is_dir():
        raise UserError(f"--json: there is no folder {options.json.absolute().parent}; make it")
    names = [name for name in options.tasks.split(",") if name]
    if not names:
        raise UserError(f"--tasks: {options.tasks!r} has no name; give such as boolq,mmlu")
    # JAX reads it when it first uses a device.
    from lomo_jax.plan.gpus import MEMORY_FRACTION

    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", str(MEMORY_FRACTION))
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
    from lomo_jax.evaluation.tasks import Tasks  # slow to import: report typos first

    tasks = Tasks(names, data=options.data, limit=options.limit, num_fewshot=options.num_fewshot)
    import jax

    from lomo_jax import sharding
    from lomo_jax.evaluation.loading import load
    from lomo_jax.training import devices, meeting
    from lomo_jax.training.checkpoint import parse_step

    devices.use_cpu_without_gpu()
    meeting.start(options.coordinator, options.num_processes, options.process_id, 120)
    started = time.perf_counter()
    try:
        mesh = sharding.make_mesh(1, -1, options.tensor)
    except ValueError as error:
        raise UserError(f"--tensor: {error}") from None
    loaded = load(options.path, step=parse_step(options.step), dtype=options.dtype, mesh=mesh)
    batches = itertools.count(1)
    with jax.set_mesh(mesh), Console(stderr=True).status("evaluating") as status:
        results = tasks.evaluate(
            *(loaded.graphdef, loaded.params, loaded.tokenizer),
            batch_size=options.batch_size,
            gen_kwargs=options.gen_kwargs,
            on_batch=lambda: status.update(f"evaluating batch {next(batches):,}"),
        )
    if jax.process_index() > 0:
        return
    seconds = time.perf_counter() - started
    step = "" if loaded.step is None else f" after {loaded.step} steps"
    print(f"{options.path}{step}, {seconds:.0f} s")
    print(_table(results))
    if tasks.cut:
        print(
            f"warning: {tasks.cut} prompts are longer than the model, "
            f"{loaded.config.max_length} tokens, and lost their beginning"
        )
    if loaded.run is not None and loaded.step is not None:
        _append(loaded.run, loaded.step, options, results)
    if options.json is not None:
        from lomo_jax._json import write_text

        write_text(options.json, json.dumps(results, indent=2, default=str) + "\n")


def _table(results: dict[str, Any]) -> str:
    """Returns the metrics of each task, one a line."""
    from lomo_jax.evaluation.tasks import counts, metrics

    rows = [(name, f"{value:.4f}") for name, value in metrics(results).items()]
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"{name:<{width}}  {value}" for name, value in rows]
    total = sum(counts(results).values())
    return "\n".join([*lines, f"{total:,} examples"])


def _append(run: Path, step: int, options: argparse.Namespace, results: dict[str, Any]) -> None:
    from lomo_jax.evaluation.tasks import counts, metrics
    from lomo_jax.run_files import append_evaluation

    append_evaluation(
        run,
        {
            "step": step,
            "time": time.time(),
            "limit": options.limit,
            "num_fewshot": options.num_fewshot,
            "examples": sum(counts(results).values()),
            "metrics": metrics(results),
        },
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv))
