"""Checkpoints are verified before they are believed; which ones stay is a rule that restarts do not bend."""

import errno
import json
import logging
import resource
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from flax import struct

from model.errors import InputError
from train.checksums import checksums
from train.files import write_json
from train.run.checkpoint import CHECKSUMS, Checkpoints, verify

STATE = {"weights": np.arange(5000, dtype=np.float32), "step": np.array(3, np.int32)}
MIXED = {
    "key": np.array([2**32 - 1, 2**31, 7], np.uint32),
    "count": np.array(-5, np.int32),
    "half": np.linspace(-3, 3, 24, dtype=np.float32).astype(jnp.bfloat16).reshape(4, 6),
    "layers": [np.array([[np.nan, -0.0], [np.inf, 1e-40]], np.float32), {"flag": np.array([True, False])}],
}


@struct.dataclass
class Trained:
    """A state that has parameters."""

    params: Any
    optimizer: Any
    step: Any


TRAINED = Trained({"layers": [MIXED], "scale": np.ones(3, np.float32)}, (MIXED, {"nothing": ()}), np.array(7, np.int32))


def state_of(step):
    return {**STATE, "step": np.array(step, np.int32)}


def save_all(run, steps, scores=None, **rules):
    checkpoints = Checkpoints(run, **rules)
    for index, step in enumerate(steps):
        checkpoints.save(step, state_of(step), score=None if scores is None else scores[index])
    checkpoints.close()
    return checkpoints.steps()


def assert_same_bits(left, right):
    """Equal bytes, shapes and dtypes: NaN and −0 too."""
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        one, other = np.asarray(one), np.asarray(other)
        assert (one.dtype, one.shape, one.tobytes()) == (other.dtype, other.shape, other.tobytes())


@pytest.fixture
def saved(tmp_path):
    save_all(tmp_path, (1, 2))
    return tmp_path


@pytest.mark.parametrize("make", [np.copy, jnp.array])
def test_round_trip_is_bitwise_and_the_state_may_change_at_once(tmp_path, make):
    """The caller donates the state to its next step right after the save."""
    checkpoints = Checkpoints(tmp_path)
    state = jax.tree.map(make, MIXED)
    checkpoints.save(1, state)
    for leaf in jax.tree.leaves(state):
        if isinstance(leaf, np.ndarray):
            leaf[...] = 0
        else:
            leaf.delete()
    checkpoints.close()
    step, found = Checkpoints(tmp_path).restore_newest(MIXED)
    assert step == 1
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(found))
    assert_same_bits(found, MIXED)
    sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding), MIXED)
    placed = Checkpoints(tmp_path).restore(1, like)
    assert all(isinstance(leaf, jax.Array) and leaf.sharding == sharding for leaf in jax.tree.leaves(placed))
    assert_same_bits(placed, MIXED)


def test_parameters_are_an_item_of_their_own(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, jax.tree.map(jnp.array, TRAINED))
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    assert {"params", "state"} == {path.name for path in folder.iterdir() if path.is_dir()}
    step, found = Checkpoints(tmp_path).restore_newest(TRAINED)
    assert step == 1
    assert jax.tree.structure(found) == jax.tree.structure(TRAINED)
    assert_same_bits(found, TRAINED)
    for name in ("params", "optimizer"):
        with pytest.raises(InputError, match=f"version or configuration: {name}/.* there and absent here"):
            checkpoints.restore(1, TRAINED.replace(**{name: {}}))


def test_a_state_that_a_former_version_stored_as_one_item_comes_back(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, TRAINED)
    checkpoints.close()
    folder = tmp_path / "checkpoints" / "1"
    shutil.rmtree(folder / "params")
    shutil.rmtree(folder / "state")
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(folder / "state", TRAINED)
    write_json(folder / CHECKSUMS, checksums(folder))
    assert_same_bits(Checkpoints(tmp_path).restore(1, TRAINED), TRAINED)


def test_which_checkpoints_stay(tmp_path):
    assert save_all(tmp_path / "newest", range(1, 6), keep=2) == [4, 5]
    assert save_all(tmp_path / "every", range(1, 8), keep=1, keep_every=3) == [3, 6, 7]
    assert save_all(tmp_path / "steps", range(1, 6), keep=1, keep_steps=(2, 9)) == [2, 5]
    assert save_all(tmp_path / "scored", range(1, 5), [3.0, 1.0, float("nan"), 2.0], keep=1, keep_best=True) == [2, 4]
    accuracies = {"keep": 1, "keep_best": "validation_accuracy", "higher_is_better": True}
    assert save_all(tmp_path / "accuracy", range(1, 5), [0.3, 0.6, float("nan"), 0.5], **accuracies) == [2, 4]
    assert save_all(tmp_path / "unscored", range(1, 4), keep=1, keep_best=True) == [3]
    with pytest.raises(InputError, match="keep=0"):
        Checkpoints(tmp_path, keep=0)


def test_scores_and_rules_survive_a_restart(tmp_path):
    rules = {"keep": 1, "keep_best": True, "keep_every": 4}
    assert save_all(tmp_path, (3, 4, 5), [1.0, 2.0, 3.0], **rules) == [3, 4, 5]
    assert save_all(tmp_path, (6, 7), [2.5, 1.5], **rules) == [3, 4, 7]
    assert save_all(tmp_path, (8, 9), [0.5, 4.0], **rules) == [4, 8, 9]
    assert Checkpoints(tmp_path).whole_steps() == [4, 8, 9]


def test_scores_of_another_metric_are_not_compared(tmp_path):
    """Those of former versions, which name no metric, are of the validation loss."""
    save_all(tmp_path, (1, 2), [1.0, 2.0])
    for folder in (tmp_path / "checkpoints").iterdir():
        about = json.loads((folder / "checkpoint.json").read_text())
        del about["metric"]
        write_json(folder / "checkpoint.json", about)
        write_json(folder / CHECKSUMS, checksums(folder))
    assert save_all(tmp_path, (3, 4), [3.0, 4.0], keep=1, keep_best="validation_loss") == [1, 4]
    accuracies = {"keep": 1, "keep_best": "validation_accuracy", "higher_is_better": True}
    assert save_all(tmp_path, (5, 6, 7), [0.5, 0.7, 0.6], **accuracies) == [6, 7]


def test_a_step_saved_again_is_replaced_and_an_earlier_one_stays(saved):
    """After a rollback the newest checkpoint is not the one just saved."""
    checkpoints = Checkpoints(saved, keep=1)
    checkpoints.save(2, state_of(20))
    checkpoints.wait()
    assert checkpoints.restore(2, STATE)["step"] == 20
    checkpoints.save(1, state_of(10))
    checkpoints.close()
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.restore_newest(STATE, at_most=1)[1]["step"] == 10


def test_discard_after(tmp_path):
    save_all(tmp_path, (1, 2, 3, 4), keep=4)
    checkpoints = Checkpoints(tmp_path)
    checkpoints.discard_after(2)
    assert checkpoints.steps() == [1, 2]
    assert checkpoints.restore_newest(STATE)[0] == 2
    with pytest.raises(InputError, match="no checkpoint of step 4; the steps there are: 1, 2"):
        checkpoints.restore(4, STATE)


def test_what_a_kill_leaves_is_removed_and_what_it_replaced_comes_back(saved):
    folder = saved / "checkpoints"
    for name in (".3.writing", ".1.deleted", ".2.replaced"):
        shutil.copytree(folder / "1", folder / name)
    (folder / "2").rename(folder / ".9.replaced")
    before = sorted(folder.iterdir())
    assert Checkpoints(saved, read_only=True).restore_newest(STATE)[0] == 1
    assert sorted(folder.iterdir()) == before
    Checkpoints(saved).restore_newest(STATE)
    assert sorted(path.name for path in folder.iterdir()) == ["1", "2", "9"]


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.stat().st_size)


@pytest.mark.parametrize("damage", ["flip", "truncate", "remove"])
def test_damage_to_any_file_is_noticed_and_costs_that_checkpoint_only(saved, damage, caplog):
    newest = saved / "checkpoints" / "2"
    assert {"checkpoint.json", CHECKSUMS} < {path.name for path in files(newest)}
    for place, path in enumerate(files(newest)):
        content = path.read_bytes()
        if damage == "flip":
            changed = bytearray(content)
            changed[place * 7919 % len(content)] ^= 1 << place % 8
            path.write_bytes(bytes(changed))
        elif damage == "truncate":
            path.write_bytes(content[:-1])
        else:
            path.unlink()
        assert verify(newest) is not None, path
        with pytest.raises(InputError, match="steps there are: 1, 2"):
            Checkpoints(saved).restore(2, STATE)
        with caplog.at_level(logging.WARNING, "isoflop"):
            step, state = Checkpoints(saved).restore_newest(STATE)
        assert (step, state["step"]) == (1, 1), path
        assert str(newest) in caplog.text
        assert not newest.exists()
        shutil.move(saved / "damaged" / "2", newest)
        path.write_bytes(content)
        assert verify(newest) is None


def test_a_reader_changes_nothing(saved):
    (saved / "checkpoints" / "2" / CHECKSUMS).unlink()
    assert Checkpoints(saved, read_only=True).restore_newest(STATE)[0] == 1
    assert Checkpoints(saved).steps() == [1, 2]
    assert Checkpoints(saved).whole_steps() == [1]


def test_a_reader_follows_a_run_that_goes_on(saved, monkeypatch):
    """While the reader verifies the newest, its writer replaces all that the reader had seen."""
    folder = saved / "checkpoints"

    def slow(path):
        if path.name == "2":
            shutil.rmtree(folder / "2")
            (folder / "1").rename(folder / "3")
        return verify(path)

    monkeypatch.setattr("train.run.checkpoint.verify", slow)
    assert Checkpoints(saved, read_only=True).restore_newest(STATE)[0] == 3


def test_nothing_to_restore(tmp_path):
    assert Checkpoints(tmp_path).restore_newest(STATE) is None
    assert Checkpoints(tmp_path).steps() == []


@pytest.mark.parametrize(
    ("like", "message"),
    [
        ({**STATE, "skipped": np.zeros(3)}, r"skipped is absent there and float64\[3\] here"),
        ({"step": STATE["step"]}, r"weights is float32\[5000\] there and absent here"),
        ({**STATE, "weights": np.zeros((2, 3), np.float32)}, r"float32\[5000\] there and float32\[2,3\] here"),
        ({**STATE, "step": np.zeros((), np.uint32)}, r"int32\[\] there and uint32\[\] here"),
        ({str(name): np.zeros(1) for name in range(9)}, "and 8 more leaves differ"),
    ],
)
def test_other_leaves_are_refused_and_nothing_is_called_damaged(saved, like, message):
    for restore in (Checkpoints(saved).restore_newest, lambda like: Checkpoints(saved).restore(1, like)):
        with pytest.raises(InputError, match=message):
            restore(like)
    assert Checkpoints(saved).restore_newest(STATE)[0] == 2


def test_failed_save_is_raised_and_the_next_one_works(tmp_path, monkeypatch):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.save(1, STATE)
    checkpoints.wait()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("train.run.checkpoint.write_json", full)
        checkpoints.save(2, STATE)
        with pytest.raises(OSError, match="No space left"):
            checkpoints.wait()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["1"]
    checkpoints.save(3, STATE)
    checkpoints.close()
    assert checkpoints.steps() == [1, 3]


def test_a_full_disk_is_noticed_before_anything_is_written(saved, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=20_000))
    checkpoints = Checkpoints(saved)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(3, STATE)
    checkpoints.close()
    assert Checkpoints(saved).restore_newest(STATE)[0] == 2


SHAPES = {"table": (16, 32), "bias": (32,), "count": ()}


def values():
    random = np.random.default_rng(0)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


def shapes_on(mesh, table, bias):
    specs = {"table": jax.P(*table), "bias": jax.P(*bias), "count": jax.P()}
    place = lambda name: jax.NamedSharding(mesh, specs[name])
    return {name: jax.ShapeDtypeStruct(shape, np.float32, sharding=place(name)) for name, shape in SHAPES.items()}


def save_on_eight_devices(run):
    """Save sharded, restore on another mesh; then a disk that refuses in the middle of a write."""
    like = shapes_on(jax.make_mesh((8,), ("data",)), ("data",), ("data",))
    state = {name: jax.device_put(value, like[name].sharding) for name, value in values().items()}
    checkpoints = Checkpoints(run)
    checkpoints.save(1, state)
    checkpoints.wait()
    other = shapes_on(jax.make_mesh((4, 2), ("data", "model")), ("model", "data"), (("data", "model"),))
    found = checkpoints.restore(1, other)
    assert all(found[name].sharding == other[name].sharding for name in SHAPES)
    assert_same_bits(found, values())

    large = {"large": np.random.default_rng(1).integers(0, 2**32, 2**20, np.uint32)}
    unlimited = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2**19, unlimited[1]))
    checkpoints.save(2, large)
    with pytest.raises(OSError, match=f"File too large: '{run}/checkpoints'") as refused:
        checkpoints.wait()
    assert refused.value.errno == errno.EFBIG
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["1"]
    resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)
    checkpoints.save(3, large)
    checkpoints.close()
    assert_same_bits(checkpoints.restore(3, large), large)
    print(json.dumps(checkpoints.steps()))


@pytest.mark.slow
def test_a_sharded_state_comes_back_on_any_mesh_and_a_failed_write_costs_nothing_else(tmp_path, on_eight_devices):
    assert on_eight_devices(__file__, tmp_path) == [1, 3]
    alone = shapes_on(jax.make_mesh((1,), ("data",), devices=jax.devices()[:1]), ("data",), ())
    assert_same_bits(Checkpoints(tmp_path).restore(1, alone), values())
    step, found = Checkpoints(tmp_path).restore_newest(values(), at_most=2)
    assert step == 1
    assert_same_bits(found, values())


if __name__ == "__main__":
    save_on_eight_devices(Path(sys.argv[1]))
