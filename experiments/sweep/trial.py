"""Define trials: a recipe with its point in the sweep, identified by a hash of everything that determines it."""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from typing import Any, Self

from model import Execution
from model.execution import FIELDS as EXECUTION
from model.parts import Part
from train.objectives import LanguageModeling
from train.recipe import Recipe, former_execution


@dataclasses.dataclass(frozen=True)
class Decode(Part):
    """Settings of the measurement of a model's decode speed (`isoflop bench decode`), if an objective needs it."""

    batch: int = 1
    context: int = 128
    weights: str = "float32"
    cache: str = "float32"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A recipe with its number of steps and its values on the sweep's axes; without a point: the base of a sweep.

    point: the varied fields and their values, "seed" among them. execution: how it runs; a field of it that is an axis
    belongs to the trial's id, so that trials that differ in it are trained each. name: what a scaling study calls it.
    parent: for a branch, or a member of a population that continues another's state: that trial's id and the update
    after which it branches off.
    """

    recipe: Recipe
    point: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    execution: Execution = Execution()
    decode: Decode = Decode()
    name: str | None = None
    parent: tuple[str, int] | None = None

    @functools.cached_property
    def id(self) -> str:
        """The hash of its content: equal trials have equal ids."""
        parent = {"parent": list(self.parent)} if self.parent else {}
        decode = {"decode": self.decode.to_dict()} if self.decode != Decode() else {}
        varied = {name: value for name, value in self.point.items() if name in EXECUTION}
        execution = {"execution": varied} if varied and not self.recipe.former else {}
        return _hash(self.recipe.identity | {"steps": self.steps} | decode | execution | parent)[:16]

    @property
    def steps(self) -> int:
        """Updates to its end, which its schedule is planned for; 0 of a base whose points have lengths."""
        return self.recipe.steps or 0

    @functools.cached_property
    def shape(self) -> str:
        """The name of its static shape, without the execution (in older versions: of its program)."""
        recipe, how = self.recipe, self.execution
        config, train_config = {**recipe.model.to_dict(), **recipe.former}, recipe.train.to_dict()
        if recipe.former:
            train_config |= {"accumulate": how.accumulate, "loss_chunks": how.loss_chunks}
        return _hash({"config": config, "train_config": train_config, **_of_objective(recipe)})[:8]

    @functools.cached_property
    def cohort(self) -> str:
        """The name of its program: trials of one cohort are lanes of it."""
        recipe, how = self.recipe, self.execution
        if recipe.former or how == Execution():
            return self.shape
        static = {"config": recipe.model.to_dict(), "train_config": recipe.train.to_dict(), **_of_objective(recipe)}
        return _hash(static | {"execution": how.to_dict()})[:8]

    @functools.cached_property
    def point_key(self) -> str:
        """Its point without the seed, as JSON: what all its replicates have in common."""
        return json.dumps({name: value for name, value in self.point.items() if name != "seed"}, sort_keys=True)

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    def under(self, execution: Execution) -> Self:
        """Return the trial under another execution, except for fields that are axes."""
        varied = {name: value for name, value in self.point.items() if name in EXECUTION}
        return self.replace(execution=execution.replace(**varied))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "recipe": self.recipe.to_dict(),
            "point": dict(self.point),
            "execution": self.execution.to_dict(),
            "decode": self.decode.to_dict(),
            "name": self.name,
            "parent": list(self.parent) if self.parent else None,
        }

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output, and what former versions wrote of a trial or of a sweep's base."""
        if "recipe" not in values:
            return cls._from_former(values)
        parent = values["parent"]
        return cls(
            Recipe.from_dict(values["recipe"]),
            values["point"],
            Execution.from_dict(values["execution"]),
            Decode.from_dict(values["decode"]),
            values["name"],
            (parent[0], parent[1]) if parent else None,
        )

    @classmethod
    def _from_former(cls, values: Mapping[str, Any]) -> Self:
        """Read a trial, or a base, from before there were recipes: its name and parent were fields of its point."""
        setting, point, parent = values.get("setting", values), dict(values.get("point", {})), values.get("parent")
        name = point.pop("_name", None)
        for key in ("_trunk", "_leave"):
            point.pop(key, None)
        return cls(
            Recipe.from_dict({**setting, "data": values.get("data", "")}),
            point,
            former_execution(setting),
            Decode.from_dict(setting["decode"]),
            name,
            (parent[0], parent[1]) if parent else None,
        )


def _of_objective(recipe: Recipe) -> dict[str, Any]:
    """Return the objective's part of a shape's name; "" for language modelling, as in older versions."""
    return {} if recipe.objective == LanguageModeling() else {"objective": recipe.objective.identity}


def _hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
