"""A scaling study from its design to the test of its prediction: stopped, gone on with, and never trained twice."""

import csv
import functools
import json
from pathlib import Path

import pytest

from experiments.scaling.rows.tables import write_csv
from experiments.scaling.study import run as study
from experiments.scaling.study.design import Design
from experiments.scaling.study.held_out import compare, predict
from experiments.scaling.study.run import read_study, run_study, rungs_of, sweep_of, table_troubles
from experiments.sweep.trials import plan_trials
from experiments.sweep.worker import work
from model.errors import InputError
from train.lanes.build import compiled_programs


@pytest.fixture
def design() -> Design:
    """Four sizes of two fitted budgets and a held-out one, all of them small."""
    return Design(
        base="tiny", budgets=(1.5e8, 3e8, 6e8), sizes=4, size_factor=1.41, tokens_per_parameter=0.05,
        batch_size=2, seq_len=32, evaluate_tokens=128, learning_rate=0.01, set={"weight_decay": 0.0},
    )  # fmt: skip


def _runs(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs.csv").open()))


def test_every_rung_is_a_trial_of_its_own(design, data, tmp_path):
    rungs = rungs_of(design, data)
    sweep = sweep_of(design, rungs, data, tmp_path / "sweep")
    trials = plan_trials(sweep)
    assert [trial.name for trial in trials] == [rung.name for rung in rungs]
    assert not (tmp_path / "sweep").exists()
    for rung, trial in zip(rungs, trials, strict=True):
        recipe = trial.recipe
        assert (recipe.steps, int(recipe.hparams.total_steps)) == (rung.steps, rung.steps)
        assert recipe.model.replace(eos_token_ids=()) == rung.config
        assert int(recipe.hparams.warmup_steps) == rung.warmup_steps
        assert float(recipe.hparams.learning_rate) == pytest.approx(rung.learning_rate)
        assert rung.tokens == recipe.steps * recipe.train.tokens_per_step


def test_no_warmup_is_none(design, data, tmp_path):
    rungs = rungs_of(design.replace(warmup_fraction=0.0), data)
    trial = plan_trials(sweep_of(design.replace(warmup_fraction=0.0), rungs, data, tmp_path / "sweep"))[0]
    assert float(trial.recipe.hparams.warmup_fraction) == int(trial.recipe.hparams.warmup_steps) == 0


def test_branches_of_the_plan_are_branches_of_the_sweep(design, data, tmp_path):
    branched = design.replace(branches=True)
    rungs = [rung for rung in rungs_of(branched, data) if not rung.held_out]
    trials = plan_trials(sweep_of(branched, rungs, data, tmp_path / "sweep"))
    ids = {rung.name: trial.id for rung, trial in zip(rungs, trials, strict=True)}
    assert any(rung.trunk for rung in rungs)
    for rung, trial in zip(rungs, trials, strict=True):
        assert trial.parent == (None if rung.trunk is None else (ids[rung.trunk], rung.leave_step))
    assert len({trial.cohort for trial in trials}) == len({rung.d_model for rung in rungs})


def test_a_study_goes_on_under_another_execution(design, data, tmp_path):
    """As after one that ran out of memory: with the same trials, which then run otherwise."""
    fuller = design.replace(set=design.set | {"remat": "full", "loss_chunks": 2})
    assert not fuller.differences(design)
    assert fuller.replace(set=fuller.set | {"beta2": 0.9}).differences(design)
    rungs = rungs_of(design, data)
    before = sweep_of(design, rungs, data, tmp_path / "sweep")
    before.write()
    after = sweep_of(fuller, rungs_of(fuller, data), data, tmp_path / "sweep")
    assert [trial.id for trial in plan_trials(after)] == [trial.id for trial in plan_trials(before)]
    assert {trial.execution.remat for trial in plan_trials(after)} == {"full"}


def test_a_folder_of_something_else_is_refused(design, data, tmp_path):
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(InputError, match="is not empty and holds no study"):
        run_study(design, data, tmp_path)


@pytest.mark.long
def test_stopped_and_gone_on_with(design, data, tmp_path, monkeypatch):
    folder, seen = tmp_path / "study", []

    def stop(sweep, ledger):
        seen.append(sweep.folder.name)
        if seen == ["sweep"]:
            raise KeyboardInterrupt
        if sweep.folder.name == "held_out":
            # What is predicted is on the disk, and nothing of it has run.
            said = json.loads((folder / "prediction.json").read_text())
            assert {run["name"] for run in said["runs"]} == {r.name for r in rungs_of(design, data) if r.held_out}
            assert not (sweep.folder / "runs").exists() or seen.count("held_out") > 1
            if seen.count("held_out") == 1:
                raise KeyboardInterrupt
        work(sweep, ledger)

    monkeypatch.setattr("experiments.sweep.run.work", stop)
    monkeypatch.setattr(study, "predict", functools.partial(predict, bootstraps=20))
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            run_study(design, data, folder)
    prediction = (folder / "prediction.json").read_bytes()
    assert {row["held_out"] for row in _runs(folder)} == {"False"}
    run_study(design, data, folder)
    assert (folder / "prediction.json").read_bytes() == prediction
    table, compiled = (folder / "runs.csv").read_bytes(), compiled_programs()
    run_study(design, data, folder)
    assert compiled_programs() == compiled
    assert (folder / "runs.csv").read_bytes() == table

    rungs = rungs_of(design, data)
    assert [row["name"] for row in _runs(folder)] == [rung.name for rung in rungs]
    assert all(float(row["loss"]) > 0 and row["status"] == "finished" for row in _runs(folder))
    tested = json.loads((folder / "held_out.json").read_text())
    losses = {row["name"]: float(row["loss"]) for row in _runs(folder)}
    assert [run["measured"] for run in tested["runs"]] == [losses[run["name"]] for run in tested["runs"]]
    curves = list(csv.DictReader((folder / "curves.csv").open()))
    assert {row["run"] for row in curves} == {rung.name for rung in rungs if not rung.held_out}

    assert read_study(folder) == design
    with pytest.raises(InputError, match=r"holds a study that differs: sizes=4 there, 5 here"):
        run_study(design.replace(sizes=5), data, folder)
    (folder / "prediction.json").unlink()
    with pytest.raises(InputError, match="is gone: what is written now predicts nothing"):
        run_study(design, data, folder)


def test_a_prediction_is_compared_with_what_came(design, data, tmp_path):
    """Losses of a known law: what is predicted of the larger budget is the law's, and so is its optimum."""
    rungs = rungs_of(design.replace(budgets=tuple(1.5e8 * 2**i for i in range(5))), data)
    law = lambda rung: 1.5 + 20 * rung.params**-0.3 + 30 * rung.tokens**-0.3
    rows = [rung.to_dict() | {"loss": law(rung)} for rung in rungs]
    fitted, tested = ([row for row in rows if row["held_out"] is kind] for kind in (False, True))
    write_csv(tmp_path / "runs.csv", fitted)
    said = predict(tmp_path, [rung for rung in rungs if rung.held_out], lambda text: None, bootstraps=20)
    assert predict(tmp_path, rungs, lambda text: None) == said
    tested[0]["loss"] = None
    found = compare(tmp_path, rows)
    assert found["runs"][0]["measured"] is found["runs"][0]["inside"] is None
    for run in found["runs"][1:]:
        assert run["relative_error"] == pytest.approx(0, abs=1e-4)


def test_a_table_that_was_changed_is_named(tmp_path):
    row = {"name": "a", "params": 10, "loss": 2.0, "trunk": None, "held_out": False, "run": "sweep/runs/a"}
    study._write_tables(tmp_path, [row])
    assert table_troubles(tmp_path) == []
    (tmp_path / "runs.csv").write_text((tmp_path / "runs.csv").read_text().replace("2.0", "3.0"))
    (tmp_path / "curves.csv").unlink()
    changed, missing = table_troubles(tmp_path)
    assert changed == f"{tmp_path / 'runs.csv'} is not what the study wrote (its checksum differs)"
    assert missing == f"{tmp_path / 'curves.csv'} is missing, which the study wrote"
    (tmp_path / "checksums.json").write_text("{")
    assert "checksums.json cannot be read" in table_troubles(tmp_path)[0]
    (tmp_path / "checksums.json").unlink()  # as earlier versions left a study
    assert table_troubles(tmp_path) == []


def test_a_held_out_valley_is_measured_by_the_curve_of_the_prediction(design, data, tmp_path):
    rungs = rungs_of(design.replace(budgets=tuple(1.5e8 * 2**i for i in range(5))), data)
    rows = [rung.to_dict() | {"loss": 1.5 + 76 * rung.params**-0.3 + 30 * rung.tokens**-0.3} for rung in rungs]
    write_csv(tmp_path / "runs.csv", [row for row in rows if not row["held_out"]])
    said = predict(tmp_path, [rung for rung in rungs if rung.held_out], lambda text: None, bootstraps=20)
    found = compare(tmp_path, rows)
    assert found["valleys"] == said["valleys"]
    assert said["valleys"]["method"] == "spline"
    measured = found["budgets"][0]["measured"]
    assert set(measured["against"]) == {"parametric", "isoflop", "skewed", "parabola"}
    assert measured["params"] / measured["tokens"] == pytest.approx((76 / 30) ** (1 / 0.3), rel=0.1), "of the law"
    document = json.loads((tmp_path / "prediction.json").read_text())
    del document["valleys"], document["checksum"]  # as predictions were written when the parabola was the default
    (tmp_path / "prediction.json").write_text(json.dumps(document))
    assert compare(tmp_path, rows)["valleys"] is None
