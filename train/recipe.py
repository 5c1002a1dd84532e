"""Define the recipe of a run: all that determines its numbers. The hash of the recipe is the run's id.

A recipe does not include how the run is executed (`model.execution.Execution`), where its data and its folder are, its
options (`train.loop.options.RunOptions`), and the versions of libraries.
"""

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from model import Execution, ModelConfig
from model.config import MOVED as MOVED_FROM_MODEL
from model.errors import InputError
from model.fields import FrozenDict
from train.config import LOSS_SHAPING, HParams, TrainConfig
from train.config import MOVED as MOVED_FROM_TRAIN
from train.data.manifest import load_manifest
from train.objectives import LanguageModeling, Objective
from train.objectives import from_dict as read_objective
from train.plan import Plan
from train.schedule import uses_horizon

Places = str | Path | Mapping[str, str | Path]
LATER = {
    "train_config": ("packing", "order"),
    "hparams": ("data_seed", "mask_rate", "lora_rank", "lora_alpha", *LOSS_SHAPING),
}
"""Fields by part that were added later: they enter the hash only if not at their default, so that old ids stay."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "config": {field.name: field.default for field in dataclasses.fields(ModelConfig)},
    "train_config": {field.name: field.default for field in dataclasses.fields(TrainConfig)},
    "hparams": HParams.DEFAULTS,
}
_NOT_HASHED = ("norms",)  # of the TrainConfig: it adds metrics and changes no other number
_HASH_LENGTH = 64  # of a prepared data folder's SHA-256, in hexadecimal digits


@dataclasses.dataclass(frozen=True)
class Branch:
    """Start from another run's checkpoint: its run id, the number of its steps, and its folder."""

    run_id: str
    step: int
    folder: Path | None = dataclasses.field(default=None, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the fields that it adds to the identity of a run."""
        return {"branch": {"run_id": self.run_id, "step": self.step}}


@dataclasses.dataclass(frozen=True)
class Weights:
    """Start from parameters alone: the SHA-256 of their values, and the path that `model.store.open_model` opens.

    The optimizer is fresh and the step is 0.
    """

    sha256: str
    path: Path | None = dataclasses.field(default=None, compare=False)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the fields that it adds to the identity of a run."""
        return {"weights": self.sha256}


@dataclasses.dataclass(frozen=True)
class Recipe:
    """All that determines a run's numbers.

    data: a folder made by `isoflop data prepare`, several by the names that mixtures use (validation uses the first),
    or only their hashes; `folders` then says where they are. hparams.total_steps 0 becomes `steps` if the schedule has
    a horizon. steps: updates; None: the schedule's horizon, or all of the phases. start: None: fresh parameters.
    objective: the loss and its batches (a name: with its defaults); ids of special tokens that it leaves open are taken
    from the end of the model's vocabulary. accumulate: the execution's number of microbatches if it changes more than
    rounding (dropout, experts), else 1. former: fields of the model's config that the version that made the run counted
    into its id. Raises InputError if fields contradict each other.
    """

    model: ModelConfig
    train: TrainConfig = TrainConfig()
    hparams: HParams = dataclasses.field(default_factory=HParams)
    data: Any = ""
    steps: int | None = None
    objective: Objective = LanguageModeling()
    start: Branch | Weights | None = None
    accumulate: int = 1
    folders: Any = dataclasses.field(default=None, compare=False, repr=False)
    former: Mapping[str, Any] = dataclasses.field(default=FrozenDict(), compare=False, repr=False)

    def __post_init__(self) -> None:
        def put(name: str, value: Any) -> None:
            object.__setattr__(self, name, value)

        objective: Any = self.objective
        objective = objective if isinstance(objective, Objective) else read_objective(objective)
        put("objective", objective.resolved(self.model))
        data = self.data
        if not (isinstance(data, (str, Path)) or (isinstance(data, Mapping) and data)):
            raise InputError(f"data={data!r} must be a folder of `isoflop data prepare`, or several by name")
        if not _is_hash(data):
            places = {"": data} if isinstance(data, (str, Path)) else data
            folders = {name: str(Path(place).resolve()) for name, place in places.items()}
            hashes = {name: load_manifest(folder).hash for name, folder in folders.items()}
            put("data", _single_or_frozen(hashes))
            put("folders", _single_or_frozen(folders))
        elif isinstance(data, Mapping):
            put("data", _single_or_frozen(data))
        if isinstance(self.folders, Mapping):
            put("folders", FrozenDict({name: str(place) for name, place in self.folders.items()}))
        put("former", FrozenDict(self.former))

    def replace(self, **changes: Any) -> Self:
        """Return a copy with some fields changed."""
        return dataclasses.replace(self, **changes)

    @property
    def horizon(self) -> int:
        """Return the number of steps that it trains. Raises InputError if nothing determines it."""
        steps = self.steps
        if steps is None and not self.train.phases:
            steps = int(self.hparams.total_steps)
        return Plan.of(self.train, steps).total_steps if steps is None else steps

    def with_horizon(self) -> Self:
        """Return the recipe with its number of steps, which is also the schedule's horizon unless one is set."""
        Plan.of(self.train, self.horizon)  # checks it
        hparams = self.hparams
        if uses_horizon(self.train, hparams) and hparams.total_steps == 0:
            hparams = hparams.replace(total_steps=self.horizon)
        return self.replace(steps=self.horizon, hparams=hparams)

    def under(self, execution: Execution) -> Self:
        """Return the recipe with the execution's number of microbatches, if it changes more than rounding.

        Older versions never counted that number into the id, and runs that continue from them do not either.
        """
        counts = (self.train.dropout or self.model.experts is not None) and not self.former
        return self.replace(accumulate=execution.accumulate if counts else 1)

    @property
    def identity(self) -> dict[str, Any]:
        """Return the plain values that are hashed.

        The horizon is left out if the schedule does not read it, so that a run of more steps is the same run. Fields of
        LATER are left out if they have their default.
        """
        train_config, hparams = self.train.to_dict(), self.hparams.to_dict()
        for name in _NOT_HASHED:
            del train_config[name]
        if not uses_horizon(self.train, self.hparams):
            del hparams["total_steps"]
        parts = {
            "config": json.loads(json.dumps(self.model.to_dict())) | self.former,
            "train_config": train_config,
            "hparams": hparams,
        }
        for part, names in LATER.items():
            for name in names:
                if parts[part].get(name) == _DEFAULTS[part][name]:
                    parts[part].pop(name, None)
        besides: dict[str, Any] = {"accumulate": self.accumulate} if self.accumulate != 1 else {}
        if self.objective != LanguageModeling():
            besides["objective"] = self.objective.identity
        data = dict(self.data) if isinstance(self.data, Mapping) else self.data
        return {**parts, "data": data, **besides, **(self.start.identity if self.start else {})}

    @property
    def run_id(self) -> str:
        """Return the hash that identifies the run, wherever its folder is."""
        return hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:16]

    def as_in(self, there: Self) -> Self:
        """Return the recipe hashed as by the version that made `there`: the id is the same if nothing else differs."""
        return self.replace(former=there.former, accumulate=1) if there.former else self

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; `from_dict` reads them back to an equal recipe."""
        values = self.identity | {"config": self.model.to_dict(), "train_config": self.train.to_dict()}
        return values | {"hparams": self.hparams.to_dict(), "steps": self.steps, "former": dict(self.former)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Read `to_dict`'s output or the identity in a run's run.json, including those of older versions."""
        config = values["config"]
        start: Branch | Weights | None = None
        if branch := values.get("branch"):
            start = Branch(branch["run_id"], branch["step"])
        elif sha256 := values.get("weights"):
            start = Weights(sha256)
        former = {name: config[name] for name in MOVED_FROM_MODEL if name in config}
        return cls(
            model=ModelConfig.from_dict(config),
            train=TrainConfig.from_dict(values["train_config"]),
            hparams=HParams(**values["hparams"]),
            data=values.get("data", ""),
            steps=values.get("steps"),
            objective=read_objective(values.get("objective", LanguageModeling.NAME)),
            start=start,
            accumulate=values.get("accumulate", 1),
            former=former or values.get("former", {}),
        )


def former_execution(values: Mapping[str, Any], otherwise: Execution = Execution()) -> Execution:
    """Return the execution that an older version kept among the fields of the configs.

    otherwise: has the fields that it did not keep.
    """
    config, train_config = values.get("config", {}), values.get("train_config", {})
    moved = ((config, MOVED_FROM_MODEL), (train_config, MOVED_FROM_TRAIN))
    return otherwise.replace(**{name: fields[name] for fields, names in moved for name in names if name in fields})


def difference(there: Recipe, here: Recipe, *, steps: bool = False) -> str:
    """Return in words the fields in which two recipes differ; "" if they are the same run.

    steps: whether another number of steps counts too.
    """
    before, after = (_flat(recipe, steps) for recipe in (there, here.as_in(there)))
    follow = {*there.model.derived} & {*here.model.derived}  # derived fields differ because others do: no need to list
    names = [name for name in dict.fromkeys((*before, *after)) if before.get(name) != after.get(name)]
    names = [name for name in names if name not in follow] or names
    return ", ".join(f"{name}={before.get(name)} there, {after.get(name)} here" for name in names)


def later_defaults() -> dict[str, Any]:
    """Return the values of LATER's fields in an identity that leaves them out."""
    return {name: _DEFAULTS[part][name] for part, names in LATER.items() for name in names}


def _flat(recipe: Recipe, steps: bool) -> dict[str, Any]:
    """Return all fields by name; the names are distinct between the parts of a recipe."""
    identity = recipe.replace(former={}).identity
    # Begin with defaults that the identity leaves out, so that both recipes have a value.
    flat = later_defaults() | {"accumulate": recipe.accumulate, "objective": recipe.objective.NAME}
    flat |= _flat_part(recipe.objective.to_dict(), "objective.")
    identity.pop("objective", None)
    for part in ("config", "train_config", "hparams"):
        flat |= _flat_part(identity.pop(part))
    return flat | _flat_part(identity) | ({"steps": recipe.steps} if steps else {})


def _flat_part(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= _flat_part(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = list(value) if isinstance(value, tuple) else value
    return found


def _single_or_frozen(values: Mapping[str, Any]) -> Any:
    """Return the value itself if there is only one, whose name then does not matter, else a hashable mapping."""
    return next(iter(values.values())) if len(values) == 1 else FrozenDict(values)


def _is_hash(data: Any) -> bool:
    """Return whether these are hashes instead of folders; no data at all counts as a hash."""
    values = data.values() if isinstance(data, Mapping) else [data]
    return all(isinstance(value, str) and _looks_hashed(value) for value in values)


def _looks_hashed(value: str) -> bool:
    return not value or (len(value) == _HASH_LENGTH and set(value) <= set("0123456789abcdef"))
