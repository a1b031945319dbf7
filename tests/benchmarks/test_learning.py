"""The search of `benchmarks/learning.py` for a learning rate, and its table."""

import dataclasses
import json
import math
import sys
from pathlib import Path

import pytest
import runs

from lomo_jax.training import loop

sys.path.append(str(Path(__file__).parents[2] / "benchmarks"))

import learning
from learning import Experiment, Method

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 3e-3, 1e-2]


def _run(split, rate, seed, loss):
    return {
        **{"method": "A", "split": split, "rate": rate, "seed": seed, "tokens": 512},
        "curve": [{"step": n, "loss": x, "accuracy": 0.5} for n, x in enumerate((5.0, loss))],
        "diverged": math.isinf(loss),
        **{"seconds": 10, "planned_gib": 1.5},
    }


def _all_runs(loss_of, start, **method):
    experiment = Experiment("", print, {}, {"A": Method(start, **method)})
    found = []
    while (run := learning.next_run(found, "A", experiment)) is not None:
        found.append(_run(*run, loss_of(run[1]) + 0.1 * run[2]))
    return experiment, found


@pytest.mark.parametrize("best", RATES[1:-1])
@pytest.mark.parametrize("start", RATES)
def test_the_best_rate_has_a_worse_one_on_each_side(best, start):
    _, found = _all_runs(lambda rate: abs(math.log(rate / best)), start)
    searched = [run["rate"] for run in found if run["split"] == "validation"]
    place = RATES.index(best)
    assert {*RATES[place - 1 : place + 2]} <= {*searched}
    assert len(searched) == len({*searched}) <= abs(place - RATES.index(start)) + 4
    tested = [(run["rate"], run["seed"]) for run in found if run["split"] == "test"]
    assert tested == [(best, 0), (best, 1), (best, 2)]


def test_rates_that_diverge_are_left_downwards():
    _, found = _all_runs(lambda rate: 1 - rate if rate < 1e-3 else math.inf, start=1e-1)
    assert {run["rate"] for run in found if run["split"] == "test"} == {3e-4}


@pytest.mark.parametrize(("loss", "next_rate"), [(4.0, 3e-3), (6.0, 3e-4)])
def test_a_rate_at_which_the_loss_rose_is_left_downwards(loss, next_rate):
    experiment = Experiment("", print, {}, {"A": Method(1e-3)})
    found = [_run("validation", 1e-3, 0, loss)]
    assert learning.next_run(found, "A", experiment) == ("validation", next_rate, 0)


def test_results_without_a_test_run_have_a_picture(tmp_path):
    experiment = Experiment("", print, {}, {"A": Method(1e-3)})
    learning.plot([_run("validation", 1e-3, 0, 4.0)], experiment, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_the_table_has_mean_and_half_the_range():
    experiment, found = _all_runs(lambda rate: 2 + abs(math.log(rate / 1e-3)), 1e-3)
    row = learning.table(found, experiment)[-1]
    assert row == "| A | 0.001 | 2.1000 ± 0.1000 | 50.0% | 512 | 10 | 1.50 |"


def test_a_repeated_method_is_compared_with_the_same_seeds(tmp_path):
    experiment, found = _all_runs(lambda rate: 2 + abs(math.log(rate / 1e-3)), 1e-3)
    experiment.methods["B"] = Method("A")
    assert learning.next_run(found, "B", experiment) == ("test", 1e-3, 0)
    found.append({**_run("test", 1e-3, 1, 2.1 * 1.01), "method": "B"})  # of A 2.1
    row = learning.table(found, experiment)[-1]
    assert row == "| B | 0.001 | 2.1210 (+1.00%) | 50.0% | 512 | 10 | 1.50 |"
    learning.plot(found, experiment, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 0


def test_wins_are_the_share_of_answers_that_became_likelier():
    methods = {"A": Method(1e-3), "B": Method(1e-3)}
    experiment = Experiment("", print, {}, methods, has_answers=True)
    gains = {
        "A": {0: [1.0, 2.0, 3.0, -1.0], 1: [1.0, 1.0, -1.0, -1.0]},
        "B": {0: [2.0, 1.0, 2.0, 3.0]},  # likelier than with A: the first and the last
    }
    found = [
        {**_run("test", 1e-3, seed, 2.0), "method": method, "gains": gains[method][seed]}
        for method in gains
        for seed in gains[method]
    ]
    a, b = learning.table(found, experiment)[-2:]
    assert a == "| A | 0.001 | 2.0000 ± 0.0000 | 50.0% | 62.5% |  | 512 | 10 | 1.50 |"
    assert b == "| B | 0.001 | 2.0000 | 50.0% | 100.0% | 50.0% | 512 | 10 | 1.50 |"


@pytest.mark.usefixtures("standard_promotion")
def test_answers_are_as_likely_as_the_run_says(tmp_path):
    lines = [json.dumps({"prompt": "a" * n, "completion": "b" * (20 - n)}) for n in range(1, 16)]
    path = tmp_path / "answers.jsonl"
    path.write_text("\n".join(lines))
    config = runs.make_config(path, tmp_path / "run")
    data = dataclasses.replace(config.data, validation_path=str(path))
    config = dataclasses.replace(config, data=data, steps=5, sequence_length=64)
    loop.train(config)
    found = learning._log_likelihoods(config.workdir, path, 64)
    tokens = sum(21 - n for n in range(1, 16))  # the end of the text too
    assert len(found) == 15
    loss = runs.column(tmp_path / "run", "eval_loss")[5]
    assert -sum(found) / tokens == pytest.approx(loss, rel=1e-5)
