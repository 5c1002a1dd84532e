"""The sweep's page on recorded sweeps with a known surface: it says what is there, what is not, and fetches nothing."""

import csv
import functools
import itertools
import json
import re
import tomllib

import numpy as np
import pytest

from experiments.scaling.study.design import Law
from experiments.sweep import report as sweep_page
from experiments.sweep.analysis import document as analysis
from experiments.sweep.analysis.document import analyse
from experiments.sweep.analysis.importance import importances
from experiments.sweep.analysis.results import collect, write_tables
from experiments.sweep.row import LedgerRow
from experiments.sweep.search.recorded import read_recorded
from experiments.sweep.space.overlay import apply
from experiments.sweep.trial import Trial
from model import presets
from train import Recipe, TrainConfig

STEPS = 60
BASE = Trial(Recipe(presets.get("tiny"), TrainConfig(batch_size=4, seq_len=32), steps=STEPS))
RATES = [1e-3, 2e-3, 4e-3, 8e-3, 16e-3]
GRID = {"learning_rate": RATES, "weight_decay": [0.0, 0.01, 0.1], "warmup_fraction": [0.02, 0.1]}
TOKENS = 128


def product(axes):
    return [dict(zip(axes, values, strict=True)) for values in itertools.product(*axes.values())]


def surface(point, best=4e-3):
    """Known: a parabola in log learning rate, a slope in weight decay, nothing in the warm-up."""
    rate = point.get("learning_rate", best)
    width = point.get("d_model", 32)
    return 3 + 0.1 * np.log(rate / best) ** 2 + 0.3 * point.get("weight_decay", 0.0) - 0.05 * np.log2(width / 32)


def record(folder, points, *, seeds=3, noise=0.004, loss=surface, fate=None, curves=True, seed=0, **about):
    """The results of a sweep as a ledger would have them, with the runs' metrics beside them.

    fate: point, seed → a state, and the last loss or None; otherwise every trial has finished.
    """
    rng, rows = np.random.default_rng(seed), []
    about = {"objectives": ("loss",)} | about
    for point, number in itertools.product(points, range(seeds)):
        point = point | {"seed": number}
        trial = apply(BASE, point)
        final = float(loss(point) + noise * rng.standard_normal())
        state = fate(point) if fate else "finished"
        done = {"finished": STEPS, "pruned": 20, "diverged": 14, "running": 20}.get(state, 0)
        rungs = {step: final + 8 / step for step in (20, STEPS) if step < done or step == done != STEPS}
        rungs |= {STEPS: final} if state == "finished" else {}
        rungs = {} if state == "diverged" else rungs
        run = f"runs/{trial.id}"
        per_token = 6e3 * trial.recipe.model.d_model**2
        facts = {"run": run, "steps": done, "tokens": done * TOKENS, "flops_6nd": done * TOKENS * per_token}
        facts |= {"flops_exact": 1.1 * facts["flops_6nd"], "seconds": 3.0, "compile_seconds": 0.5, "worker": "w"}
        facts |= {"claimed_at": 10.0 * len(rows), "ended_at": 10.0 * len(rows) + 4}
        values = None
        if state == "finished":
            fast = 4000 / trial.recipe.model.d_model
            right = (
                1 - (surface(point) + noise * rng.standard_normal()) / 10 if "accuracy" in about["objectives"] else 0
            )
            known = {"loss": final, "tokens_per_second": fast, "accuracy": right}
            values = tuple(known[name] for name in about["objectives"])
        rows.append(LedgerRow(len(rows), trial, state, rungs, values, facts if done else {}))
        if curves and done:
            write_metrics(folder / run, done, final, per_token, diverged=state == "diverged", rng=rng)
    return collect(folder, rows, **about)


def write_metrics(run, steps, final, per_token, *, diverged, rng):
    run.mkdir(parents=True, exist_ok=True)
    lines = []
    for step in range(1, steps + 1):
        value = final + 5 / step**0.8 - 5 / STEPS**0.8 + 0.02 * rng.standard_normal()
        value = None if diverged and step == steps else value
        tokens = TOKENS * step
        lines.append({"step": step, "tokens": tokens, "flops_6nd": tokens * per_token, "loss": value})
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def page(results):
    path = results.folder / "report.html"
    sweep_page.write_sweep_page(path, results, analyse(results))
    return path.read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def few_draws(monkeypatch):
    """The intervals of importances are test_sweep_summary's."""
    monkeypatch.setattr(analysis, "importances", functools.partial(importances, draws=2))


@pytest.mark.slow
def test_the_page_of_a_whole_sweep(tmp_path, words):
    text = page(record(tmp_path, product(GRID)))
    said = words(text)
    assert "learning_rate=0.004, weight_decay=0" in said
    assert "cannot be distinguished from it" in said, "the warm-up changes nothing"
    assert text.count("<figure") == 5
    assert len(text) < 3e6
    assert "Still running" not in said
    assert not re.findall(r"(?:src|href)=\"(?!#|data:)", text)
    assert "@import" not in text
    assert text.count("<script>") == 1


def test_a_page_is_ranked_by_what_compares(tmp_path, no_svg, words):
    """The smallest beta has the lowest losses, and no more than the others' accuracy."""
    points = product({"beta": [0.1, 0.3], "learning_rate": RATES})
    options = {"seeds": 2, "loss": lambda point: surface(point) * point["beta"], "policy": "halving"}
    options["fate"] = lambda point: "pruned" if point["learning_rate"] == RATES[0] else "finished"
    results = record(tmp_path, points, objectives=("accuracy", "loss"), **options)
    document = analyse(results).to_dict()
    assert document["ranked_by"] == "accuracy"
    assert document["winner"]["setting"]["learning_rate"] == 4e-3
    assert 0.69 < document["winner"]["mean"] < 0.71
    assert 1e-4 < document["seed_noise"] < 1e-3
    assert len(document["winner"]["indistinguishable"]) >= 1, "the other beta is as good"
    assert "Losses at different beta are different functions: settings are ranked by accuracy." in document["sentence"]
    assert {row["stopped"]["verdict"] for row in document["settings"] if row["pruned"]} == {"not compared"}
    assert any("4 runs ended early by a comparison of losses" in line for line in document["warnings"])
    said = words(page(results))
    for part in ("best mean accuracy", "Accuracy against each axis", "mean accuracy", "dark is a high mean accuracy"):
        assert part in said
    assert "mean loss" not in said.replace("mean losses", "")


def test_losses_have_the_unit_of_their_objective(tmp_path, no_svg, words):
    trials = [{"objective": "masked", "stack": "encoder", "mask_rate": rate} for rate in (0.15, 0.3)]
    results = record(tmp_path, trials, seeds=2)
    document = analyse(results).to_dict()
    assert f"{document['winner']['mean']:.4f} nats per predicted token" in document["sentence"]
    said = words(page(results))
    assert "only validation losses compare" in said
    assert "nats per token" not in said
    plain = record(tmp_path / "both", [*trials, {"learning_rate": 1e-3}], seeds=1, curves=False)
    assert plain.unit == "nats"


@pytest.mark.slow
def test_the_optimum_of_the_rate_at_each_width(tmp_path, no_svg, words):
    points = product({"d_model": [32, 64, 128], "learning_rate": RATES})
    moving = lambda point: surface(point, best=4e-3 * 32 / point["d_model"] * 2)
    results = record(tmp_path, points, loss=moving, objectives=("loss", "tokens_per_second"))
    document = analyse(results).to_dict()
    transfer = document["transfer"]
    for row, best in zip(transfer["sizes"][:2], (8e-3, 4e-3), strict=False):
        low, high = row["optimum"]["interval_95"]
        assert low < best < high < 1.2 * low
    low, high = transfer["interval_95"]
    assert low < 0.5 < high, "the optimum halves from one width to the double"
    costs = document["equal_flops"]
    assert costs["ratio"] == pytest.approx(16)
    assert costs["settings"][0]["setting"]["d_model"] == 32, "the wide ones had few steps for the same FLOPs"
    assert {row["place"] for row in document["pareto"]["settings"]} == {"front", "behind"}
    said = words(page(results))
    assert "Does the learning rate transfer?" in said
    line = re.search(r"learning_rate = \{.*?\}\}", said)[0]
    law = Law(**tomllib.loads(line)["learning_rate"])
    assert law.at({"d_model": 64}) == pytest.approx(4e-3, rel=0.1), "a study takes the line as it is"
    assert "Pareto front" in said
    assert "times the FLOPs of the cheapest" in said


def test_no_law_where_every_optimum_lies_at_the_edge(tmp_path, no_svg, words):
    points = product({"d_model": [32, 64], "learning_rate": RATES})
    results = record(tmp_path, points, loss=lambda point: surface(point, best=1.0))
    assert analyse(results).transfer.factor_per_doubling is None
    assert "No law of the optimum: 0 different sizes cannot determine a power law" in words(page(results))


def test_a_sweep_that_is_still_running(tmp_path, no_svg, words):
    states = {1e-3: "pruned", 2e-3: "running", 4e-3: "finished", 8e-3: "finished", 16e-3: "planned"}
    points = product({"learning_rate": RATES})
    results = record(tmp_path, points, fate=lambda point: states[point["learning_rate"]], policy="halving")
    document = analyse(results).to_dict()
    by_rate = {row["learning_rate"]: row for row in document["settings"]}
    assert by_rate[1e-3]["mean"] is None, "a pruned trial enters no mean"
    assert (by_rate[1e-3]["pruned"], by_rate[2e-3]["pending"]) == (3, 3)
    assert document["halving"]["share"] == pytest.approx((3 * 20 + 3 * 20 + 6 * STEPS) / (15 * STEPS))
    said = words(page(results))
    assert "Still running. 6 of 15 trials" in said
    assert "3 of 15 trials were pruned" in said


def test_nothing_but_divergence(tmp_path, no_svg, words):
    results = record(tmp_path, product({"learning_rate": RATES}), fate=lambda point: "diverged")
    said = words(page(results))
    assert "There is no winner: every setting lost a run to divergence." in said
    assert "those that ended have diverged" in said


@pytest.mark.parametrize(
    "points",
    [
        product({"optimizer": ["adamw", "lion"]}),
        [{"schedule": "wsd", "decay_fraction": f} for f in (0.1, 0.2)] + [{"schedule": "cosine"}],
        [{}],
    ],
    ids=["names", "conditional", "nothing"],
)
def test_axes_of_any_kind(tmp_path, no_svg, points, words):
    results = record(tmp_path, points, seeds=1, curves=False)
    said = words(page(results))
    assert "reaches" in said
    assert "One seed per setting" in said


def test_what_follows_an_axis_is_no_axis(tmp_path):
    points = [{"d_model": width, "num_heads": width // 16} for width in (32, 64, 128)]
    results = record(tmp_path, points, curves=False)
    assert list(results.axes) == ["d_model"]
    assert results.followers == {"num_heads": "d_model"}


def test_tables_say_the_same(tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    results = record(tmp_path, product({"learning_rate": RATES[:2]}), curves=False)
    assert write_tables(results).no_parquet is None
    with open(tmp_path / "results.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = parquet.read_table(tmp_path / "results.parquet").to_pylist()
    assert [float(row["loss"]) for row in rows] == [row["loss"] for row in table] == [r["loss"] for r in results.rows]
    assert [row["id"] for row in rows] == [row["id"] for row in table]
    assert read_recorded(tmp_path / "results.csv").axes == results.axes, "what a run took is no axis"


def test_no_sweep_there(tmp_path, isoflop):
    code, _, said = isoflop("sweep", "report", tmp_path)
    assert code == 2
    assert "no sweep" in said
