"""A lane is its solo run: sharing a program with others changes nothing but the compile count."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import presets
from train import HParams, Shell, TrainConfig, init_state, population, train, train_step
from train.data import Loader
from train.metrics import read_metrics

pytestmark = pytest.mark.usefixtures("optimised")

CONFIG = presets.get("tiny").replace(vocab_size=320, max_seq_len=32)
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=32, schedule="cosine", max_skipped=2)
STEPS = 50
QUIET = Shell(evaluate_tokens=512)
LANES = [
    HParams(learning_rate=2e-3 * 1.5**i, weight_decay=0.05 * i, beta2=0.9 + 0.01 * i, warmup_steps=i, seed=i % 3)
    for i in range(8)
]


def losses(run: Path) -> np.ndarray:
    return np.array([record["loss"] for record in read_metrics(run)])


@functools.cache
def jitted():
    """The pure functions, compiled once."""
    return [jax.jit(functools.partial(function, CONFIG, TRAIN_CONFIG)) for function in (init_state, train_step)]


@functools.cache
def solo_losses(hparams: HParams, data: Path, nudge: bool) -> np.ndarray:
    """The pure functions alone, in a loop; with `nudge`, one weight starts one ulp off."""
    hparams = hparams.replace(total_steps=STEPS)
    init, step = jitted()
    state = init(hparams)
    if nudge:
        tokens = state.params["embedding"]["tokens"]
        tokens = tokens.at[5, 3].set(jnp.nextafter(tokens[5, 3], jnp.inf))
        state.params["embedding"]["tokens"] = tokens
    loader = Loader(data, batch_size=4, seq_len=32, seed=int(hparams.seed))
    result = []
    for i in range(STEPS):
        state, metrics = step(state, loader.batch(i), hparams)
        result.append(float(metrics["loss"]))
    return np.array(result)


@pytest.fixture(scope="module")
def eight(optimised, data: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("lanes")
    runs = [folder / str(i) for i in range(8)]
    results = population(CONFIG, TRAIN_CONFIG, LANES, data=data, runs=runs, steps=STEPS, shell=QUIET)
    assert [result.status for result in results] == ["finished"] * 8
    return runs


@pytest.mark.parametrize("lane", [0, 7])
def test_lane_equals_its_solo_run(eight, data, tmp_path, lane):
    solo = train(CONFIG, TRAIN_CONFIG, LANES[lane], data=data, run=tmp_path / "run", steps=STEPS, shell=QUIET)
    alone, together = losses(tmp_path / "run"), losses(eight[lane])
    assert len(alone) == len(together) == STEPS
    # Rounding grows with the learning rate; a weight that is one ulp off shows by how much.
    control = abs(solo_losses(LANES[lane], data, True)[-1] / solo_losses(LANES[lane], data, False)[-1] - 1)
    assert abs(together[-1] / alone[-1] - 1) <= max(1e-5, 10 * control)
    np.testing.assert_allclose(alone, solo_losses(LANES[lane], data, False), rtol=max(1e-5, 10 * control))
    validation = read_metrics(eight[lane])[-1]["validation_loss"]
    assert abs(validation / solo.validation_loss - 1) <= max(1e-5, 10 * control)


@pytest.mark.long
def test_vmapped_lanes_equal_lanes_in_turn(eight, data, tmp_path, monkeypatch):
    """What accelerators do: side by side."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = CONFIG.replace(norm_epsilon=1.1e-5)  # another static shape, so that nothing compiled is used again
    runs = [tmp_path / str(i) for i in range(4)]
    population(config, TRAIN_CONFIG, LANES[:4], data=data, runs=runs[:4], steps=20, shell=QUIET)
    monkeypatch.undo()
    alone = train(config, TRAIN_CONFIG, LANES[2], data=data, run=tmp_path / "solo", steps=20, shell=QUIET)
    assert abs(losses(runs[2])[-1] / alone.loss - 1) <= 1e-5


def test_diverged_lane_is_frozen_and_changes_no_other_lanes_bits(eight, data, tmp_path):
    lanes = [LANES[0], LANES[1].replace(learning_rate=1e30, clip_norm=0), *LANES[2:]]
    runs = [tmp_path / str(i) for i in range(8)]
    results = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=STEPS, shell=QUIET)
    assert [result.status for result in results] == ["finished", "diverged", *["finished"] * 6]
    assert results[1].validation_loss is None
    assert results[1].skipped == TRAIN_CONFIG.max_skipped <= results[1].steps < 10
    assert json.loads((runs[1] / "run.json").read_text())["status"] == "diverged"
    for leaf in jax.tree.leaves(results[1].params):
        assert np.isfinite(leaf).all()
    for i in (0, *range(2, 8)):
        np.testing.assert_array_equal(losses(runs[i]), losses(eight[i]))
    again = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=STEPS, shell=QUIET)
    assert [dataclasses.asdict(result) for result in again] == [dataclasses.asdict(result) for result in results]


def test_lanes_end_at_their_own_horizons(data, tmp_path):
    horizons = [5, 12, 8, 5, 5, 6, 7, 1]  # eight, for which other tests have compiled
    lanes = [HParams(total_steps=steps, warmup_steps=2) for steps in horizons]
    runs = [tmp_path / str(i) for i in range(8)]
    results = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, shell=QUIET)
    assert [result.steps for result in results] == horizons
    solo = train(CONFIG, TRAIN_CONFIG, lanes[0], data=data, run=tmp_path / "solo", shell=QUIET)
    assert solo.validation_loss == pytest.approx(results[0].validation_loss, rel=1e-5)
    assert len(losses(runs[2])) == 8
