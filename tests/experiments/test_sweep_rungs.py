"""Sweeps that stop trials: what is said of a setting is true of what was trained, at equal tokens."""

import dataclasses
import json

import numpy as np
import pytest

from experiments.sweep import report as sweep_page
from experiments.sweep.analysis.document import analyse
from experiments.sweep.analysis.importance import importances
from experiments.sweep.analysis.outcome import Summary
from experiments.sweep.analysis.results import collect
from experiments.sweep.analysis.sentence import sentence
from experiments.sweep.analysis.summary import summarize
from experiments.sweep.live import standing, table
from experiments.sweep.record import Sweep
from experiments.sweep.row import LedgerRow
from experiments.sweep.space.overlay import apply
from experiments.sweep.trial import Trial
from model import presets
from train import Recipe, TrainConfig

STEPS = 60
BASE = Trial(Recipe(presets.get("tiny"), TrainConfig(batch_size=2, seq_len=32), steps=STEPS))
PER_STEP = 64


def row(number, point, state, rungs, parent=None, seed=0, objectives=("loss",), speed=None):
    """One trial as a ledger has it; its last rung is where it stands."""
    point = point | {"seed": seed}
    trial = apply(BASE, point).replace(parent=parent)
    steps = max(rungs, default=0)
    facts = {"run": f"runs/{trial.id}", "steps": steps, "tokens": steps * trial.recipe.train.tokens_per_step}
    values = None
    if state == "finished":
        values = tuple({"loss": rungs[steps], "tokens_per_second": speed}[name] for name in objectives)
    return LedgerRow(number, trial, state, rungs, values, facts if rungs else {})


def rows_of(described, **about):
    """described: (point, state, losses of each seed by updates)."""
    found = []
    for point, state, *seeds in described:
        for seed, rungs in enumerate(seeds):
            found.append(row(len(found), point, state, rungs, seed=seed, **about))
    return found


def halved():
    """Four of five rates are stopped; two seeds each, 0.02 apart but at 3e-2, which is at the winner's heels."""
    both = lambda rungs: (rungs, {step: loss + 0.02 for step, loss in rungs.items()})
    return [
        ({"learning_rate": 1e-3}, "pruned", *both({7: 7.4})),
        ({"learning_rate": 1e-2}, "pruned", *both({7: 6.9})),
        ({"learning_rate": 3e-2}, "pruned", *both({7: 6.52, 20: 6.301})),
        ({"learning_rate": 1e-1}, "finished", *both({7: 6.5, 20: 6.3, 60: 6.0})),
        ({"learning_rate": 3e-1}, "pruned", *both({7: 7.0})),
    ]


def population():
    """A child takes over the best run and changes its rate; a member of the same rate is stopped later on."""
    first = row(0, {"learning_rate": 0.1}, "pruned", {20: 6.5, 40: 6.3})
    worst = row(1, {"learning_rate": 0.001}, "pruned", {20: 7.4})
    child = row(2, {"learning_rate": 0.08}, "finished", {40: 6.2, 60: 6.0}, (first.trial.id, 20), seed=7)
    same = row(3, {"learning_rate": 0.08}, "pruned", {40: 6.4}, (first.trial.id, 20), seed=8)
    late = row(4, {"learning_rate": 0.064}, "finished", {60: 6.1}, (child.trial.id, 40), seed=9)
    return [first, worst, child, same, late]


def test_stopped_settings_are_compared_where_they_were_stopped(tmp_path):
    document = analyse(collect(tmp_path, rows_of(halved()), policy="halving")).to_dict()
    assert document["sentence"] == (
        "learning_rate=0.1 reaches 6.0100 nats per token (95 % interval "
        f"{document['winner']['interval_95'][0]:.4f} … {document['winner']['interval_95'][1]:.4f}), the only one of 5 "
        "settings that was trained to the end. 4 other settings were stopped early (3 after 7, 1 after 20 updates) and "
        "compared with it at equal tokens alone: 3 worse by more than the seed noise, 1 within the seed noise of it."
    )
    by_rate = {setting["learning_rate"]: setting["stopped"] for setting in document["settings"]}
    assert by_rate[1e-1] is None
    assert by_rate[1e-3] == pytest.approx(
        {"steps": 7, "tokens": 448, "mean": 7.41, "seeds": 2, "winner_mean": 6.51, "verdict": "worse"}
    )
    assert by_rate[3e-2]["verdict"] == "equal"
    assert by_rate[3e-2]["winner_mean"] == pytest.approx(6.31), "the winner's loss after the same tokens, not its last"
    assert any("1 setting was stopped early" in warning for warning in document["warnings"])
    rungs = document["halving"]["rungs"]
    assert [(rung["steps"], rung["tokens"], len(rung["settings"]), rung["pruned"]) for rung in rungs] == [
        (7, 448, 5, 6),
        (20, 1280, 2, 2),
        (60, 3840, 1, 0),
    ]
    assert rungs[0]["noise"] == pytest.approx(0.02 / np.sqrt(2))


def test_with_one_seed_only_the_higher_loss_is_known(tmp_path):
    once = [described[:3] for described in halved()]
    document = analyse(collect(tmp_path, rows_of(once), policy="halving")).to_dict()
    assert "with one seed each it is not known how sure that is" in document["sentence"]
    assert "alone: 4 at a higher loss." in document["sentence"]
    assert "worse" not in document["sentence"]


def test_a_setting_of_another_bracket_was_never_compared(tmp_path):
    """Hyperband: the winner was first measured after 20 updates, two others were stopped after 7."""
    described = halved()
    described[3] = ({"learning_rate": 1e-1}, "finished", {20: 6.3, 60: 6.0}, {20: 6.32, 60: 6.02})
    document = analyse(collect(tmp_path, rows_of(described), policy="hyperband")).to_dict()
    assert "1 within the seed noise of it, 3 where it has no loss to compare." in document["sentence"]
    assert "3 settings were stopped where the winner has no loss, and never compared with it" in document["warnings"]
    assert [rung["first"] for rung in document["halving"]["rungs"]] == [8, 2, 0]


def test_the_interval_allows_for_those_that_were_stopped(tmp_path):
    """The winner of five is too low by more than one that was alone."""
    alone = [described for described in halved() if described[1] == "finished"]
    intervals = [
        analyse(collect(tmp_path, rows_of(some), policy="halving")).summary.winner.interval_95
        for some in (alone, halved())
    ]
    assert intervals[0][0] == intervals[1][0]
    assert intervals[0][1] < intervals[1][1]


def test_every_setting_is_counted_once():
    described = [
        ({"learning_rate": 1e-3}, "finished", {60: 6.5}, {60: 6.51}),
        ({"learning_rate": 1e-2}, "finished", {60: 6.0}, {60: 6.01}),
        ({"learning_rate": 1e-1}, "diverged", {20: 6.0}, {}),
        ({"learning_rate": 2e-1}, "failed", {}, {}),
        ({"learning_rate": 3e-1}, "running", {}, {}),
        ({"learning_rate": 4e-1}, "planned", {}, {}),
    ]
    results = collect("sweep", rows_of(described))
    summary = summarize(results.axes, results.rows)
    assert sentence(summary).endswith(
        "the lowest of 2 settings that were trained to the end; every other of them is worse by more than the seed "
        "noise. 1 setting lost a run to divergence. 1 setting failed and has no result. 2 settings have not finished."
    )


def test_an_edge_is_that_of_the_results():
    """0.01 is the highest rate with a result: a higher one failed. Divergence beyond is a result."""
    described = [
        ({"learning_rate": rate}, "finished", {60: loss}) for rate, loss in ((1e-3, 7.0), (3e-3, 6.5), (1e-2, 6))
    ]
    for state, warned in (("failed", True), ("planned", True), ("diverged", False)):
        rows = rows_of([*described, ({"learning_rate": 3e-2}, state, {})])
        results = collect("sweep", rows)
        warnings = summarize(results.axes, results.rows).warnings
        said = "the best learning_rate=0.01 is the highest that has a result, 0.03 none: the optimum may be beyond it"
        assert (said in warnings) == warned


def test_members_of_a_population_are_not_the_settings_that_they_end_with(tmp_path):
    document = analyse(collect(tmp_path, population(), policy="population")).to_dict()
    winner = document["winner"]
    assert winner["mean"] == 6.0, "that another member with the same rate was replaced is nothing to this one"
    assert winner["lineage"] == [
        {"steps": 20, "setting": {"learning_rate": 0.1}},
        {"steps": 60, "setting": {"learning_rate": 0.08}},
    ]
    assert (
        "learning_rate was 0.1 up to update 20, then 0.08 up to update 60. 3 members were replaced"
        in (document["sentence"])
    )
    assert document["optimum"] is None
    assert "changed along it" in document["optimum_refused"]
    assert not any("grid" in warning for warning in document["warnings"])
    own = 40 + 20 + 40 + 20 + 20  # updates that each made itself
    assert document["cost"]["tokens"] == document["halving"]["tokens_spent"] == own * PER_STEP


@pytest.mark.parametrize("policy", ["halving", "population"])
def test_a_summary_is_what_its_document_says(policy):
    """A study's page reads the document: stopped settings and a winner's lineage come back from JSON."""
    rows = rows_of(halved()) if policy == "halving" else population()
    results = collect("sweep", rows, policy=policy)
    summary = dataclasses.replace(summarize(results.axes, results.rows), trials=[])
    document = json.loads(json.dumps(summary.to_dict()))
    assert Summary.from_dict(document) == summary
    for setting in document["settings"]:
        del setting["member"], setting["stopped"]
    former = Summary.from_dict({name: part for name, part in document.items() if name != "executions"})
    assert [setting.mean for setting in former.settings] == [setting.mean for setting in summary.settings]


def test_what_a_population_has_done_is_counted_once():
    sweep = Sweep("sweep", BASE, "data", policy="population")
    document = standing(sweep, population())
    assert document.tokens_done == document.tokens_expected == 140 * PER_STEP
    assert document.best.mean == 6.0
    assert document.best.from_steps == 20


def test_rungs_are_of_equal_tokens_not_of_equal_steps(tmp_path):
    """15 updates of 2 rows and 8 of 4 are a rung: 960 and 1,024 tokens, half a step of each apart."""
    described = [
        ({"batch_size": 2}, "finished", {15: 6.5, 60: 6.0}),
        ({"batch_size": 4, "steps": 30}, "pruned", {8: 6.6}),
    ]
    document = analyse(collect(tmp_path, rows_of(described), policy="halving")).to_dict()
    first = document["halving"]["rungs"][0]
    assert (first["tokens"], first["steps"], first["trials"]) == (960, [8, 15], 2)
    stopped = next(setting["stopped"] for setting in document["settings"] if setting["batch_size"] == 4)
    assert (stopped["steps"], stopped["mean"], stopped["winner_mean"], stopped["verdict"]) == (8, 6.6, 6.5, "higher")


def test_status_leaves_out_what_the_report_leaves_out():
    described = [
        ({"learning_rate": 1e-2}, "finished", {60: 6.0}, {60: 6.2}),
        ({"learning_rate": 1e-1}, "finished", {60: 5.0}),
    ]
    rows = rows_of(described)
    lost = row(3, {"learning_rate": 1e-1}, "diverged", {}, seed=1)
    document = standing(Sweep("sweep", BASE, "data"), [*rows, lost])
    assert document.best.setting == {"learning_rate": 1e-2}
    said = str(table(document).renderables[-1])
    assert said == (
        "best so far (lowest loss): learning_rate=0.01: 6.1000 ± 0.1414 over 2 seeds; "
        "trained to the end: 1 of 2 settings"
    )


def test_every_objective_has_its_best(tmp_path):
    names = ("loss", "tokens_per_second")
    rows = [
        row(0, {"num_layers": 1}, "finished", {60: 6.1}, objectives=names, speed=4000.0),
        row(1, {"num_layers": 2}, "finished", {60: 6.0}, objectives=names, speed=2000.0),
    ]
    said = analyse(collect(tmp_path, rows, objectives=names)).sentence
    assert said.startswith("num_layers=2 reaches 6.0000 nats per token, the lowest of 2 settings")
    assert said.endswith("The highest tokens_per_second, 4,000, is that of num_layers=1.")


def test_importances_that_the_data_do_not_tell_are_refused():
    rng = np.random.default_rng(3)
    draw = lambda: {"x1": float(rng.uniform(-1, 1)), "x2": float(rng.uniform(-1, 1)), "state": "finished"}
    noise = [draw() | {"loss": 3 + float(rng.standard_normal())} for _ in range(10)]
    refused = importances(["x1", "x2"], noise).ped_anova
    assert refused.startswith("10 settings do not tell: the share of x")
    assert "more settings would narrow that" in refused
    clear = [drawn | {"loss": 3 + drawn["x1"] ** 2} for drawn in (draw() for _ in range(60))]
    assert importances(["x1", "x2"], clear).ped_anova["x1"].share > 0.7


@pytest.mark.parametrize("policy", ["halving", "population"])
def test_the_page_promises_what_it_shows(tmp_path, no_svg, words, policy):
    rows = rows_of(halved()) if policy == "halving" else population()
    results = collect(tmp_path, rows, policy=policy)
    sweep_page.write_sweep_page(tmp_path / "report.html", results, analyse(results))
    said = words((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert "lowest of 1" not in said
    assert "every other setting is worse" not in said
    if policy == "halving":
        assert "Hollow: mean losses after fewer updates" in said
        assert "7 updates" in said
        assert "within the noise" in said
    else:
        assert "whose members copy the better ones" in said
        assert "19 seeds" not in said
        assert "replaced after 40 updates, at 6.4000" in said


@pytest.mark.parametrize("policy", ["halving", "all"])
def test_text_of_every_figure_can_be_read_on_a_phone(tmp_path, phone_figures, policy):
    points = [{"learning_rate": rate, "weight_decay": decay} for rate in (1e-3, 1e-2, 1e-1) for decay in (0.0, 0.1)]
    described = [(point, "finished", {20: 7.0 - i / 9, 60: 6.5 - i / 9}) for i, point in enumerate(points)]
    if policy == "halving":
        described[:4] = [(point, "pruned", {20: rungs[20]}) for point, _, rungs in described[:4]]
    results = collect(tmp_path, rows_of(described), policy=policy)
    sweep_page.write_sweep_page(tmp_path / "report.html", results, analyse(results))
    assert len(phone_figures) == 4, "two axes, all axes together, and a map of their pair"


def test_the_losses_of_the_figure_are_all_inside_its_frame(tmp_path):
    """What was stopped is drawn at its rung, as the caption says; before, only the winner's dot was there."""
    from experiments.sweep.figures.panels import axis_panels

    analysis = analyse(collect(tmp_path, rows_of(halved()), policy="halving"))
    (figure,) = axis_panels(analysis.summary, analysis.rungs)
    axes = figure.axes[0]
    low, high = axes.get_ylim()
    drawn = {round(float(y), 3) for line in axes.lines for y in line.get_ydata() if np.isfinite(y)}
    for rung in analysis.rungs:
        for setting in rung.settings:
            assert round(setting.mean, 3) in drawn
            assert low < setting.mean < high


def test_a_branch_is_no_member(tmp_path):
    """A branch of a trunk at a constant rate is the run that would have been trained from the start."""
    trunk = row(0, {"learning_rate": 0.1}, "finished", {60: 6.1})
    branch = row(1, {"learning_rate": 0.1, "decay_fraction": 0.2}, "finished", {60: 6.0}, (trunk.trial.id, 20))
    results = collect(tmp_path, [trunk, branch])
    assert [row["member"] for row in results.rows] == [None, None]
    assert analyse(results).cost.tokens == (60 + 40) * PER_STEP
