"""Eight devices give the losses of one, however state and work are split over them, and hold their share of the state.

The training itself runs in processes with eight CPU devices (sharded.py); here its results are compared.
"""

import functools
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import get_args

import jax
import numpy as np
import pytest

from model import presets
from model.sharding import abstract_mesh, shardings
from train import HParams, TrainConfig, init_state
from train.config import Optimizer

STEPS = 20


def assert_one_device_is_equalled(model, *meshes):
    environment = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=8", "JAX_PLATFORMS": "cpu"}
    script = Path(__file__).with_name("sharded.py")
    call = [sys.executable, str(script), model, str(STEPS), "data=1", *meshes]
    done = subprocess.run(call, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    one, _ = found.pop("data=1")
    assert len(one) == STEPS
    assert one[-1] < one[0] / 2  # it learns: losses of steps that change nothing would agree too
    assert set(found) == set(meshes)
    for mesh, (losses, share) in found.items():
        np.testing.assert_allclose(losses, one, rtol=1e-4, err_msg=mesh)
        if mesh == "fsdp=8":
            assert share <= 1 / 8 + 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "meshes"),
    [
        ("dense", ["fsdp=8", "sequence=8", "data=2,fsdp=2,tensor=2"]),
        ("experts", ["expert=8", "fsdp=2,expert=2,sequence=2"]),
    ],
    ids=["dense", "experts"],
)
def test_a_mesh_gives_the_losses_of_one_device(model, meshes):
    assert_one_device_is_equalled(model, *meshes)


@pytest.mark.long
@pytest.mark.parametrize(
    ("model", "meshes"),
    [
        ("dense", ["data=8", "tensor=8", "fsdp=2,expert=2,sequence=2", "data=2,expert=2,tensor=2"]),
        (
            "experts",
            ["data=8", "fsdp=8", "tensor=8", "sequence=8", "data=2,fsdp=2,tensor=2", "data=2,expert=2,tensor=2"],
        ),
        ("capacity", ["data=8", "expert=8", "data=2,expert=2,tensor=2"]),
    ],
    ids=["dense", "experts", "capacity"],
)
def test_so_do_the_others(model, meshes):
    assert_one_device_is_equalled(model, *meshes)


@pytest.mark.parametrize("optimizer", get_args(Optimizer))
@pytest.mark.parametrize("lanes", [None, 3])
def test_fsdp_leaves_an_eighth_of_the_state_of_every_optimizer(optimizer, lanes):
    """Whatever an optimizer keeps; lanes are never split."""
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
