"""Sweeps over how a recipe runs: speeds are told apart, losses are one recipe's, and no execution is a further seed."""

import csv
import json

import numpy as np
import pytest

from experiments.sweep import report as sweep_page
from experiments.sweep.analysis.document import analyse
from experiments.sweep.analysis.executions import compare_executions
from experiments.sweep.analysis.outcome import Summary
from experiments.sweep.analysis.results import collect, read_results, write_tables
from experiments.sweep.analysis.summary import summarize
from experiments.sweep.definition import define
from experiments.sweep.figures.bars import execution_bars
from experiments.sweep.ledger import Ledger
from experiments.sweep.live import standing
from experiments.sweep.record import Sweep
from experiments.sweep.row import LedgerRow
from experiments.sweep.search.recorded import read_recorded
from experiments.sweep.space.overlay import apply
from experiments.sweep.trial import Trial
from experiments.sweep.worker import plan, work
from model import presets
from train import Recipe, TrainConfig

STEPS, TOKENS = 60, 128
TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32)
BASE = Trial(Recipe(TINY, TrainConfig(batch_size=4, seq_len=32), steps=STEPS))
RATES, REMATS = (1e-3, 4e-3, 8e-3), ("none", "dots", "full")
SPEEDS = {"none": 3000.0, "dots": 2500.0, "full": 2000.0}
BOTH = ("loss", "training_tokens_per_second")
ULP = 4e-7


def bowl(rate, seed):
    return 3 + 0.1 * np.log(rate / 4e-3) ** 2 + 0.003 * (-1, 1, 0, 0.5, -0.5)[seed]


def rows_of(points, seeds=2, loss=None, state="finished", objectives=BOTH, base=BASE):
    """Rows as a ledger has them. Executions change the loss by one unit in the last place."""
    found = []
    for point in points:
        for seed in range(seeds):
            trial = apply(base, point | {"seed": seed})
            remat = trial.execution.remat
            value = bowl(point.get("learning_rate", 4e-3), seed) + ULP * REMATS.index(remat)
            value = loss(point, seed) if loss else value
            now = state(point, seed) if callable(state) else state
            facts = {"run": f"runs/{trial.id}", "steps": STEPS, "tokens": STEPS * TOKENS, "flops_6nd": 1e9}
            facts |= {"flops_exact": 1e9, "seconds": 3.0, "compile_seconds": 0.5}
            facts |= {"training_tokens_per_second": SPEEDS[remat] + 10 * seed}
            known = facts | {"loss": value}
            values = tuple(known[name] for name in objectives) if now == "finished" else None
            rungs = {STEPS: value} if now == "finished" else {}
            found.append(LedgerRow(len(found), trial, now, rungs, values, {} if now == "planned" else facts))
    return found


def grid(rates=RATES, remats=REMATS):
    return [{"learning_rate": rate, "remat": remat} for rate in rates for remat in remats]


def strip(document):
    """What is said of losses, but the trials; numbers to the digits that rounding leaves."""
    kept = ("settings", "winner", "seed_noise", "noise_freedom", "optimum", "warnings", "importance", "axes")
    return json.loads(json.dumps({name: document[name] for name in kept}), parse_float=lambda x: round(float(x), 5))


def test_executions_are_no_seeds_and_no_settings(tmp_path):
    """All that is said of losses is what a sweep without the execution axis would have said."""
    alone = analyse(collect(tmp_path, rows_of([{"learning_rate": rate} for rate in RATES]))).to_dict()
    results = collect(tmp_path, rows_of(grid()), objectives=BOTH)
    document = analyse(results).to_dict()
    assert strip(document) == strip(alone)
    assert (list(results.axes), results.executions) == (["learning_rate"], {"remat": list(REMATS)})
    assert document["noise_freedom"] == 3, "three settings of two seeds; nine would make it 9"
    executions = document["executions"]
    assert executions["difference"] == pytest.approx(2 * ULP, rel=1e-3)
    assert (executions["verdict"], executions["recipes"], executions["compared"]) == ("rounding", 6, 6)
    assert [row["execution"]["remat"] for row in executions["executions"]] == list(REMATS)
    assert [row["ratio"] for row in executions["executions"]] == pytest.approx([1, 2505 / 3005, 2005 / 3005])
    assert len(document["trials"]) == 18
    said = document["sentence"]
    rounding = "The losses under 3 executions differ by at most 8e-07 nats, by rounding: they are indistinguishable."
    assert rounding in said
    assert "Training is fastest with remat=none: 3,005 ± 5 tokens/s, 1.5 times the slowest (remat=full)." in said
    assert said.endswith("The highest training_tokens_per_second, 3,005, is that of remat=none (3 settings).")


def test_rounding_decides_nothing_on_the_pareto_front(tmp_path):
    found = analyse(collect(tmp_path, rows_of(grid(), loss=None), objectives=BOTH)).to_dict()["pareto"]
    front = [row["setting"] for row in found["settings"] if row["place"] == "front"]
    assert front == [{"learning_rate": 4e-3, "remat": "none"}]
    by_rate = {}
    for row in found["settings"]:
        by_rate.setdefault(row["setting"]["learning_rate"], set()).add(row["values"][0])
    assert all(len(losses) == 1 for losses in by_rate.values()), "one loss for all executions of a recipe"


def test_the_summary_and_the_standing_obey_the_same_rule(tmp_path):
    rows = rows_of(grid())
    results = collect(tmp_path, rows)
    summary = summarize(results.axes, results.rows, results.executions)
    assert [row.seeds for row in summary.settings] == [2, 2, 2]
    assert summary.executions.verdict == "rounding"
    assert Summary.from_dict(summary.to_dict()) == summary
    best = standing(Sweep("sweep", BASE, "data"), rows).best
    assert (best.setting, best.settings, best.seeds) == ({"learning_rate": 4e-3}, 3, 2)
    fastest = standing(Sweep("sweep", BASE, "data", objectives=BOTH[::-1]), rows_of(grid(), objectives=BOTH[::-1]))
    assert fastest.best.setting["remat"] == "none"
    assert fastest.best.settings == 9


@pytest.mark.parametrize(
    ("shift", "seeds", "said", "warned"),
    [
        (0.0, 1, "The losses under 2 executions are equal to the last bit.", None),
        (3e-3, 1, "without a second seed it is not known whether seeds differ by more", None),
        (3e-3, 2, "no more than with other seeds: they are indistinguishable", None),
        (0.1, 1, "Training is fastest", "more than 1 % of the loss: rounding does not explain that"),
        (0.025, 5, "Training is fastest", "more than the seed noise: rounding does not explain that"),
    ],
)
def test_what_rounding_does_not_explain_is_a_warning(tmp_path, shift, seeds, said, warned):
    loss = lambda point, seed: bowl(4e-3, seed) + shift * (point["remat"] == "dots")
    document = analyse(collect(tmp_path, rows_of([{"remat": "none"}, {"remat": "dots"}], seeds, loss))).to_dict()
    assert said in document["sentence"]
    warnings = [text for text in document["warnings"] if "rounding" in text]
    assert len(warnings) == (warned is not None)
    assert warned is None or warned in warnings[0]
    assert ("indistinguishable" in document["sentence"]) == (warned is None and (shift, seeds) == (3e-3, 2))


def test_a_recipe_that_diverged_under_one_execution_is_lost(tmp_path):
    lost = lambda point, seed: "diverged" if point == {"learning_rate": 4e-3, "remat": "full"} else "finished"
    document = analyse(collect(tmp_path, rows_of(grid(), state=lost), objectives=BOTH)).to_dict()
    assert document["winner"]["setting"]["learning_rate"] != 4e-3
    assert {row["setting"]["learning_rate"] for row in document["pareto"]["settings"]} == {1e-3, 8e-3}
    assert any("2 recipes diverged under one execution and not under another" in text for text in document["warnings"])


def test_an_execution_that_failed_leaves_the_others_their_result(tmp_path):
    """As one that does not fit into memory; speeds are compared over what all others trained."""
    fails = lambda point, seed: "failed" if point["remat"] == "none" else "planned" if seed else "finished"
    document = analyse(collect(tmp_path, rows_of(grid(), state=fails))).to_dict()
    assert [(row["seeds"], row["pending"]) for row in document["settings"]] == [(1, 1)] * 3
    assert document["counts"]["failed"] == 6


def test_with_dropout_microbatches_are_part_of_the_recipe(tmp_path):
    base = BASE.replace(recipe=BASE.recipe.replace(train=BASE.recipe.train.replace(dropout=True)))
    points = [{"accumulate": count, "remat": remat} for count in (1, 2) for remat in ("none", "dots")]
    results = collect(tmp_path, rows_of(points, base=base))
    assert (list(results.axes), list(results.executions)) == (["accumulate"], ["remat"])
    assert len(analyse(results).summary.settings) == 2
    without = collect(tmp_path, rows_of(points))
    assert (list(without.axes), list(without.executions)) == ([], ["accumulate", "remat"])
    assert len({row["recipe"] for row in without.rows}) == 2, "one a seed"


def test_no_recipe_under_two_executions(tmp_path):
    """As where a sampler draws the execution: nothing is compared, and the speeds are no ratios."""
    points = [{"learning_rate": rate, "remat": remat} for rate, remat in zip(RATES, REMATS, strict=True)]
    document = analyse(collect(tmp_path, rows_of(points))).to_dict()
    assert document["executions"]["difference"] is None
    assert {row["ratio"] for row in document["executions"]["executions"]} == {None}
    assert "No recipe has finished under two executions" in document["sentence"]
    assert compare_executions([], []) is None
    assert analyse(collect(tmp_path, rows_of([{"learning_rate": rate} for rate in RATES]))).summary.executions is None


def test_the_page_and_the_tables(tmp_path, phone_figures, words):
    results = collect(tmp_path, rows_of(grid()), objectives=BOTH)
    analysis = analyse(results)
    sweep_page.write_sweep_page(tmp_path / "report.html", results, analysis)
    said = words((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "Speed of each execution" in said
    assert "8.00 × 10−7 nats" in said
    (axes,) = execution_bars(analysis.summary.executions).axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["remat=full", "remat=dots", "remat=none"]
    write_tables(results)
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["remat"] for row in rows[::2]] == list(REMATS) * 3
    assert len({row["loss"] for row in rows}) == 18, "every trial keeps its own"
    recorded = read_recorded(tmp_path / "results.csv")
    assert list(recorded.axes) == ["learning_rate"]
    assert {len(losses) for losses in recorded.losses.values()} == {2}


@pytest.mark.slow
def test_a_sweep_over_executions_measures_speed_and_tells_no_losses_apart(data, tmp_path, isoflop):
    sweep = define(
        TINY.replace(rope_base=9_300.0),
        data=data,
        folder=tmp_path / "sweep",
        batch_size=4,
        seq_len=32,
        evaluate_tokens=256,
        axes=("accumulate=1,2",),
        steps=4,
        objectives=BOTH,
    )
    sweep.write()
    ledger = Ledger(sweep)
    plan(sweep, ledger)
    work(sweep, ledger)
    rows = ledger.rows()
    assert [row.state for row in rows] == ["finished"] * 2
    assert len({row.trial.id for row in rows}) == len({row.facts["run"] for row in rows}) == 2
    assert all((sweep.folder / row.facts["run"] / "run.json").exists() for row in rows)
    assert all(row.values[1] == row.facts["training_tokens_per_second"] > 0 for row in rows)
    assert not (sweep.folder / "speed").exists(), "the benchmark of decoding was not run"
    losses = [row.values[0] for row in rows]
    np.testing.assert_allclose(losses, losses[0], rtol=1e-6)
    assert len({row["recipe"] for row in read_results(sweep.folder).rows}) == 1
    code, said, err = isoflop("sweep", "report", sweep.folder, "--json", tmp_path / "report.json")
    assert code == 0, err
    document = json.loads((tmp_path / "report.json").read_text())
    executions = document["executions"]
    assert executions["axes"] == {"accumulate": [1, 2]}
    assert (executions["compared"], executions["verdict"], len(executions["executions"])) == (1, "rounding", 2)
    assert len(document["settings"]) == 1
    assert len(document["pareto"]["settings"]) == 2
    assert "under 2 executions" in " ".join(said.split())
    assert "Training is fastest with accumulate=" in " ".join(said.split())
