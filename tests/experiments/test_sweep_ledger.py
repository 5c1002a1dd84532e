"""The ledger: who may claim what, and that nothing is lost or finished twice, whoever dies when."""

import contextlib
import dataclasses
import itertools
import os
import threading
import time

import pytest

from experiments.sweep import ledger as ledger_module
from experiments.sweep.address import without_password
from experiments.sweep.ledger import DEAD, Ledger
from experiments.sweep.record import Sweep
from experiments.sweep.search.samplers import make_sampler, suggester
from experiments.sweep.trial import Trial
from experiments.sweep.trials import plan_trials, trials_at
from model import InputError, ModelConfig
from train import Recipe

CONFIG = ModelConfig(vocab_size=32, d_model=16, num_layers=1, num_heads=2, d_ff=16)
BASE = Trial(Recipe(CONFIG, steps=10))
FACTS = {"run": "runs/x", "steps": 10}


@pytest.fixture(params=["sqlite", "journal"])
def sweep(request, tmp_path):
    storage = None if request.param == "sqlite" else f"journal:{tmp_path / 'journal.log'}"
    axes = ("learning_rate=logspace:1e-3:1e-1:3", "batch_size=4,8")
    return Sweep(tmp_path, BASE, tmp_path, axes=axes, storage=storage)


# Of the ledger's own logic, with no worker against another; test_sweep_worker is on SQLite.
logic = pytest.mark.parametrize("sweep", ["journal", pytest.param("sqlite", marks=pytest.mark.long)], indirect=True)


def open_ledger(sweep, name="worker"):
    ledger = Ledger(sweep, interval=1, grace=1, worker=name)
    ledger.storage.interval = 0.2  # Optuna wants whole seconds
    return ledger


def ready(ledger):
    return {row.trial.id: row.trial.steps for row in ledger.rows() if row.state == "planned"}


def states(ledger):
    return sorted(row.state for row in ledger.rows())


@logic
def test_trials_are_there_once_whoever_adds_them(sweep):
    first, second = open_ledger(sweep, "a"), open_ledger(sweep, "b")
    assert first.add(plan_trials(sweep)) == 6
    assert second.add(plan_trials(sweep)) == 0
    assert [row.trial for row in second.rows()] == plan_trials(sweep)
    assert [row.number for row in second.rows()] == list(range(6))


def test_two_workers_never_hold_one_trial(sweep):
    ledgers = [open_ledger(sweep, str(i)) for i in range(3)]
    ledgers[0].add(plan_trials(sweep))
    wanted, claims = ready(ledgers[0]), [[], [], []]
    start = threading.Barrier(3)

    def claim(index):
        start.wait()
        claims[index] = ledgers[index].claim(wanted, 6)

    threads = [threading.Thread(target=claim, args=(index,)) for index in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    held = [claim.trial.id for own in claims for claim in own]
    assert sorted(held) == sorted(wanted)


@logic
def test_a_trial_takes_its_way(sweep):
    ledger = open_ledger(sweep)
    ledger.add(plan_trials(sweep))
    finished, rung, diverged, failed = ledger.claim(ready(ledger), 4)
    assert states(ledger) == ["planned"] * 2 + ["running"] * 4
    assert ledger.report(rung, 5, 2.5)
    assert ledger.hand_back(rung, FACTS)
    assert ledger.finish(finished, [2.0], FACTS)
    assert ledger.diverge(diverged, FACTS)
    assert ledger.fail(failed, "RuntimeError: no")
    assert ledger.prune(rung.trial.id)
    assert not ledger.prune(rung.trial.id)
    rows = {row.trial.id: row for row in open_ledger(sweep).rows()}
    assert rows[finished.trial.id].state == "finished"
    assert rows[finished.trial.id].values == (2.0,)
    assert rows[finished.trial.id].facts == FACTS
    assert rows[rung.trial.id].state == "pruned"
    assert rows[rung.trial.id].rungs == {5: 2.5}
    assert rows[diverged.trial.id].state == "diverged"
    assert rows[failed.trial.id].state == "failed"
    assert rows[failed.trial.id].facts["reason"] == "RuntimeError: no"
    assert ledger.retry() == 1
    assert ledger.retry() == 0
    assert states(ledger) == ["diverged", "finished", "planned", "planned", "planned", "pruned"]


def test_the_trials_of_a_dead_worker_go_on_with_what_they_reported(sweep):
    dead, alive = open_ledger(sweep, "dead"), open_ledger(sweep, "alive")
    dead.add(plan_trials(sweep))
    lost, kept = dead.claim(ready(dead), 1), alive.claim(ready(dead), 1)
    dead.report(lost[0], 3, 4.0)
    with alive.beat(kept):
        deadline = time.monotonic() + 10
        while not alive.recover():
            assert time.monotonic() < deadline
            time.sleep(0.2)
        assert open_ledger(sweep).recover() == 0
        # The worker was only slow: its claim is gone, whatever it says.
        assert not dead.report(lost[0], 10, 1.0)
        assert not dead.finish(lost[0], [1.0], FACTS)
        assert not dead.hand_back(lost[0])
        (again,) = alive.claim({lost[0].trial.id: 10}, 1)
        assert alive.finish(kept[0], [1.0], FACTS)
    assert alive.finish(again, [2.0], FACTS)
    (row,) = [row for row in alive.rows() if row.trial.id == lost[0].trial.id]
    assert (row.number, row.state, row.values, row.rungs) == (0, "finished", (2.0,), {3: 4.0})
    assert states(alive) == ["finished"] * 2 + ["planned"] * 4


@logic
def test_whoever_dies_between_ending_and_planning_again_loses_nothing(sweep, monkeypatch):
    ledger = open_ledger(sweep)
    ledger.add(plan_trials(sweep))
    (claim,) = ledger.claim(ready(ledger), 1)
    ledger.fail(claim, DEAD)
    assert states(ledger) == ["planned"] * 6
    assert ledger.claim({claim.trial.id: 10}, 1) == []
    assert ledger.recover() == 1
    assert ledger.recover() == 0
    assert [c.trial.id for c in ledger.claim({claim.trial.id: 10}, 1)] == [claim.trial.id]


@logic
def test_of_two_attempts_at_one_trial_the_first_counts(sweep):
    first, second = open_ledger(sweep, "a"), open_ledger(sweep, "b")
    trials = plan_trials(sweep)[:2]
    second.storage.trials()
    first.add(trials)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(second, "_attempts", dict)  # as it was before the first one wrote
        assert second.add(trials) == 2
    assert len(second.storage.trials()) == 4
    assert len(second.rows()) == 2
    held = [*first.claim(ready(first), 5), *second.claim(ready(second), 5)]
    assert sorted(claim.trial.id for claim in held) == sorted(trial.id for trial in trials)
    first.recover()
    assert sum(trial.state.name == "FAIL" for trial in first.storage.trials()) == 2
    for claim in held:
        assert first.finish(claim, [1.0], FACTS)
    assert states(second) == ["finished"] * 2


def searched(sweep, **changes):
    return dataclasses.replace(
        sweep, axes=("learning_rate=loguniform:1e-4:1e-1",), sampler="random", trials=5, seeds=(0, 1), **changes
    )


def ask(ledger, sweep, count):
    return ledger.ask(
        count,
        sweep.trials,
        lambda drawn: make_sampler(sweep.sampler, sweep.sampler_seed, ["minimize"], drawn),
        lambda trial: trials_at(sweep, sweep.space().draw(suggester(trial))),
    )


def test_a_search_draws_as_many_points_as_it_should_each_with_its_replicates(sweep):
    sweep = searched(sweep)
    ledgers = [open_ledger(sweep, str(i)) for i in range(2)]
    start = threading.Barrier(2)

    def draw(ledger):
        start.wait()
        with contextlib.suppress(ValueError):
            ask(ledger, sweep, 4)

    threads = [threading.Thread(target=draw, args=(ledger,)) for ledger in ledgers]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    while ask(ledgers[0], sweep, 2):
        pass
    rows = ledgers[1].rows()
    points = [{**row.trial.point, "seed": None} for row in rows]
    assert len(rows) == 10
    assert all(points.count(point) == 2 for point in points)
    assert {row.state for row in rows} == {"planned"}
    assert all(0.0001 <= point["learning_rate"] <= 0.1 for point in points)
    for claim in ledgers[0].claim(ready(ledgers[0]), 10):
        assert ledgers[0].finish(claim, [1.0], FACTS)
    assert ledgers[0].asked() == 5


def test_a_search_is_the_same_again(tmp_path):
    points = []
    for name in ("one", "two"):
        sweep = searched(Sweep(tmp_path, BASE, tmp_path), storage=f"journal:{tmp_path / name}")
        ledger = open_ledger(sweep)
        ask(ledger, sweep, 3), ask(ledger, sweep, 3)
        points.append([row.trial.point for row in ledger.rows()])
    assert points[0] == points[1]
    rates = [point["learning_rate"] for point in points[0]]
    assert len(set(rates)) == 5


def test_what_was_being_drawn_by_a_dead_worker_is_drawn_anew(tmp_path, monkeypatch):
    monkeypatch.setattr(ledger_module, "_ASKED_SECONDS", 0.1)
    sweep = searched(Sweep(tmp_path, BASE, tmp_path), storage=f"journal:{tmp_path / 'journal.log'}")
    ledger = open_ledger(sweep)

    def die(trial):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ledger.ask(1, 5, lambda drawn: make_sampler("random", 0), die)
    assert ledger.rows() == []
    ledger.recover()
    time.sleep(0.2)
    ledger.recover()
    assert ledger.asked() == 0
    assert ask(ledger, sweep, 5) == 5


def test_parameters_are_optunas_so_that_its_tools_read_them(tmp_path):
    import optuna

    sweep = Sweep(tmp_path, BASE, tmp_path, axes=("learning_rate=logspace:1e-3:1e-1:3", "schedule=constant,cosine"))
    ledger = open_ledger(sweep)
    ledger.add(plan_trials(sweep))
    for claim, loss in zip(ledger.claim(ready(ledger), 6), itertools.count(1.0)):
        ledger.finish(claim, [loss], FACTS)
    more = Sweep(tmp_path, BASE, tmp_path, axes=("learning_rate=1e-4", "schedule=constant,wsd"))
    ledger.add(plan_trials(more))
    study = optuna.load_study(study_name="sweep", storage=f"sqlite:///{tmp_path / 'ledger.db'}")
    assert study.best_params == {"learning_rate": pytest.approx(1e-3), "schedule": "constant"}
    assert [trial.params.get("schedule") for trial in study.trials[6:]] == ["constant", None]
    assert study.trials[0].distributions["learning_rate"].log


@pytest.mark.parametrize(
    ("storage", "sentence"),
    [
        (
            "postgresql+psycopg://nobody:secret@127.0.0.1:1/none",
            r"\*\*\*@127.0.0.1:1/none (cannot be reached|needs a driver)",
        ),
        ("sqlite:////no/such/folder/ledger.db", "cannot be reached"),
        ("somewhere", "is not a database URL"),
        ("oracle://host/name", "needs a driver that is not installed"),
        ("journal:/proc/nowhere/journal.log", "cannot be opened"),
    ],
)
def test_a_storage_that_cannot_be_opened(tmp_path, storage, sentence):
    with pytest.raises(InputError, match=sentence) as error:
        Ledger(Sweep(tmp_path, BASE, tmp_path, storage=storage))
    assert "\n" not in str(error.value)
    assert "secret" not in str(error.value)


def test_a_password_is_not_written_down(monkeypatch):
    monkeypatch.setenv("PGPASSWORD", "before")
    assert without_password("postgresql+psycopg://me:sec%40ret@host/db") == "postgresql+psycopg://me@host/db"
    assert os.environ["PGPASSWORD"] == "sec@ret", "it is where the database's library looks for it"
    for url in ("postgresql://me@host/db", "journal:a:b@c", "sqlite:///ledger.db"):
        assert without_password(url) == url


def test_other_objectives_in_one_storage_are_refused(tmp_path):
    sweep = Sweep(tmp_path, BASE, tmp_path, storage=f"journal:{tmp_path / 'journal.log'}")
    Ledger(sweep)
    with pytest.raises(InputError, match="other objectives"):
        Ledger(dataclasses.replace(sweep, objectives=("loss", "tokens_per_second")))
