"""Workers on tiny models: what comes out of a sweep, however it is stopped, halved, searched or broken."""

import collections
import dataclasses
import json
import math

import pytest

from experiments.sweep import worker as worker_module
from experiments.sweep.branches import Listed
from experiments.sweep.definition import define
from experiments.sweep.ledger import Ledger
from experiments.sweep.live import standing
from experiments.sweep.record import Sweep
from experiments.sweep.run import UnfinishedError, run_sweep
from experiments.sweep.worker import plan, work
from model import presets
from train import Shell, population
from train.branch import cooldown
from train.lanes.build import compiled_programs
from train.run import executions, read_record

TINY = presets.get("tiny").replace(num_layers=1, max_seq_len=32, rope_base=9_200.0)
SHARED = {"warmup_steps": 1, "learning_rate": 0.01}
BRANCHES = [
    Listed(name, {"steps": steps, "decay_steps": decay_steps, "seed": seed} | SHARED, *parent)
    for name, steps, decay_steps, *parent in (("long", 6, 2), ("early", 3, 1, "long", 2), ("late", 5, 2, "long", 3))
    for seed in (0, 1)
]


@pytest.fixture
def make(data, tmp_path):
    """A sweep of tiny models, written to its folder; all that are left as they are run one program."""

    def make(**changes):
        given = {"axes": ("learning_rate=1e-3,1e-2",), "steps": 6, "seeds": 2, "lanes": 2, "base": {"schedule": "wsd"}}
        sweep = define(
            TINY, data=data, folder=tmp_path / "sweep", batch_size=4, seq_len=32, evaluate_tokens=256, **given | changes
        )
        sweep.write()
        return sweep

    return make


def run(sweep):
    ledger = Ledger(sweep)
    plan(sweep, ledger)
    work(sweep, ledger)
    return ledger


def test_a_sweep_is_one_program_and_is_never_run_twice(make):
    before = compiled_programs()
    sweep = make()
    ledger = run(sweep)
    rows = ledger.rows()
    assert compiled_programs() - before <= 1  # none, where another test has compiled it
    assert [row.state for row in rows] == ["finished"] * 4
    assert all(row.rungs == {6: row.values[0]} and row.facts["loss"] == row.values[0] for row in rows)
    assert all((sweep.folder / row.facts["run"] / "run.json").exists() for row in rows)
    now = standing(sweep, rows)
    assert now.done
    assert now.tokens_done == now.tokens_expected == 4 * 6 * 4 * 32
    assert now.best.seeds == 2

    more = make(seeds=3)  # two trials more
    again = run(more).rows()
    assert again[:4] == rows
    assert len(again) == 6
    assert compiled_programs() - before <= 1
    assert standing(more, again).states["finished"] == 6


@pytest.mark.slow
def test_stopped_and_resumed_a_sweep_ends_as_if_it_had_not_been(make, monkeypatch):
    sweep = make()
    ledger = Ledger(sweep)
    plan(sweep, ledger)
    unbroken = worker_module.population

    def stop(*arguments, **named):
        monkeypatch.setattr(worker_module, "population", unbroken)
        raise KeyboardInterrupt

    monkeypatch.setattr(worker_module, "population", stop)
    with pytest.raises(KeyboardInterrupt):
        work(sweep, ledger)
    assert {row.state for row in ledger.rows()} == {"planned"}  # handed back
    work(sweep, Ledger(Sweep.read(sweep.folder)))
    assert {row.state for row in ledger.rows()} == {"finished"}


@pytest.mark.slow
def test_a_trial_that_fails_ends_nothing_else(make, monkeypatch):
    sweep = make(axes=("learning_rate=1e-3", "num_layers=1,2"))
    unbroken = worker_module.population

    def fail(recipes, **named):
        if recipes[0].model.num_layers == 2:
            raise RuntimeError("no such\nkernel")
        return unbroken(recipes, **named)

    monkeypatch.setattr(worker_module, "population", fail)
    with pytest.raises(UnfinishedError, match=r"2 of 4 runs did not end \(RuntimeError: no such kernel\)"):
        run_sweep(sweep)
    for row in Ledger(sweep).rows():
        assert row.state == ("finished" if row.trial.point["num_layers"] == 1 else "failed")
        assert row.facts.get("reason") == (None if row.state == "finished" else "RuntimeError: no such kernel")


@pytest.mark.slow
def test_halving_goes_on_from_its_rungs(make):
    sweep = make(
        axes=("learning_rate=1e-3,3e-3,1e-2,3e-2",),
        seeds=1,
        policy="halving",
        policy_settings={"eta": 2, "min_fraction": 0.34},
    )
    rows = run(sweep).rows()
    counts = collections.Counter(row.state for row in rows)
    assert counts["finished"] in (1, 2)
    assert counts["pruned"] == 4 - counts["finished"]
    (best, *_) = sorted(rows, key=lambda row: row.rungs[min(row.rungs)])
    assert best.state == "finished"
    assert len(best.rungs) > 1
    record = json.loads((sweep.folder / best.facts["run"] / "run.json").read_text())
    assert record["step"] == 6
    assert record["hparams"]["total_steps"] in (0, 6)


@pytest.mark.parametrize("real", [False, pytest.param(True, marks=pytest.mark.long)], ids=["told", "measured"])
def test_a_search_fills_the_lanes_and_measures_the_speed_of_a_shape_once(make, monkeypatch, real):
    asked = []
    if not real:
        measure = lambda *arguments, **named: asked.append(named) or [{"decode_tokens_per_second_aggregate": 7.0}]
        monkeypatch.setattr("experiments.bench.decode.grid.run_grid", measure)
    sweep = make(
        axes=("learning_rate=loguniform:1e-3:1e-1",),
        sampler="tpe",
        trials=3,  # a lane is left
        seeds=1,
        objectives=("loss", "tokens_per_second"),
        base={"schedule": "wsd", "decode.context": 8},
    )
    ledger = run(sweep)
    rows = ledger.rows()
    assert [row.state for row in rows] == ["finished"] * 3
    assert ledger.asked() == 3
    assert len({row.trial.point["learning_rate"] for row in rows}) == 3
    assert all(len(row.values) == 2 and math.isfinite(row.values[1]) for row in rows)
    assert len({row.values[1] for row in rows}) == 1
    assert real or (len(asked), rows[0].values[1]) == (1, 7.0)
    assert len(list((sweep.folder / "speed").iterdir())) == 1


@pytest.mark.slow
def test_members_of_a_population_take_over_a_better_ones_state(make):
    sweep = make(
        axes=("learning_rate=1e-6,1e-3,1e-2,3e-2",),
        seeds=1,
        policy="population",
        policy_settings={"interval_fraction": 0.5, "quantile": 0.25},
    )
    rows = run(sweep).rows()
    children = [row for row in rows if row.trial.parent]
    assert len(children) == 1
    assert children[0].state == "finished"
    assert children[0].facts["branch_step"] == 3
    assert collections.Counter(row.state for row in rows) == {"finished": 4, "pruned": 1}


def test_a_branch_is_the_cooldown_of_its_trunk_and_all_are_one_program(make, data, tmp_path):
    before = compiled_programs()
    sweep = make(listed=BRANCHES, axes=(), steps=None, seeds=None)
    rows = run(sweep).rows()
    assert compiled_programs() - before <= 1
    assert [row.state for row in rows] == ["finished"] * 6
    trunks, branches = rows[:2], [row for row in rows if row.trial.steps == 5]
    assert [row.facts["branch_step"] for row in branches] == [3, 3]
    final_fraction = float(trunks[0].trial.recipe.hparams.final_fraction)
    alone = [cooldown(sweep.run_folder(row.trial), 3, 2, final_fraction) for row in trunks]
    results = population(
        alone,
        runs=[tmp_path / "alone" / str(number) for number in range(2)],
        shell=Shell(evaluate_tokens=256),
    )
    assert [result.validation_loss for result in results] == [row.values[0] for row in branches]
    assert compiled_programs() - before <= 1


@pytest.mark.long
def test_workers_beside_this_process_do_it_all(isoflop, data, tmp_path):
    out = tmp_path / "sweep"
    code, said, err = isoflop(
        *("sweep", "run", "tiny", "--data", data, "--out", out, "--steps", 6, "--seq-len", 32, "--batch-size", 4),
        *("--set", "learning_rate=1e-3,1e-2", "--seeds", 2, "--lanes", 2, "--eval-tokens", 256, "--workers", 2),
        *("--json", tmp_path / "summary.json"),
    )
    assert code == 0, err
    assert "4 finished" in " ".join(said.split())
    document = json.loads((tmp_path / "summary.json").read_text())
    assert document["standing"]["done"]
    assert len(document["settings"]) == 2
    code, said, _ = isoflop("sweep", "status", out, "--watch")
    assert code == 0
    assert "best so far" in said


def test_bad_sweeps_from_the_command_line_start_nothing(isoflop, data, tmp_path):
    out = tmp_path / "sweep"
    given = ("sweep", "run", "tiny", "--data", data, "--out", out, "--steps", 2, "--seq-len", 32)
    axis = ("--set", "learning_rate=1e-3,1e-2")
    for changes, sentence in [
        ((*axis, "--objective", "speed"), "unknown objective 'speed'"),
        ((*axis, "--storage", "journal:/proc/none/x"), "cannot be opened"),
        (("--set", "learning_rat=1"), "did you mean 'learning_rate'"),
        ((*axis, "--launcher", "slurm", "--slurm-set", "partition"), "'partition' is not of the form name=value"),
        (("--set", "learning_rate=loguniform:1e-3:1e-1", "--sampler", "nsga3"), "unknown sampler 'nsga3'"),
    ]:
        code, _, err = isoflop(*given, *changes)
        assert (code, err.count("\n")) == (2, 1), err
        assert sentence in err
        assert not (out / "runs").exists()
    assert isoflop("sweep", "status", tmp_path / "none")[0] == 2


def test_a_sweep_goes_on_under_another_execution(make):
    """With the ids that it has, and only what is left is trained."""
    first = run(make(seeds=1)).rows()
    before = {row.trial.id: row.facts["claimed_at"] for row in first}
    ledger = run(make(seeds=2, base={"schedule": "wsd", "remat": "dots"}))
    rows = ledger.rows()
    assert [row.state for row in rows] == ["finished"] * 4
    assert {row.trial.id: row.facts["claimed_at"] for row in rows[:2]} == before
    folders = [make(seeds=2).run_folder(row.trial) for row in rows]
    assert [executions(read_record(folder))[-1][1].remat for folder in folders] == ["none", "none", "dots", "dots"]


def test_other_data_than_the_sweeps_are_refused(make, isoflop):
    sweep = make()
    other = sweep.base.recipe.replace(data="0" * 64)
    dataclasses.replace(sweep, base=sweep.base.replace(recipe=other)).write()
    code, _, err = isoflop("sweep", "resume", sweep.folder)
    assert code == 2
    assert "holds other data" in err


@pytest.mark.long
def test_sixty_four_trials_over_two_shapes_compile_two_steps(make):
    """Halving too: on a CPU the trials that are left run in the same lanes."""
    grid = ("learning_rate=logspace:1e-3:1e-2:8", "weight_decay=0,0.01,0.1,1", "d_ff=40,44")
    sweep = make(axes=grid, seeds=1, lanes=16, steps=4, policy="halving", policy_settings={"min_fraction": 0.25})
    before = compiled_programs()
    states = collections.Counter(row.state for row in run(sweep).rows())
    assert compiled_programs() - before == 2
    assert states["finished"] + states["pruned"] == 64
    assert states["finished"] == 8  # of 64 the best 22 go on, of those 8
