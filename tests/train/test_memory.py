"""What a step needs of a device's memory, and how many cuts make it fit."""

from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from model import Execution, ModelConfig
from model.errors import InputError
from model.sharding import make_mesh
from train import HParams, Phase, Shell, TrainConfig, train
from train.lanes.build import compile_program
from train.loop.memory import Memory, device_memory
from train.loop.microbatch import choose_microbatches
from train.plan import Plan
from train.run.metrics import read_metrics

CONFIG = ModelConfig(vocab_size=320, d_model=16, num_layers=1, num_heads=2, d_ff=32, max_seq_len=32, rope_base=9_005.0)
TRAIN = TrainConfig(batch_size=16, seq_len=32, norms=False)
STEPS = 4


def of_cuts(cuts):
    stage = Plan.of(TRAIN, 1).stages[0]
    return compile_program(CONFIG, TRAIN, 1, make_mesh(None), stage, Execution(accumulate=cuts)).memory


def just_enough_for(cuts):
    """Bytes of a device that holds so many cuts of the batch, but not half as many."""
    return int(of_cuts(cuts).total / 0.92) + 1


def losses(data, run, **shell):
    shell = Shell(evaluate_tokens=256, **shell)
    train(CONFIG, TRAIN, HParams(), data=data, run=run, steps=STEPS, shell=shell)
    return np.array([line["loss"] for line in read_metrics(run)])


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory):
    return losses(data, tmp_path_factory.mktemp("whole") / "run")


def test_memory_of_a_program():
    x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
    size = 4 * 256 * 256
    plain = Memory.of(jax.jit(lambda x: (x + 1, x.sum())).lower(x).compile())
    assert size * 2 <= plain.state < size * 2 + 1024
    donated = Memory.of(jax.jit(lambda x: x + 1, donate_argnums=0).lower(x).compile())
    assert size <= donated.state < size + 1024, "what is donated counts once"
    chain = Memory.of(jax.jit(lambda x: jnp.sin(x @ x) @ jnp.cos(x @ x.T)).lower(x).compile())
    assert chain.temporary >= 2 * size
    assert chain.total == chain.state + chain.temporary
    assert chain.fits(2 * chain.total)
    assert not chain.fits(chain.total), "the runtime needs some too"
    assert "1.0 MiB of 1.00 GiB per device" in chain.describe(2**30)
    assert device_memory() > 2**20


@pytest.mark.long
def test_cuts_need_less():
    totals = [of_cuts(cuts).total for cuts in (1, 2, 4)]
    assert totals == sorted(totals, reverse=True)
    assert totals[2] < 0.6 * totals[0]
    assert len({of_cuts(cuts).state for cuts in (1, 2, 4)}) == 1


@pytest.mark.parametrize("cuts", [1, 2, 4])
def test_auto_takes_as_few_cuts_as_fit(cuts):
    shell = Shell(microbatch="auto", memory=just_enough_for(cuts))
    assert choose_microbatches(CONFIG, TRAIN, 1, make_mesh(None), shell, Execution()).accumulate == cuts


def test_auto_goes_on_from_the_number_that_a_run_has():
    for memory, expected in ((just_enough_for(1), 2), (just_enough_for(4), 4)):
        shell = Shell(microbatch="auto", memory=memory)
        found = choose_microbatches(CONFIG, TRAIN, 1, make_mesh(None), shell, Execution(accumulate=2))
        assert found.accumulate == expected


@pytest.mark.parametrize("shell", [{"microbatch": "auto"}, {"microbatch": 4}, {"microbatch": "4"}])
def test_a_run_in_cuts_is_the_run(data, tmp_path, whole, shell, capsys):
    memory = just_enough_for(4)
    cut = losses(data, tmp_path / "run", memory=memory, announce=True, **shell)
    np.testing.assert_allclose(cut, whole, rtol=1e-5)
    said = capsys.readouterr().err
    assert "for 16 × 32 tokens in 4 microbatches" in said
    assert f"{of_cuts(4).total / 2**20:.1f} MiB of {memory / 2**20:.1f} MiB per device" in said


def test_a_run_may_go_on_in_other_cuts(data, tmp_path, whole):
    """They change rounding alone, so they are no part of what a run is."""
    for steps, microbatch in ((2, 8), (STEPS, 4)):
        shell = Shell(evaluate_tokens=256, microbatch=microbatch)
        hparams = HParams(total_steps=STEPS)
        train(CONFIG, TRAIN, hparams, data=data, run=tmp_path / "run", steps=steps, shell=shell)
    np.testing.assert_allclose([line["loss"] for line in read_metrics(tmp_path / "run")], whole, rtol=1e-5)


def test_phases_are_cut_alike(monkeypatch):
    """One number of cuts for all stages, which the smallest batch can be cut into."""

    def compile_nothing(config, train_config, lanes, mesh, stage, execution, objective):
        assert stage.phase == "large"
        return SimpleNamespace(memory=Memory(0, 1600 // execution.accumulate))

    monkeypatch.setattr("train.loop.microbatch.compile_program", compile_nothing)
    phases = (Phase("small", 256, (4,)), Phase("large", 2048, (16,)))
    train_config = TRAIN.replace(phases=phases)
    choose = lambda **shell: choose_microbatches(CONFIG, train_config, 1, make_mesh(None), Shell(**shell), Execution())
    cuts = lambda memory: choose(microbatch="auto", memory=memory).accumulate
    assert [cuts(memory) for memory in (2000, 1000, 500)] == [1, 2, 4]
    with pytest.raises(InputError, match=r"one row at a time still needs 0\.0 MiB of 0\.0 MiB"):
        cuts(400)
    with pytest.raises(InputError, match="batch_size=4"):
        choose(microbatch=2)


@pytest.mark.parametrize(
    ("shell", "words"),
    [
        ({"microbatch": 3}, "microbatch=3 .* batch of 16 rows"),
        ({"microbatch": 0}, "microbatch=0 .* batch of 16 rows"),
        ({"microbatch": "some"}, "microbatch=some is neither auto"),
    ],
)
def test_impossible_cuts_are_refused_before_anything_is_written(data, tmp_path, shell, words):
    with pytest.raises(InputError, match=words):
        losses(data, tmp_path / "run", **shell)
    assert not (tmp_path / "run").exists()
