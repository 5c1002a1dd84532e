"""Eight devices give the losses of one, however state and work are split over them, and hold their share of the state.

The training itself runs in processes with eight CPU devices (sharded.py); here its results are compared.
"""

import functools
import json
import math
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from experiments.evaluate.in_training import task_sets
from model import Execution, presets
from model.sharding import abstract_mesh, parse_mesh, shardings
from train import HParams, Shell, TrainConfig, init_state, population, train
from train.config import Optimizer
from train.run.metrics import read_metrics

CONFIG = presets.get("tiny").replace(vocab_size=320, max_seq_len=32, eos_token_ids=(2,))
ONE = Execution(mesh={"data": 1})
TRAIN_CONFIG = TrainConfig(batch_size=4, seq_len=32, norms=False)
RUN = """
import json, sys
import jax
from experiments.evaluate.in_training import task_sets
from model import Execution, ModelConfig
from train import HParams, Shell, TrainConfig, population

# Programs from the cache can run independent collectives in another order on each device, and wait forever.
jax.config.update("jax_enable_compilation_cache", False)
config, train_config, lanes, steps, mesh = map(json.loads, sys.argv[1:6])
config, train_config = ModelConfig.from_dict(config), TrainConfig.from_dict(train_config)
data, *runs = sys.argv[6:]
shell = Shell(evaluate_tokens=512, compact=True, tasks=task_sets(("induction",), data, 24))
execution = Execution(mesh=mesh)
lanes = [HParams(**hparams) for hparams in lanes]
results = population(config, train_config, lanes, data=data, runs=runs, steps=steps, shell=shell, execution=execution)
print(json.dumps([result.validation_loss for result in results]))
"""
SCRIPT = Path(__file__).with_name("sharded.py")
ALONE = ("data=8", "fsdp=8", "tensor=8", "sequence=8")


@pytest.fixture
def population_on_eight_devices(on_eight_devices, data):
    """The validation losses of runs on a mesh."""

    def run(hparams, steps, mesh, runs):
        settings = [CONFIG.to_dict(), TRAIN_CONFIG.to_dict(), [lane.to_dict() for lane in hparams], steps, mesh]
        return on_eight_devices("-c", RUN, *map(json.dumps, settings), data, *runs)

    return run


@pytest.fixture
def assert_one_device_is_equalled(on_eight_devices):
    def check(model, *meshes, steps=20):
        found = on_eight_devices(SCRIPT, model, steps, "data=1", *meshes)
        one, _ = found.pop("data=1")
        assert len(one) == steps
        assert one[-1] < one[0] / 2  # it learns: losses of steps that change nothing would agree too
        assert set(found) == set(meshes)
        for mesh, (losses, share) in found.items():
            np.testing.assert_allclose(losses, one, rtol=1e-4, err_msg=mesh)
            if mesh == "fsdp=8":
                assert share <= 1 / 8 + 0.05

    return check


@pytest.mark.slow
def test_a_mesh_gives_the_losses_of_one_device(assert_one_device_is_equalled):
    """Axes over which only some of the devices agree; the others, and each alone, take longer."""
    assert_one_device_is_equalled("experts", "fsdp=2,expert=2,sequence=2", steps=10)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "meshes"),
    [
        (
            "dense",
            [*ALONE, "data=2,fsdp=2,tensor=2", "fsdp=2,expert=2,sequence=2", "data=2,expert=2,tensor=2"],
        ),
        ("experts", [*ALONE, "expert=8", "data=2,fsdp=2,tensor=2", "data=2,expert=2,tensor=2"]),
        ("capacity", ["data=8", "expert=8", "data=2,expert=2,tensor=2"]),
    ],
    ids=["dense", "experts", "capacity"],
)
def test_so_do_the_others(assert_one_device_is_equalled, model, meshes):
    assert_one_device_is_equalled(model, *meshes)


@pytest.mark.long
@pytest.mark.parametrize("meshes", [("population=8",), ("population=4,fsdp=2", "population=2,tensor=4")])
def test_lanes_over_devices_are_the_lanes_of_one(on_eight_devices, meshes):
    # Eight steps: rounding grows, and by the tenth one weight's last bit moves a lane's loss by up to 7e-6 of it.
    found = on_eight_devices(SCRIPT, "lanes", 8, "data=1", *meshes)
    one, _ = found.pop("data=1")
    for mesh, (losses, groups) in found.items():
        np.testing.assert_allclose(losses, one, rtol=1e-5, err_msg=mesh)
        per_part = 8 // parse_mesh(mesh)["population"]
        assert bool(groups) == (per_part > 1)
        for group in groups:  # a lane is nobody else's business
            assert len({device // per_part for device in group}) == 1, mesh


@pytest.mark.long
def test_runs_on_a_mesh_record_the_losses_of_one_device(data, tmp_path, population_on_eight_devices):
    hparams, tasks = HParams(learning_rate=1e-2), task_sets(("induction",), data, 24)
    how = {"shell": Shell(evaluate_tokens=512, tasks=tasks), "execution": ONE}
    one = train(CONFIG, TRAIN_CONFIG, hparams, data=data, run=tmp_path / "one", steps=10, **how)
    mesh = {"fsdp": 2, "tensor": 2, "sequence": 2}
    (validation_loss,) = population_on_eight_devices([hparams], 10, mesh, [tmp_path / "eight"])
    assert validation_loss == pytest.approx(one.validation_loss, rel=1e-4)
    losses = [[line["loss"] for line in read_metrics(tmp_path / name)] for name in ("eight", "one")]
    assert len(losses[0]) == 10
    of_tasks = [read_metrics(tmp_path / name)[-1]["induction/bits_per_byte"] for name in ("eight", "one")]
    assert of_tasks[0] == pytest.approx(of_tasks[1], rel=1e-4)
    np.testing.assert_allclose(*losses, rtol=1e-4)


@pytest.mark.long
def test_a_population_over_devices_ends_as_on_one(data, tmp_path, population_on_eight_devices):
    """With padding, lanes that end early and are compacted away, evaluation, checkpoints and their return."""
    steps = [2, 2, 8, 2, 4, 10]
    lanes = [HParams(learning_rate=2e-3 * (i + 1), seed=i, total_steps=20) for i in range(6)]
    runs = [[tmp_path / f"{name}-{i}" for i in range(6)] for name in ("one", "eight")]
    tasks = task_sets(("induction",), data, 24)
    how, mesh = {"shell": Shell(evaluate_tokens=512, tasks=tasks), "execution": ONE}, {"population": 4, "fsdp": 2}
    for more in (0, 2):  # and go on
        steps = [number + more for number in steps]
        one = population(CONFIG, TRAIN_CONFIG, lanes, data=data, runs=runs[0], steps=steps, **how)
        eight = population_on_eight_devices(lanes, steps, mesh, runs[1])
        of_tasks = [[read_metrics(run)[-1]["induction/bits_per_byte"] for run in own] for own in runs]
        np.testing.assert_allclose(*of_tasks, rtol=1e-5)
        np.testing.assert_allclose(eight, [result.validation_loss for result in one], rtol=1e-5)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("lanes", [None, 3])
def test_fsdp_leaves_an_eighth_of_the_state_of_every_optimizer(optimizer, lanes):
    """Whatever an optimizer keeps; fsdp never splits lanes."""
    init = functools.partial(init_state, presets.get("gpt2-small"), TrainConfig(optimizer=optimizer), HParams())
    if lanes is not None:
        init = jax.vmap(lambda _, one=init: one(), axis_size=lanes, in_axes=None)
    state = jax.eval_shape(init, *[0.0] * (lanes is not None))
    split = jax.tree.leaves(shardings(abstract_mesh({"fsdp": 8}), state, lanes=lanes is not None))
    whole = held = 0
    for leaf, sharding in zip(jax.tree.leaves(state), split, strict=True):
        shard = sharding.shard_shape(leaf.shape)
        assert lanes is None or shard[0] == lanes
        whole += leaf.size * leaf.dtype.itemsize
        held += math.prod(shard) * leaf.dtype.itemsize
    assert held <= (1 / 8 + 0.005) * whole
