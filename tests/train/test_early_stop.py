"""A run whose validations no longer improve ends early, at a step that restarts and neighbours do not move."""

import functools
import json

import jax
import numpy as np
import pytest

from model import InputError, ModelConfig
from train import HParams, Shell, TrainConfig, population, train
from train.loop.loop import Loop
from train.loop.member import Member
from train.objectives import LanguageModeling
from train.run.best import Best, improves
from train.run.checkpoint import Checkpoints

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_011.0)
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=16, norms=False)
STEPS, STOP = 16, 10
LOSSES = {2: 5.0, 4: 4.0, 6: 4.5, 8: float("nan"), 10: 4.2, 12: 3.0, 14: 3.5, 16: 3.6}
"""By step; with a patience of 3 the run ends at step 10."""


def shell(patience=3, **options):
    options = {"keep_best": True, "checkpoint_every": 3} | options
    return Shell(evaluate_every=2, evaluate_tokens=64, patience=patience, **options)


def go(data, run, seed=0, **options):
    return train(CONFIG, TRAIN_CONFIG, HParams(seed=seed), data=data, run=run, steps=STEPS, shell=shell(**options))


def noted(run):
    return json.loads((run / "run.json").read_text())


def kept(run):
    return Checkpoints(run, read_only=True).steps()


@pytest.fixture
def losses(monkeypatch):
    """(seed, step) → the validation loss there; for seeds that are not in it, what is measured."""
    plain, given = Loop._evaluate, {0: LOSSES}

    def evaluate(loop, lane):
        member = loop.members[loop.slots.members[lane]]
        known = given.get(int(member.hparams.seed))
        return plain(loop, lane) if known is None else [np.array([known[member.step], 1.0])]

    monkeypatch.setattr(Loop, "_evaluate", evaluate)
    return given


@pytest.fixture
def whole(data, tmp_path, losses):
    """A run without patience."""
    result = go(data, tmp_path / "whole", patience=0)
    assert (result.status, result.steps, result.stopped_early) == ("finished", STEPS, None)
    return result


def assert_same_bits(one, other):
    jax.tree.map(np.testing.assert_array_equal, one.params, other.params)


def test_a_killed_run_stops_at_the_same_step_and_more_patience_goes_on(data, tmp_path, whole, record, crash):
    uninterrupted, run = go(data, tmp_path / "uninterrupted"), tmp_path / "killed"
    early = {"metric": "validation_loss", "best_step": 4, "best": 4.0, "patience": 3}
    assert (uninterrupted.status, uninterrupted.steps, uninterrupted.validation_loss) == ("finished", STOP, 4.2)
    assert uninterrupted.stopped_early == noted(uninterrupted.run)["stopped_early"] == early
    assert kept(uninterrupted.run) == [4, 9, 10]
    for step in (5, 8):
        with crash(step):
            go(data, run)
    with pytest.MonkeyPatch.context() as patch:  # killed between the last checkpoint and the note in run.json
        patch.setattr(Member, "end", lambda *arguments: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            go(data, run)
    resumed = go(data, run)
    assert (resumed.status, resumed.steps, resumed.stopped_early) == ("finished", STOP, early)
    assert record(run) == record(uninterrupted.run) == record(whole.run)[:STOP]
    assert_same_bits(resumed, uninterrupted)

    before = [path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.name != ".lock"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("train.loop.train.Loop", None)
        for patience in (3, 2):
            assert go(data, run, patience=patience).stopped_early == early
    assert before == [path.stat().st_mtime_ns for path in sorted(run.rglob("*")) if path.name != ".lock"]

    longer = go(data, run, patience=4)  # the validation of step 12 is a best one
    assert (longer.status, longer.steps, longer.stopped_early) == ("finished", STEPS, None)
    assert "stopped_early" not in noted(run)
    without = go(data, uninterrupted.run, patience=0)
    for result in (longer, without):
        assert record(result.run) == record(whole.run)
        assert_same_bits(result, whole)
    assert kept(run) == [12, 15, 16]


def test_a_lane_stops_and_changes_no_bit_of_its_neighbours(data, tmp_path, losses, record):
    """The first lane improves to its end, the second never does, the third until step 4."""
    losses |= {0: {step: 1 / step for step in LOSSES}, 1: dict.fromkeys(LOSSES, 2.0), 2: LOSSES}
    lanes = [HParams(seed=seed) for seed in range(3)]

    def side_by_side(name, patience):
        runs = [tmp_path / f"{name}-{seed}" for seed in range(3)]
        options = shell(patience, keep_best=False)
        return population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=STEPS, shell=options)

    plain, patient = side_by_side("plain", 0), side_by_side("patient", 2)
    assert [result.steps for result in patient] == [STEPS, 6, 8]
    assert [result.stopped_early is None for result in patient] == [True, False, False]
    assert patient[2].stopped_early["best_step"] == 4
    for one, other in zip(plain, patient, strict=True):
        assert record(other.run) == record(one.run)[: other.steps]
    assert_same_bits(plain[0], patient[0])


def test_a_metric_that_rises_as_it_improves(data, tmp_path, losses, monkeypatch):
    plain = Member._bits

    def bits(member, nats, split, prefix):
        return plain(member, nats, split, prefix) | ({f"{prefix}accuracy": nats} if prefix else {})

    monkeypatch.setattr(Member, "_bits", bits)
    monkeypatch.setattr(LanguageModeling, "validation_metrics", ("validation_loss", "validation_accuracy"))
    losses[0] = {2: 0.5, 4: 0.8, 6: 0.7, 8: 0.8, 10: 0.6}
    result = go(data, tmp_path / "run", keep_best="validation_accuracy", checkpoint_every=0)
    early = {"metric": "validation_accuracy", "best_step": 4, "best": 0.8, "patience": 3}
    assert (result.steps, result.stopped_early) == (10, early)
    assert 4 in kept(result.run)
    scores = [json.loads((result.run / f"checkpoints/{step}/checkpoint.json").read_text()) for step in (4, 10)]
    assert [(about["metric"], about["score"]) for about in scores] == [
        ("validation_accuracy", 0.8),
        ("validation_accuracy", 0.6),
    ]


def test_which_value_is_better():
    inf, nan = float("inf"), float("nan")
    for rises in (False, True):
        better = functools.partial(improves, higher_is_better=rises)
        low, high = (2.0, 1.0) if rises else (1.0, 2.0)
        assert better(low, high)
        assert not better(high, low)
        assert not better(1.0, 1.0)
        assert better(1.0, None)
        assert not any(better(value, None) for value in (None, nan, inf, -inf))
    lines = [{"step": 1, "loss": 9.0}, *({"step": step, "validation_loss": None} for step in (2, 4))]
    assert Best.of("validation_loss", lines) == Best("validation_loss", validated=4, without=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"keep_best": "validation_acuracy"},
            "'validation_acuracy' is not measured by this run, which measures validation_loss, "
            "validation_perplexity, validation_bits_per_byte",
        ),
        ({"keep_best": ""}, "keep_best='' is not measured by this run"),
        ({"patience": -1}, "patience=-1 must be a whole number of at least 0"),
        ({"patience": 2}, "without evaluate_every there is one at the end only; set evaluate_every"),
    ],
)
def test_bad_input_writes_nothing(data, tmp_path, options, message):
    with pytest.raises(InputError, match=message):
        train(CONFIG, TRAIN_CONFIG, HParams(), data=data, run=tmp_path / "run", steps=4, shell=Shell(**options))
    assert not list(tmp_path.iterdir())
