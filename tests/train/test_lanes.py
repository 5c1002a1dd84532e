"""Lanes share a program and nothing else: what one does, or that it is there, changes no bit of another."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from model import InputError, ModelConfig
from train import HParams, Shell, TrainConfig, population, train
from train.lanes.build import compiled_programs
from train.recipe import Recipe
from train.run.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=16, rope_base=9_007.0)
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=16, dropout=True, max_skipped=2, norms=False)
STEPS = 20
QUIET = Shell(evaluate_tokens=128, checkpoint_start=False)
LANES = [
    HParams(
        learning_rate=2e-3 * 1.4**i,
        weight_decay=0.05 * i,
        clip_norm=0.25 * i,
        warmup_steps=3 * i,
        total_steps=STEPS + 20 * i,
        dropout_rate=0.02 * i,
        seed=i % 3,
    )
    for i in range(4)
]


def losses(run):
    return [record["loss"] for record in read_metrics(run)]


@pytest.fixture(scope="module")
def four(data, tmp_path_factory):
    """The run folders of all lanes."""
    folder = tmp_path_factory.mktemp("lanes")
    runs = [folder / str(i) for i in range(4)]
    results = population(CONFIG, TRAIN_CONFIG, LANES, data=data, runs=runs, steps=STEPS, shell=QUIET)
    assert [result.status for result in results] == ["finished"] * 4
    return runs


def test_fewer_lanes_change_no_bit(four, data, tmp_path):
    runs, wanted = [tmp_path / str(i) for i in range(3)], (12, 7, 12)
    before = compiled_programs()
    shared = {"data": data, "runs": runs, "steps": wanted, "shell": QUIET}
    results = population(CONFIG, TRAIN_CONFIG, LANES[:3], lanes=4, **shared)
    assert compiled_programs() == before
    assert [result.steps for result in results] == list(wanted)
    for run, whole, steps in zip(runs, four, wanted, strict=False):
        assert losses(run) == losses(whole)[:steps]
    with pytest.raises(InputError, match="lanes=2 is fewer than the 3 members"):
        population(CONFIG, TRAIN_CONFIG, LANES[:3], lanes=2, **shared)


def test_lanes_of_other_seeds_can_share_the_order_of_the_data(data, tmp_path):
    seeds = [(0, 0), (0, 7), (1, 7), (0, 7)]
    lanes = [HParams(learning_rate=0, seed=seed, data_seed=data_seed) for seed, data_seed in seeds]
    runs = [tmp_path / str(i) for i in range(4)]
    population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=3, shell=QUIET)
    first, other_order, other_weights, same = (losses(run)[-1] for run in runs)
    assert first != other_order  # the same weights on other text
    assert other_order == same != other_weights
    plain, named = (HParams(seed=3), HParams(seed=3, data_seed=3))
    one, other = (Recipe(CONFIG, TRAIN_CONFIG, hparams) for hparams in (plain, named))
    assert "data_seed" not in one.identity["hparams"]  # as of runs from before there was such a field
    assert one.run_id != other.run_id


def test_diverged_lane_is_frozen_and_changes_no_other_lanes_bits(four, data, tmp_path):
    lanes = [LANES[0], LANES[1].replace(learning_rate=1e30, clip_norm=0), *LANES[2:]]
    runs = [tmp_path / str(i) for i in range(4)]
    shared = {"data": data, "runs": runs, "steps": STEPS, "shell": dataclasses.replace(QUIET, checkpoint_start=True)}
    results = population(CONFIG, TRAIN_CONFIG, lanes, **shared)
    assert [result.status for result in results] == ["finished", "diverged", "finished", "finished"]
    assert results[1].validation_loss is None
    assert results[1].skipped == TRAIN_CONFIG.max_skipped <= results[1].steps < 10
    assert json.loads((runs[1] / "run.json").read_text())["status"] == "diverged"
    for leaf in jax.tree.leaves(results[1].params):
        assert np.isfinite(leaf).all()
    for i in (0, 2, 3):
        assert losses(runs[i]) == losses(four[i])
    again = population(CONFIG, TRAIN_CONFIG, lanes, **shared)
    assert [dataclasses.asdict(result) for result in again] == [dataclasses.asdict(result) for result in results]


def test_lanes_end_at_their_own_horizons(data, tmp_path):
    horizons = [5, 12, 8, 1]
    lanes = [HParams(total_steps=steps, warmup_steps=2) for steps in horizons]
    runs = [tmp_path / str(i) for i in range(4)]
    results = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, shell=QUIET)
    assert [result.steps for result in results] == horizons
    assert [len(losses(run)) for run in runs] == horizons
    solo = train(CONFIG, TRAIN_CONFIG, lanes[0], data=data, run=tmp_path / "solo", shell=QUIET)
    assert solo.validation_loss == results[0].validation_loss
