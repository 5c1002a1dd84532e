"""Steps that are not finite are skipped, spikes are rolled back, and a run that does not recover ends as diverged."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Execution, ModelConfig
from train import HParams, Shell, TrainConfig, init_state, population, train
from train.data.mixture import PhasedLoader
from train.lanes import vmapped
from train.loop.member import Member
from train.preemption import PreemptionSync
from train.run import executions
from train.run.checkpoint import Checkpoints
from train.step import train_step

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_002.0)
STEPS, ROWS = 20, 4
TRAIN = TrainConfig(
    batch_size=ROWS,
    seq_len=16,
    schedule="constant",
    max_skipped=3,
    spike_sigma=6.0,
    spike_window=6,
    max_rollbacks=2,
    norms=False,
)
HPARAMS = HParams(learning_rate=0.1, balance_loss=0, router_z_loss=0)
SHELL = Shell(evaluate_tokens=64, checkpoint_every=4)


def status(run):
    return json.loads((run / "run.json").read_text())


@pytest.fixture(scope="module", autouse=True)
def poisoned_step():
    """For all tests here a step whose z-loss is NaN where `poisoned` hyperparameters say so.

    The two numbers travel in those that a dense model has no use for.
    """

    def step(config, train_config, state, batch, hparams, **how):
        first, count = hparams.router_z_loss, hparams.balance_loss
        bad = (state.step >= first) & (state.step < first + count)
        values = {name: getattr(hparams, name) for name in HParams.NAMES}
        values["z_loss"] = jnp.where(bad, jnp.nan, values["z_loss"])
        hparams = HParams.tree_unflatten(None, [values[name] for name in HParams.NAMES])
        return train_step(config, train_config, state, batch, hparams, **how)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vmapped, "train_step", step)
        yield


def poisoned(first, count):
    """In so many steps from the first one on."""
    return HPARAMS.replace(router_z_loss=first, balance_loss=count)


def state_at(run, step):
    like = jax.eval_shape(lambda: init_state(CONFIG, TRAIN, HPARAMS))
    return Checkpoints(run, read_only=True).restore(step, like)


def test_a_step_that_is_not_finite_is_skipped(data, tmp_path, record):
    shell = Shell(evaluate_tokens=64, keep_steps=(5, 6, 7))
    result = train(CONFIG, TRAIN, poisoned(5, 1), data=data, run=tmp_path / "run", steps=12, shell=shell)
    assert (result.status, result.steps, result.skipped) == ("finished", 12, 1)
    lines = record(tmp_path / "run")
    assert [line["skipped"] for line in lines] == [0] * 5 + [1] * 7
    assert [line["total_loss"] is None for line in lines] == [number == 5 for number in range(12)]
    assert [line["grad_norm"] is None for line in lines] == [number == 5 for number in range(12)]
    assert all(line["loss"] for line in lines)
    before, skipped, after = (state_at(tmp_path / "run", step) for step in (5, 6, 7))
    for name in ("params", "optimizer"):
        assert_equal(getattr(before, name), getattr(skipped, name))
    tokens = [state.params["embedding"]["tokens"] for state in (skipped, after)]
    assert (tokens[0] != tokens[1]).any()
    assert (int(skipped.step), int(skipped.skipped), int(skipped.skipped_in_a_row)) == (6, 1, 1)
    assert (int(after.step), int(after.skipped), int(after.skipped_in_a_row)) == (7, 1, 0)


def test_too_many_in_a_row_are_a_divergence(data, tmp_path, record):
    lanes = [poisoned(0, 0), poisoned(5, 2), poisoned(5, 99)]
    runs = [tmp_path / str(number) for number in range(3)]
    results = population(CONFIG, TRAIN, lanes, data=data, runs=runs, steps=12, shell=SHELL)
    assert [result.status for result in results] == ["finished", "finished", "diverged"]
    assert [result.skipped for result in results] == [0, 2, 3]
    assert [result.steps for result in results] == [12, 12, 8]
    assert results[2].validation_loss is None
    for leaf in jax.tree.leaves(results[2].params):
        assert np.isfinite(leaf).all()
    assert len(record(runs[2])) == results[2].steps
    again = population(CONFIG, TRAIN, lanes, data=data, runs=runs, steps=12, shell=SHELL)
    assert [result.status for result in again] == ["finished", "finished", "diverged"]


def test_a_kill_between_two_skipped_steps_loses_no_count(data, tmp_path, crash):
    shell = Shell(evaluate_tokens=64, checkpoint_every=1)
    with crash(7):
        train(CONFIG, TRAIN, poisoned(5, 99), data=data, run=tmp_path / "run", steps=12, shell=shell)
    result = train(CONFIG, TRAIN, poisoned(5, 99), data=data, run=tmp_path / "run", steps=12, shell=shell)
    assert (result.status, result.steps, result.skipped) == ("diverged", 8, 3)


class Stream:
    """The loader's, with garbage in some rows of the stream; notes which rows were last taken for each step."""

    def __init__(self, monkeypatch, garbage):
        self.rows, plain = {}, PhasedLoader.batch

        def batch(loader, step, rows=None, *, skipped_rows=0):
            first = step * ROWS + skipped_rows
            self.rows[step] = range(first, first + ROWS)
            made = plain(loader, step, rows, skipped_rows=skipped_rows)
            for number, row in enumerate(self.rows[step]):
                if row in garbage:
                    made["targets"][number] = np.arange(16, 32)  # bytes that no text has
            return made

        monkeypatch.setattr(PhasedLoader, "batch", batch)


GARBAGE = range(10 * ROWS, 11 * ROWS)  # of the eleventh step


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    """A run past the garbage, and what it read."""
    run = tmp_path_factory.mktemp("whole") / "run"
    with pytest.MonkeyPatch.context() as patch:
        stream = Stream(patch, GARBAGE)
        return train(CONFIG, TRAIN, HPARAMS, data=data, run=run, steps=STEPS, shell=SHELL), stream


@pytest.fixture
def garbage(monkeypatch):
    """For this test too."""
    Stream(monkeypatch, GARBAGE)


def test_a_spike_is_rolled_back_past_its_data(whole, record):
    result, stream = whole
    assert (result.status, result.steps, result.rollbacks) == ("finished", STEPS, 1)
    (back,) = status(result.run)["rollbacks"]
    assert (back["at"], back["to"], back["skipped_rows"], back["done"]) == (11, 8, 3 * ROWS, True)
    taken = [row for step in range(STEPS) for row in stream.rows[step]]
    assert taken == [*range(8 * ROWS), *range(11 * ROWS, (STEPS + 3) * ROWS)]
    lines = record(result.run)
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    assert [line.get("rollbacks", 0) for line in lines] == [0] * 8 + [1] * 12
    assert max(line["loss"] for line in lines[1:]) < back["loss"]
    assert [line["tokens"] for line in lines] == [64 * step for step in range(1, STEPS + 1)]


@pytest.mark.parametrize("step", [9, 13])
def test_a_crash_before_or_after_a_rollback_changes_no_bit(whole, garbage, data, tmp_path, step, record, crash):
    with crash(step):
        train(CONFIG, TRAIN, HPARAMS, data=data, run=tmp_path / "run", steps=STEPS, shell=SHELL)
    train(CONFIG, TRAIN, HPARAMS, data=data, run=tmp_path / "run", steps=STEPS, shell=SHELL)
    assert record(tmp_path / "run") == record(whole[0].run)
    assert status(tmp_path / "run")["rollbacks"] == status(whole[0].run)["rollbacks"]


def test_an_interruption_before_the_spike_changes_no_bit(whole, garbage, data, tmp_path, monkeypatch, record):
    """What it saved is newer than the checkpoint that the uninterrupted run goes back to."""
    with monkeypatch.context() as patch:
        asked = []
        patch.setattr(PreemptionSync, "is_requested", lambda self, flag: flag == 1 and len(asked) >= 10)
        patch.setattr(PreemptionSync, "request", lambda self, flags: asked.append(flags))
        with pytest.raises(KeyboardInterrupt):
            train(CONFIG, TRAIN, HPARAMS, data=data, run=tmp_path / "run", steps=STEPS, shell=SHELL)
    assert Checkpoints(tmp_path / "run").steps() == [8, 10]
    other = Execution(lanes=1)  # of the same numbers
    train(CONFIG, TRAIN, HPARAMS, data=data, run=tmp_path / "run", steps=STEPS, shell=SHELL, execution=other)
    assert record(tmp_path / "run") == record(whole[0].run)
    assert [(first, one.lanes) for first, one in executions(status(tmp_path / "run"))] == [(0, None), (8, 1)]


@pytest.mark.parametrize("moment", ["noted", "done"])
def test_a_kill_during_a_rollback_changes_no_bit(whole, garbage, data, tmp_path, monkeypatch, moment, record):
    run = tmp_path / "run"
    finish = Member._finish_rollback

    def killed(self):
        if moment == "done":
            finish(self)
        raise RuntimeError("killed")

    with monkeypatch.context() as patch:
        patch.setattr(Member, "_finish_rollback", killed)
        with pytest.raises(RuntimeError, match="killed"):
            train(CONFIG, TRAIN, HPARAMS, data=data, run=run, steps=STEPS, shell=SHELL)
    assert [back["done"] for back in status(run)["rollbacks"]] == [moment == "done"]
    assert len(record(run)) == 10, "the record is not cut yet"
    if moment == "noted":  # a checkpoint that the rollback has yet to remove
        checkpoints = Checkpoints(run)
        checkpoints.save(9, state_at(run, 8))
        checkpoints.close()
    train(CONFIG, TRAIN, HPARAMS, data=data, run=run, steps=STEPS, shell=SHELL)
    assert record(run) == record(whole[0].run)
    assert status(run)["rollbacks"] == status(whole[0].run)["rollbacks"]


def test_a_damaged_goal_of_a_rollback_costs_one_checkpoint(whole, garbage, data, tmp_path, record, crash):
    """The run goes on from the one before, through what it had seen, and passes over the data as it did."""
    run = tmp_path / "run"
    with crash(13):
        train(CONFIG, TRAIN, HPARAMS, data=data, run=run, steps=STEPS, shell=SHELL)
    (run / "checkpoints" / "8" / "checkpoint.json").write_text("{}")
    train(CONFIG, TRAIN, HPARAMS, data=data, run=run, steps=STEPS, shell=SHELL)
    assert record(run) == record(whole[0].run)


def test_data_that_stay_bad_are_a_divergence(data, tmp_path, monkeypatch, record):
    Stream(monkeypatch, range(10 * ROWS, 10**6))
    result = train(CONFIG, TRAIN, HPARAMS, data=data, run=tmp_path / "run", steps=STEPS, shell=SHELL)
    assert (result.status, result.rollbacks) == ("diverged", 2)
    assert [back["at"] for back in status(tmp_path / "run")["rollbacks"]] == [11, 9]
    assert result.steps == 9
    assert len(record(tmp_path / "run")) == 8
    for leaf in jax.tree.leaves(result.params):
        assert np.isfinite(leaf).all()


@pytest.mark.long
def test_one_lane_goes_back_alone(data, tmp_path, monkeypatch, record):
    """Its neighbour, whose data are sound, changes no bit."""
    plain = PhasedLoader.batch

    def batch(self, step, rows=None, *, skipped_rows=0):
        made = plain(self, step, rows, skipped_rows=skipped_rows)
        if self.seed == 1 and step * ROWS + skipped_rows == GARBAGE.start:
            made["targets"][:] = 20
        return made

    monkeypatch.setattr(PhasedLoader, "batch", batch)
    lanes = [HPARAMS, HPARAMS.replace(seed=1)]
    runs = [[tmp_path / f"{name}-{number}" for number in range(2)] for name in ("with", "without")]
    results = population(CONFIG, TRAIN, lanes, data=data, runs=runs[0], steps=STEPS, shell=SHELL)
    assert [(result.status, result.rollbacks) for result in results] == [("finished", 0), ("finished", 1)]
    monkeypatch.undo()
    population(CONFIG, TRAIN, lanes, data=data, runs=runs[1], steps=STEPS, shell=SHELL)
    assert record(runs[0][0]) == record(runs[1][0])
    assert record(runs[0][1])[:8] == record(runs[1][1])[:8]


def assert_equal(one, other):
    for left, right in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(left, right)
