"""Replays on surfaces whose best region is known."""

import csv
import dataclasses
import importlib.util
import itertools
import json
import math

import numpy as np
import pytest

from experiments.sweep.search.policies import Halving
from experiments.sweep.search.recorded import Recorded, read_recorded
from experiments.sweep.search.replay import compare_samplers, quartiles, replay_search
from experiments.sweep.search.replay_halving import RecordedRun, replay_halving
from experiments.sweep.trial import Trial
from model import InputError, presets
from train import HParams, Recipe, TrainConfig

AXES = {
    "learning_rate": [1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2],
    "weight_decay": [0.0, 0.01, 0.03, 0.1, 0.3],
    "warmup_fraction": [0.0, 0.05, 0.1, 0.2],
}


def surface(point) -> float:
    """A curved valley over the ranks, like Branin's, with one lowest point at (3, 2, 1)."""
    x, y, z = (values.index(value) for values, value in zip(AXES.values(), point, strict=True))
    return 3 + 0.15 * (x - 3) ** 2 + 0.1 * (y - 2 + 0.5 * (x - 3)) ** 2 + 0.05 * (z - 1) ** 2


@pytest.fixture(scope="module")
def recorded():
    random = np.random.default_rng(0)
    points = itertools.product(*AXES.values())
    return Recorded(
        AXES, {point: [float(surface(point) + 0.02 * random.normal()) for _ in range(3)] for point in points}
    )


def test_the_best_region_holds_the_truth_and_the_noise_is_recovered(recorded):
    truth = (8e-3, 0.03, 0.05)
    assert recorded.seed_noise == pytest.approx(0.02, rel=0.25)
    assert recorded.best in recorded.best_region
    assert truth in recorded.best_region
    assert all(surface(point) < surface(truth) + 0.1 for point in recorded.best_region)
    lost = dataclasses.replace(recorded, losses=recorded.losses | {truth: [3.0, None, 2.0]})
    assert truth not in lost.best_region
    single = dataclasses.replace(recorded, losses={point: losses[:1] for point, losses in recorded.losses.items()})
    assert single.best_region == {single.best}


def test_a_random_search_finds_the_region_as_fast_as_chance_says(recorded):
    share = len(recorded.best_region) / len(recorded.losses)
    document = compare_samplers(recorded, ["random"], replays=40, budget=40)
    first = [math.inf if n is None else n for n in document.samplers["random"].first]
    # 1 - (1 - share)^n of the searches have been there after n trials.
    for trials in (5, 15, 40):
        expected = 1 - (1 - share) ** trials
        assert np.mean([n <= trials for n in first]) == pytest.approx(expected, abs=0.2)


@pytest.mark.slow
def test_a_model_of_the_losses_needs_fewer_trials_than_chance(recorded):
    found = compare_samplers(recorded, ["random", "tpe"], replays=5, budget=40).samplers
    mean = {name: np.mean([40 if n is None else n for n in one.first]) for name, one in found.items()}
    assert mean["tpe"] < 0.8 * mean["random"]


@pytest.mark.long
@pytest.mark.skipif(not importlib.util.find_spec("torch"), reason="the Gaussian process needs torch")
def test_so_does_a_gaussian_process(recorded):
    found = compare_samplers(recorded, ["random", "gp"], replays=5, budget=40).samplers
    mean = {name: np.mean([40 if n is None else n for n in one.first]) for name, one in found.items()}
    assert mean["gp"] < 0.8 * mean["random"]


def test_a_replay_is_its_seed_and_is_settled_only_after_it_was_there(recorded):
    for seed in range(4):
        one = replay_search(recorded, "random", seed, 60, batch=4)
        assert one == replay_search(recorded, "random", seed, 60, batch=4)
        assert one.settled is None or (one.first is not None and one.first <= one.settled)
    assert quartiles([5, None, 3, 1]) == [1, 3, 5]
    assert quartiles([None, None, None, 1]) == [1, None, None]


def test_diverged_points_are_answers_too():
    losses: dict = {(rate,): [rate] for rate in range(1, 6)}
    recorded = Recorded({"rate": list(range(1, 6))}, losses | {(6,): [None]})
    recorded = dataclasses.replace(recorded, axes={"rate": list(range(1, 7))})
    assert replay_search(recorded, "tpe", 0, 30).settled is not None


def write(path, rows):
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def test_a_table_of_results_is_read_back(recorded, tmp_path):
    rows = [
        {"id": f"{i}-{seed}", **recorded.named(point), "seed": seed, "state": "finished", "loss": loss, "steps": 9}
        for i, (point, losses) in enumerate(recorded.losses.items())
        for seed, loss in enumerate(losses)
    ]
    write(tmp_path / "results.csv", rows)
    assert read_recorded(tmp_path / "results.csv") == recorded
    write(tmp_path / "part.csv", rows[3:])
    with pytest.raises(InputError, match="99 of the 100 points"):
        read_recorded(tmp_path / "part.csv")
    write(tmp_path / "open.csv", [rows[0] | {"state": "running"}])
    with pytest.raises(InputError, match="a run that is running"):
        read_recorded(tmp_path / "open.csv")
    write(tmp_path / "other.csv", [{"x": 1}])
    with pytest.raises(InputError, match="no column 'loss'"):
        read_recorded(tmp_path / "other.csv")
    with pytest.raises(InputError, match="did you mean 'learning_rate'"):
        read_recorded(tmp_path / "results.csv", ["learningrate"])


def test_the_command_writes_its_numbers_and_a_figure(recorded, tmp_path, isoflop):
    write(
        tmp_path / "r.csv",
        [recorded.named(p) | {"loss": loss} for p, losses in recorded.losses.items() for loss in losses],
    )
    few = ("--samplers", "random", "--replays", 5, "--trials", 30)
    files = ("--json", tmp_path / "r.json", "--plot", tmp_path / "r.svg")
    code, out, _ = isoflop("sweep", "replay", tmp_path / "r.csv", *few, *files)
    assert code == 0
    assert "best region" in out
    document = json.loads((tmp_path / "r.json").read_text())
    assert document["points"] == 100
    assert len(document["samplers"]["random"]["first"]) == 5
    assert (tmp_path / "r.svg").read_text().startswith("<svg")
    code, _, err = isoflop("sweep", "replay", tmp_path / "none.csv")
    assert code == 2
    assert "cannot be read" in err
    code, _, err = isoflop("sweep", "replay", tmp_path / "r.csv", "--samplers", "tpee")
    assert code == 2
    assert "did you mean 'tpe'" in err


def curves(recorded, crossing=0.0):
    """Curves that end at the recorded losses. crossing: how far those of high rates are above the others early on."""
    base = Recipe(presets.get("tiny"), TrainConfig(batch_size=8, seq_len=16), HParams(total_steps=81), steps=81)
    made = []
    for point, losses in recorded.losses.items():
        for seed, end in enumerate(losses):
            values = recorded.named(point)
            recipe = base.replace(hparams=base.hparams.replace(**values, seed=seed))
            early = crossing * AXES["learning_rate"].index(point[0])
            at = {step: end + 3 / step - 3 / 81 + early * (81 - step) / 81 for step in (9, 27, 81)}
            made.append(RecordedRun(Trial(recipe, {**values, "seed": seed}), at, {9: 5.0, 27: 4.0}))
    return made


def test_halving_keeps_the_winner_of_curves_that_never_cross_at_a_quarter_of_the_tokens(recorded):
    document = replay_halving(recorded, curves(recorded), replays=5).to_dict()
    assert document["chosen"] == recorded.named(recorded.best)
    assert document["excess"] == 0
    assert document["within_noise"]
    assert document["rungs"] == "validation"
    assert document["tokens_fraction"] == pytest.approx((100 * 9 + 34 * 18 + 12 * 54) / (100 * 81))
    assert document["one_seed"]["within_noise"] >= 0.8


def test_halving_that_loses_the_winner_says_so(recorded):
    document = replay_halving(recorded, curves(recorded, crossing=5.0), replays=2).to_dict()
    assert not document["within_noise"]
    assert document["excess"] > 3 * recorded.seed_noise


def test_without_validations_at_the_rungs_the_loss_of_training_stands_in(recorded):
    bare = []
    for curve in curves(recorded):
        training = {step: curve.validation[81] + 3 / step for step in range(1, 82)}
        bare.append(RecordedRun(curve.trial, {81: curve.validation[81]}, training))
    document = replay_halving(recorded, bare, replays=2).to_dict()
    assert document["rungs"] == "training"
    assert document["chosen"] == recorded.named(recorded.best)
    with pytest.raises(InputError, match="not on a table"):
        replay_halving(recorded, [])
    assert Halving(81 * 128).gates(bare[0].trial) == (9, 27)
