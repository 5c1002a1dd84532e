"""A lane is its solo run: sharing a program with others changes nothing but the compile count."""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import InputError, presets
from train import HParams, Shell, TrainConfig, init_state, population, train, train_step
from train.compile import compiled_programs
from train.data import Loader
from train.metrics import read_metrics
from train.run import Identity

pytestmark = pytest.mark.usefixtures("optimised")

CONFIG = presets.get("tiny").replace(vocab_size=320, max_seq_len=32)
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=32, schedule="cosine", dropout=True, max_skipped=2)
STEPS, FIRST = 200, 40
QUIET = Shell(evaluate_tokens=512)
LANES = [  # everything that is traced, at once
    HParams(
        learning_rate=2e-3 * 1.4**i,
        weight_decay=0.05 * i,
        beta1=0.85 + 0.015 * i,
        beta2=0.9 + 0.01 * i,
        clip_norm=0.25 * (i % 4),
        warmup_steps=3 * i,
        total_steps=STEPS + 20 * i,
        dropout_rate=0.02 * i,
        z_loss=1e-4 * i,
        init_scale=0.7 + 0.1 * i,
        seed=i % 3,
    )
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
    results = population(CONFIG, TRAIN_CONFIG, LANES, data=data, runs=runs, steps=FIRST, shell=QUIET)
    assert [result.status for result in results] == ["finished"] * 8
    return runs


# As accelerators run them; of another static shape, so that no program of lanes that lie apart is taken for it.
STACKED = CONFIG.replace(norm_epsilon=1.1e-5)


@pytest.fixture(scope="module", params=["apart", "stacked"])
def whole(request, optimised, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """(config, run folders) of eight lanes over all their steps."""
    config = STACKED if request.param == "stacked" else CONFIG
    folder = tmp_path_factory.mktemp(request.param)
    runs = [folder / str(i) for i in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "stacked":
            patch.setattr(jax, "default_backend", lambda: "gpu")
        population(config, TRAIN_CONFIG, LANES, data=data, runs=runs, steps=STEPS, shell=QUIET)
    return config, runs


@pytest.mark.long  # two compilations more
@pytest.mark.parametrize("lane", range(8))
def test_lane_equals_its_solo_run(whole, data, tmp_path, lane):
    config, runs = whole
    solo = train(config, TRAIN_CONFIG, LANES[lane], data=data, run=tmp_path / "run", steps=STEPS, shell=QUIET)
    alone, together = losses(tmp_path / "run"), losses(runs[lane])
    assert len(alone) == len(together) == STEPS
    # Rounding grows with the learning rate; a weight that is one ulp off shows by how much.
    control = abs(solo_losses(LANES[lane], data, True)[-1] / solo_losses(LANES[lane], data, False)[-1] - 1)
    assert abs(together[-1] / alone[-1] - 1) <= max(1e-5, 10 * control)
    if config is CONFIG:
        np.testing.assert_allclose(alone, solo_losses(LANES[lane], data, False), rtol=max(1e-5, 10 * control))
    validation = read_metrics(runs[lane])[-1]["validation_loss"]
    assert abs(validation / solo.validation_loss - 1) <= max(1e-5, 10 * control)


@pytest.mark.long
def test_lanes_side_by_side_change_no_bit_of_each_other(data, tmp_path, monkeypatch):
    """What accelerators do: stacked and vmapped. One that overflows, one that ends, and padding leave the others be."""
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    config = CONFIG.replace(norm_epsilon=1.2e-5)  # another static shape, so that nothing compiled is used again
    before = compiled_programs()

    def run(name, hparams, **arguments):
        runs = [tmp_path / f"{name}-{i}" for i in range(len(hparams))]
        shell = Shell(evaluate_tokens=128, compact=False)
        results = population(config, TRAIN_CONFIG, hparams, data=data, runs=runs, shell=shell, **arguments)
        return results, [losses(folder) for folder in runs]

    _, whole = run("whole", LANES[:4], steps=20)
    wild = [LANES[0], LANES[1].replace(learning_rate=1e30, clip_norm=0), *LANES[2:4]]
    results, others = run("wild", wild, steps=[20, 20, 7, 20])
    padded, fewer = run("padded", LANES[:3], steps=20, lanes=4)
    monkeypatch.undo()
    assert compiled_programs() - before == 1
    assert [result.status for result in results] == ["finished", "diverged", "finished", "finished"]
    for lane, steps in ((0, 20), (2, 7), (3, 20)):
        np.testing.assert_array_equal(others[lane], whole[lane][:steps])
    for lane in range(3):
        np.testing.assert_array_equal(fewer[lane], whole[lane])
    alone = train(config, TRAIN_CONFIG, LANES[2], data=data, run=tmp_path / "solo", steps=20, shell=QUIET)
    assert abs(padded[2].loss / alone.loss - 1) <= 1e-5


def test_fewer_lanes_change_no_bit(eight, data, tmp_path):
    runs = [tmp_path / str(i) for i in range(3)]
    before = compiled_programs()
    shared = {"data": data, "runs": runs, "steps": [20, 7, 20], "shell": QUIET}
    results = population(CONFIG, TRAIN_CONFIG, LANES[:3], lanes=8, **shared)
    assert compiled_programs() == before
    assert [result.steps for result in results] == [20, 7, 20]
    for run, whole, steps in zip(runs, eight, (20, 7, 20), strict=False):
        np.testing.assert_array_equal(losses(run), losses(whole)[:steps])
    with pytest.raises(InputError, match="lanes=2 is fewer than the 3 trials"):
        population(CONFIG, TRAIN_CONFIG, LANES[:3], lanes=2, **shared)


def test_lanes_of_other_seeds_can_share_the_order_of_the_data(data, tmp_path):
    lanes = [HParams(learning_rate=0, seed=0, data_seed=0), *[HParams(learning_rate=0, seed=0, data_seed=7)] * 7]
    lanes[2] = lanes[2].replace(seed=1)
    runs = [tmp_path / str(i) for i in range(8)]
    population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=3, shell=QUIET)
    own = population(CONFIG, TRAIN_CONFIG, lanes[:1], lanes=8, data=data, runs=[tmp_path / "own"], steps=3, shell=QUIET)
    assert own[0].loss == losses(runs[0])[-1]
    assert losses(runs[0])[-1] != losses(runs[1])[-1]  # the same weights on other text
    assert losses(runs[1])[-1] == losses(runs[3])[-1] != losses(runs[2])[-1]
    plain, named = (HParams(seed=3), HParams(seed=3, data_seed=3))
    identities = [Identity(CONFIG, TRAIN_CONFIG, hparams, "hash") for hparams in (plain, named)]
    assert "data_seed" not in identities[0].to_dict()["hparams"]  # as of runs from before there was such a field
    assert identities[0].run_id != identities[1].run_id


def test_diverged_lane_is_frozen_and_changes_no_other_lanes_bits(eight, data, tmp_path):
    lanes = [LANES[0], LANES[1].replace(learning_rate=1e30, clip_norm=0), *LANES[2:]]
    runs = [tmp_path / str(i) for i in range(8)]
    results = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=40, shell=QUIET)
    assert [result.status for result in results] == ["finished", "diverged", *["finished"] * 6]
    assert results[1].validation_loss is None
    assert results[1].skipped == TRAIN_CONFIG.max_skipped <= results[1].steps < 10
    assert json.loads((runs[1] / "run.json").read_text())["status"] == "diverged"
    for leaf in jax.tree.leaves(results[1].params):
        assert np.isfinite(leaf).all()
    for i in (0, *range(2, 8)):
        np.testing.assert_array_equal(losses(runs[i]), losses(eight[i])[:40])
    again = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs, steps=40, shell=QUIET)
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
