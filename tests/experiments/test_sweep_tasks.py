"""A metric of a task as an objective of a sweep: measured with the loss, compared with its noise, never run twice."""

import functools
import json

import numpy as np
import pytest

from experiments.sweep.analysis.document import analyse
from experiments.sweep.analysis.results import read_results, write_tables
from experiments.sweep.analysis.tasks import compare_by_task
from experiments.sweep.definition import define
from experiments.sweep.ledger import Ledger
from experiments.sweep.objectives import direction
from experiments.sweep.record import Sweep
from experiments.sweep.report import write_sweep_page
from experiments.sweep.run import run_sweep
from model import presets
from model.errors import InputError, UnknownNameError
from train.lanes.build import compiled_scorers
from train.run.metrics import read_metrics
from train.task_sets import ERROR, answers_path

CONFIG = presets.get("tiny").replace(num_layers=1, max_seq_len=64, rope_base=9_200.0)
OBJECTIVES = ("loss", "minimal_pairs/bits_per_byte", "minimal_pairs/acc")


@pytest.fixture
def make(data, tmp_path):
    given = {
        "data": data,
        "folder": tmp_path / "sweep",
        "axes": ("learning_rate=1e-3,1e-2",),
        "steps": 4,
        "batch_size": 4,
        "seq_len": 32,
        "evaluate_tokens": 256,
        "evaluate_task_items": 24,
        "objectives": OBJECTIVES,
    }
    return lambda **changes: define(CONFIG, **given | changes)


def test_a_task_is_an_objective(make, words, tmp_path):
    before = compiled_scorers()
    sweep = make()
    rows = run_sweep(sweep)
    assert compiled_scorers() == before + 1
    for row in rows:
        last = read_metrics(sweep.folder / row.facts["run"])[-1]
        assert list(row.values) == [last["validation_loss"], *(last[name] for name in OBJECTIVES[1:])]
    more = make(seeds=2)
    assert [row.values for row in run_sweep(more)[:2]] == [row.values for row in rows]
    assert len(Ledger(Sweep.read(sweep.folder)).rows()) == 4
    results = read_results(sweep.folder)
    assert all(0 < row[f"{name}{ERROR}"] < 1 for row in results.rows for name in OBJECTIVES[1:])
    analysis = analyse(results)
    assert [task.objective for task in analysis.tasks] == list(OBJECTIVES[1:])
    for task, sign in zip(analysis.tasks, (1, -1), strict=True):
        assert (task.questions, task.candidates, task.seeds, task.noise_freedom) == (24, 2, 2, 2)
        means = [
            np.mean([row[task.objective] for row in results.rows if row["learning_rate"] == rate])
            for rate in (1e-3, 1e-2)
        ]
        assert task.mean == sign * min(sign * mean for mean in means)
        assert task.sentence in analysis.sentence
        assert task.signal_to_noise is None  # of two settings
        assert sum(share or 0 for share in task.variance_shares.values()) == pytest.approx(1)
    assert analysis.pareto.directions == ["minimize", "minimize", "maximize"]
    json.dumps(analysis.to_dict(), default=str)
    write_sweep_page(tmp_path / "page.html", results, analysis, write_tables(results))
    page = words((tmp_path / "page.html").read_text())
    assert "± questions" in page
    assert f"The lowest minimal_pairs/bits_per_byte, {analysis.tasks[0].mean:.4f}, is that of learning_rate=" in page
    with pytest.raises(InputError, match="evaluate_task_items=24 there, 12 here"):
        make(evaluate_task_items=12)


def test_what_cannot_be_an_objective_is_refused(make):
    assert [direction(name) for name in ("t/acc", "t/acc_norm", "a/b/bits_per_byte")] == [
        "maximize",
        "maximize",
        "minimize",
    ]
    for wrong, message in (
        ("minimal_pairs/loss", "metric of a task 'loss'"),
        ("minimal/acc", "unknown task 'minimal'"),
    ):
        with pytest.raises(UnknownNameError, match=message):
            make(objectives=("loss", wrong))
    assert make(objectives=("minimal_pairs/acc",)).objectives == ("minimal_pairs/acc",)


@pytest.fixture
def answered(tmp_path):
    """(questions of a setting, its values over seeds) of several settings → their comparison by accuracy."""

    def compare(*settings, seeds=((0.0,),)):
        rows, clusters = [], [f"c{i % 8}" for i in range(len(settings[0]))]
        for number, (values, shifts) in enumerate(zip(settings, [*seeds] * len(settings), strict=False)):
            for seed, shift in enumerate(shifts):
                run, shifted = f"runs/{number}-{seed}", values + shift
                path = answers_path(tmp_path / run, "t")
                path.parent.mkdir(parents=True, exist_ok=True)
                ids = [f"q{i}" for i in range(len(values))]
                path.write_text(json.dumps({"ids": ids, "clusters": clusters, "metrics": {"acc": shifted.tolist()}}))
                row = {"rate": number, "state": "finished", "loss": 1.0, "run": run, "t/acc": shifted.mean()}
                rows.append(row | {f"t/acc{ERROR}": 0.1})
        return compare_by_task(tmp_path, ["rate"], rows, "t/acc")

    return compare


def test_differences_are_taken_question_by_question(answered):
    """A difference far below the error of either value is told apart if every question shows it, and else is not."""
    random = np.random.default_rng(0)
    questions = random.normal(size=400) + np.tile(random.normal(size=8), 50)
    noise = functools.partial(random.normal, scale=0.01, size=400)
    better = answered(questions, questions + 0.02 + noise())
    assert (better.setting, better.indistinguishable, better.seed_noise) == ({"rate": 1}, [], None)
    assert "every other is worse by more than the noise" in better.sentence
    equal = answered(questions, questions + 0.001 + noise(scale=0.1))
    assert len(equal.indistinguishable) == 1
    assert "the other one cannot be distinguished from it" in equal.sentence


def test_seeds_that_differ_more_than_the_settings_hide_the_difference(answered):
    questions = np.random.default_rng(1).normal(size=400)
    found = answered(questions, questions + 0.02, seeds=[(-0.05, 0.05), (-0.05, 0.05)])
    assert found.indistinguishable == [{"rate": 0}]
    assert found.seed_noise == pytest.approx(0.05 * 2**0.5)
    close = answered(questions, questions + 0.02, seeds=[(-0.001, 0.001), (-0.001, 0.001)])
    assert close.indistinguishable == []


def test_the_signal_of_three_settings_is_compared_with_the_noise_of_their_seeds(answered):
    questions = np.random.default_rng(2).normal(size=400)
    settings = [questions + shift for shift in (0.0, 0.2, 0.4)]
    found = answered(*settings, seeds=[(-0.05, 0.05)] * 3)
    # Spread 0.4 over the noise 0.05: a variance of two seeds at ±0.05, with one degree of freedom, is 0.005.
    assert found.signal_to_noise == pytest.approx(0.4 / 0.005**0.5, rel=1e-6)
    assert f"Signal-to-noise over 3 settings: {found.signal_to_noise:.1f} (95 %: " in found.sentence
    assert found.variance_shares["seeds"] == pytest.approx(0.005 / (0.005 + questions.var(ddof=1)), rel=0.01)
