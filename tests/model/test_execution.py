"""Execution options are no part of a model's config."""

import copy
import pickle

import pytest

from model import Execution, InputError, ModelConfig, presets
from model.config import MOVED
from model.fields import FrozenDict
from train import Shell, TrainConfig

CONFIG = presets.get("tiny")


@pytest.mark.parametrize(
    ("made", "name"),
    [(CONFIG, name) for name in MOVED]
    + [(TrainConfig(), "accumulate"), (TrainConfig(), "loss_chunks")]
    + [(Shell(), "mesh")],
)
def test_a_field_that_moved_says_where(made, name):
    values = {"vocab_size": 8, "d_model": 8, "num_layers": 1, "num_heads": 1} if made is CONFIG else {}
    ways = [lambda: type(made)(**values, **{name: 1}), lambda: made.replace(**{name: 1})]
    for give in ways[: 1 if isinstance(made, Shell) else 2]:
        with pytest.raises(InputError, match=rf"{name} is not a field of .*execution=Execution\({name}=…\)"):
            give()
    with pytest.raises(AttributeError, match="Execution"):
        getattr(made, name)


def test_what_former_versions_wrote_is_read():
    assert ModelConfig.from_dict(CONFIG.to_dict() | {"remat": "dots", "scan_layers": False}) == CONFIG
    assert TrainConfig.from_dict(TrainConfig().to_dict() | {"accumulate": 4}) == TrainConfig()


def test_it_is_static():
    mesh = Execution(mesh={"data": 2, "fsdp": 4}, accumulate=2)
    assert hash(mesh) == hash(Execution.from_dict(mesh.to_dict()))
    assert mesh == Execution.from_dict(mesh.to_dict())
    assert mesh != mesh.replace(mesh={"data": 4, "fsdp": 2})
    assert mesh.replace(mesh=None, accumulate=1) == Execution()


def test_a_mesh_is_one_value_however_it_is_written():
    axes = {"fsdp": 4, "data": 2}
    made = Execution(mesh=axes)
    assert made == Execution(mesh={"data": 2, "fsdp": 4})
    assert FrozenDict(a=1, b=2) != FrozenDict(b=2, a=1)
    axes["data"] = 8
    assert made.mesh["data"] == 2
    for change in (lambda mesh: mesh.update(data=8), lambda mesh: mesh.pop("data"), lambda mesh: mesh.clear()):
        with pytest.raises(TypeError, match="cannot be changed"):
            change(made.mesh)
    with pytest.raises(TypeError, match="cannot be changed"):
        made.mesh["data"] = 8


@pytest.mark.parametrize("made", [CONFIG, TrainConfig(), Shell(), Execution(mesh={"data": 2})])
def test_it_is_copied_and_pickled(made):
    assert copy.copy(made) == copy.deepcopy(made) == pickle.loads(pickle.dumps(made)) == made


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"remat": "dot"}, "'dots'"),
        ({"accumulate": 0}, "accumulate=0"),
        ({"loss_chunks": 1.5}, "loss_chunks=1.5"),
        ({"lanes": 0}, "lanes=0"),
        ({"scan_layers": 1}, "scan_layers=1 must be true or false"),
        ({"mesh": "data=2"}, "mesh='data=2' must be axes and their sizes"),
        ({"mesh": {"data": "2"}}, "must be axes and their sizes"),
        ({"mesh": {"data": 0}}, "must be axes and their sizes"),
        ({"platform": "gpus"}, "'gpu'"),
    ],
)
def test_what_cannot_be_is_refused(fields, message):
    with pytest.raises(InputError, match=message):
        Execution(**fields)


def test_layers_are_a_loop_unless_the_model_is_narrow():
    assert [Execution().scans(presets.get(name)) for name in ("tiny", "study-32", "gpt2-small")] == [True, False, True]
    assert not Execution(scan_layers=False).scans(presets.get("gpt2-small"))
