"""A lane is its solo run, vmapped or sequential, to rounding over 200 steps."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import presets
from train import HParams, Shell, TrainConfig, init_state, population, train, train_step
from train.data import Loader
from train.lanes.build import compiled_programs
from train.run.metrics import read_metrics

pytestmark = [pytest.mark.long, pytest.mark.usefixtures("optimised")]

CONFIG = presets.get("tiny").replace(vocab_size=320, max_seq_len=32)
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=32, schedule="cosine", dropout=True, max_skipped=2)
STEPS = 200
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


# As accelerators run them; of another static shape, so that no sequential program is taken for it.
VMAPPED = CONFIG.replace(norm_epsilon=1.1e-5)


@pytest.fixture(scope="module", params=["sequential", "vmapped"])
def whole(request, optimised, data: Path, tmp_path_factory: pytest.TempPathFactory):
    """(config, run folders) of eight lanes over all their steps."""
    config = VMAPPED if request.param == "vmapped" else CONFIG
    folder = tmp_path_factory.mktemp(request.param)
    runs = [folder / str(i) for i in range(8)]
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "vmapped":
            patch.setattr(jax, "default_backend", lambda: "gpu")
        population(config, TRAIN_CONFIG, LANES, data=data, runs=runs, steps=STEPS, shell=QUIET)
    return config, runs


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


def test_vmapped_lanes_change_no_bit_of_each_other(data, tmp_path, monkeypatch):
    """Vmapped lanes, as on accelerators: one that overflows, one that ends, and padding change no other lane."""
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
