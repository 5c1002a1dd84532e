"""A trial: one run of a sweep, named by the hash of all that decides it."""

import dataclasses
import functools
import hashlib
import json
from typing import Any, Self

from model import ModelConfig
from model.parts import Part
from train import HParams, TrainConfig
from train.run import Identity


@dataclasses.dataclass(frozen=True)
class Decode(Part):
    """How the speed of a trial's model is measured, where an objective asks for it (`isoflop bench decode`)."""

    batch: int = 1
    context: int = 128
    weights: str = "float32"
    cache: str = "float32"


@dataclasses.dataclass(frozen=True)
class Setting:
    """What a run is made of, without its data. steps: updates to its end, which its schedule is planned for."""

    config: ModelConfig
    train_config: TrainConfig
    hparams: HParams
    steps: int
    decode: Decode = Decode()

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "config": self.config.to_dict(),
            "train_config": self.train_config.to_dict(),
            "hparams": self.hparams.to_dict(),
            "steps": self.steps,
            "decode": self.decode.to_dict(),
        }

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output."""
        return cls(
            ModelConfig.from_dict(values["config"]),
            TrainConfig.from_dict(values["train_config"]),
            HParams(**values["hparams"]),
            values["steps"],
            Decode.from_dict(values["decode"]),
        )

    @functools.cached_property
    def cohort(self) -> str:
        """The name of its static shape: trials of one cohort are lanes of one program."""
        return _hash({"config": self.config.to_dict(), "train_config": self.train_config.to_dict()})[:8]


@dataclasses.dataclass(frozen=True)
class Trial:
    """A setting with the data, and what the axes of its sweep say of it.

    point: the varied fields and their values, "seed" among them. data: the hash of the data. parent: of a branch, or
    of a member of a population that goes on from another's state: that trial's id and the update after which it
    leaves it.
    """

    setting: Setting
    point: dict[str, Any]
    data: str | dict[str, str]
    parent: tuple[str, int] | None = None

    @functools.cached_property
    def id(self) -> str:
        """The hash of its content: one and the same trial has one id, whoever plans it."""
        setting = self.setting
        identity = Identity(setting.config, setting.train_config, setting.hparams, self.data).to_dict()
        parent = {"parent": list(self.parent)} if self.parent else {}
        decode = {"decode": setting.decode.to_dict()} if setting.decode != Decode() else {}
        return _hash(identity | {"steps": setting.steps} | decode | parent)[:16]

    @functools.cached_property
    def point_key(self) -> str:
        """Its point without the seed, as JSON: what all its replicates have in common."""
        return json.dumps({name: value for name, value in self.point.items() if name != "seed"}, sort_keys=True)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        parent = list(self.parent) if self.parent else None
        return {"setting": self.setting.to_dict(), "point": self.point, "data": self.data, "parent": parent}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> Self:
        """Read `to_dict`'s output."""
        parent = values["parent"]
        setting = Setting.from_dict(values["setting"])
        return cls(setting, values["point"], values["data"], (parent[0], parent[1]) if parent else None)


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
