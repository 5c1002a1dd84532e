"""Store the definition of a sweep in `sweep.json` of its folder, so that any worker on any machine can continue it."""

import dataclasses
import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from experiments.evaluate.in_training import ITEMS, task_sets
from experiments.locks import locked
from experiments.sweep.address import file_of, opened, opened_by_older, with_file
from experiments.sweep.branches import Listed
from experiments.sweep.capacity import ServiceLevel
from experiments.sweep.objectives import tasks_of
from experiments.sweep.space import Replicate, Space, grid, product
from experiments.sweep.space.build import load_space
from experiments.sweep.space.values import parse_axes
from experiments.sweep.trial import Trial
from model.errors import InputError
from train.checksums import read_sealed, write_sealed
from train.files import write_atomically
from train.recipe import Recipe, Weights
from train.task_sets import TaskSet

SCHEMA_VERSION = 1


@dataclasses.dataclass(frozen=True)
class TrialRequest:
    """The trials requested by one call: a sweep has the trials of all its calls.

    sampler: "all": every point of the space is a trial of each seed. space_source: the text of `space_file`. listed:
    trials by name, in place of a space.
    """

    axes: tuple[str, ...] = ()
    space_file: str | None = None
    seeds: tuple[int, ...] = (0,)
    sampler: str = "all"
    space_source: str | None = None
    listed: tuple[Listed, ...] = ()

    @property
    def names(self) -> frozenset[str]:
        """The fields of the listed trials."""
        return frozenset(name for entry in self.listed for name in entry.point)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the source of the space stays in its file."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["space_source"]
        return values | {"listed": [entry.to_dict() for entry in self.listed]}

    @classmethod
    def read(cls, values: Mapping[str, Any], folder: Path) -> Self:
        """Read `to_dict`'s output in a sweep's folder, and that of former versions."""
        listed = tuple(Listed(**entry) for entry in values.get("listed", ()))
        fields = _tuples({**values, "space_source": _source(folder, values["space_file"])})
        request = cls(**{**fields, "listed": listed})
        if "listed" in values or '"_name"' not in (request.space_source or ""):
            return request
        points = request.space(folder).points()  # older scaling studies wrote the list as source text
        return cls(seeds=request.seeds, listed=tuple(map(Listed.from_former, json.loads(json.dumps(points)))))

    def space(self, folder: Path) -> Space:
        """Return the product of the axes with the file's space, without its seeds. Raises InputError."""
        axes = parse_axes(self.axes)
        if "seed" in axes:
            raise InputError("seed is not an axis: give --seeds, so that they count as replicates")
        spaces = [grid(**axes)] if axes else []
        if self.space_source is not None:
            own = load_space(self.space_source, folder / str(self.space_file))
            spaces.append(own.space if isinstance(own, Replicate) else own)
        return product(*spaces) if spaces else grid()


@dataclasses.dataclass(frozen=True)
class Sweep:
    """The definition of a sweep.

    folder: holds `sweep.json`, a copy of the space's file, `runs/ID` of every trial, and the ledger where that is a
    file. base: the trial that the space varies; steps 0: every point gives its own length. data: the prepared folder of
    the content that the base names. axes: `NAME=VALUES` as on the command line; space_file: a Python file in `folder`
    whose `space` is multiplied with them, space_source: its text. listed: trials by name, in place of these. seeds: of
    the replicates of every point. objectives: names of `objectives.DIRECTIONS`, or TASK/METRIC. sampler: "all" for
    every point of the space, or a name of `experiments.sweep.search.samplers`; trials: how many points it draws (0:
    all). policy: "all", "halving", "hyperband" or "population", with its settings. storage: an Optuna storage URL as
    `address.kept` gives it; None: SQLite in the folder. lanes: largest number of trials in one program, vmapped; None:
    as many as memory holds. evaluate_tokens: of the validation split. earlier: requests of former calls on the folder;
    their trials stay part of the sweep. weights: the path of the parameters that the base starts from, whose hash the
    base has; None: trials start fresh. id: the name of its study in a storage, independent of the folder's path; None
    if an older version made the sweep. forgetting: a folder of plain text, for the objective of that name.
    evaluate_task_items: questions of every task among the objectives. service: the level of the objective capacity.
    """

    folder: Path
    base: Trial
    data: Path
    axes: tuple[str, ...] = ()
    space_file: str | None = None
    seeds: tuple[int, ...] = (0,)
    objectives: tuple[str, ...] = ("loss",)
    sampler: str = "all"
    trials: int = 0
    sampler_seed: int = 0
    policy: str = "all"
    policy_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    storage: str | None = None
    lanes: int | None = None
    evaluate_tokens: int = 65_536
    space_source: str | None = None
    listed: tuple[Listed, ...] = ()
    earlier: tuple[TrialRequest, ...] = ()
    weights: Path | None = None
    id: str | None = None
    forgetting: Path | None = None
    evaluate_task_items: int = ITEMS
    service: ServiceLevel | None = None

    @property
    def name(self) -> str:
        """The name of its folder."""
        return self.folder.resolve().name

    @property
    def data_hash(self) -> str:
        """The hash of the data's content."""
        return str(self.base.recipe.data)

    @property
    def address(self) -> str:
        """The address of its storage, to be opened."""
        if self.storage is None:
            return f"sqlite:///{self.folder.absolute() / 'ledger.db'}"
        return (opened if self.id else opened_by_older)(self.storage, self.folder)

    @property
    def shares_storage(self) -> bool:
        """Return whether its trials are kept outside its folder, where a copy of the folder finds them too."""
        file = file_of(self.address)
        return file is None or not file.resolve().is_relative_to(self.folder.resolve())

    @property
    def request(self) -> TrialRequest:
        """The request of the newest call."""
        return TrialRequest(self.axes, self.space_file, self.seeds, self.sampler, self.space_source, self.listed)

    def task_sets(self) -> tuple[TaskSet, ...]:
        """Return the encoded questions of the tasks among its objectives."""
        return task_sets(tasks_of(self.objectives), self.data, self.evaluate_task_items)

    def space(self) -> Space:
        """Return what the newest call varies, without seeds.

        Raises InputError on axes and files that cannot be read.
        """
        return self.request.space(self.folder)

    def run_folder(self, trial: Trial) -> Path:
        """Return the run directory of a trial."""
        return self.folder / "runs" / trial.id

    def placed(self, recipe: Recipe) -> Recipe:
        """Return a recipe of the sweep with the path of its starting weights."""
        if not isinstance(recipe.start, Weights):
            return recipe
        return recipe.replace(start=Weights(recipe.start.sha256, self.weights))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the sources of the spaces stay in their files."""
        plain = {"schema_version": SCHEMA_VERSION}
        for field in dataclasses.fields(self):
            if field.name not in ("folder", "space_source"):
                plain[field.name] = getattr(self, field.name)
        return plain | {
            "base": self.base.to_dict(),
            "data": str(self.data),
            "weights": None if self.weights is None else str(self.weights),
            "forgetting": None if self.forgetting is None else str(self.forgetting),
            "service": None if self.service is None else self.service.to_dict(),
            "beside": self._relative_places(),
            "listed": [entry.to_dict() for entry in self.listed],
            "earlier": [request.to_dict() for request in self.earlier],
        }

    def _relative_places(self) -> dict[str, str]:
        """Return the paths of data, weights and storage relative to the folder, for folders moved together."""
        file = None if self.storage is None else file_of(self.storage)
        places = {"data": self.data} | ({"storage": file} if file is not None and file.is_absolute() else {})
        places |= {} if self.weights is None else {"weights": self.weights}
        places |= {} if self.forgetting is None else {"forgetting": self.forgetting}
        return {name: os.path.relpath(place.resolve(), self.folder.resolve()) for name, place in places.items()}

    @classmethod
    def read(cls, folder: str | Path) -> Self:
        """Return the sweep that `write` wrote; the data are not opened.

        Raises InputError if there is none, or it is damaged.
        """
        folder = Path(folder)
        path = folder / "sweep.json"
        try:
            content = read_sealed(path)
        except FileNotFoundError:
            raise InputError(
                f"{folder} is not a sweep: it has no sweep.json; begin one with `isoflop sweep run`"
            ) from None
        if content.get("schema_version") != SCHEMA_VERSION or "base" not in content:
            raise InputError(f"{path} is not a sweep.json of schema version {SCHEMA_VERSION}; choose another folder")
        del content["schema_version"]
        try:
            earlier = tuple(TrialRequest.read(values, folder) for values in content.pop("earlier"))
            names = [field.name for field in dataclasses.fields(TrialRequest)]
            own = {name: content[name] for name in names if name in content}
            made = TrialRequest.read(own, folder)
            request = {f.name: getattr(made, f.name) for f in dataclasses.fields(made)} | {"earlier": earlier}
            base, data, beside = Trial.from_dict(content.pop("base")), content.pop("data"), content.pop("beside", {})
            base = base.replace(recipe=base.recipe.replace(data=content.pop("data_hash", base.recipe.data)))
            for name in ("weights", "forgetting"):
                if (place := content.pop(name, None)) is not None:
                    content[name] = _moved(Path(place), folder, beside.get(name))
            if (service := content.pop("service", None)) is not None:
                content["service"] = ServiceLevel.from_dict(service)
            sweep = cls(folder, base, _moved(Path(data), folder, beside.get("data")), **_tuples(content) | request)
            if "storage" in beside and (file := file_of(str(sweep.storage))) is not None:
                moved = with_file(str(sweep.storage), _moved(file, folder, beside["storage"]))
                sweep = dataclasses.replace(sweep, storage=moved)
        except (TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path} is damaged (missing or wrong: {error})") from None
        return sweep

    def write(self) -> None:
        """Write the space files, then `sweep.json`, so that a kill leaves the old or the new definition."""
        for request in (*self.earlier, self.request):
            if request.space_file is not None and request.space_source is not None:
                write_atomically(self.folder / request.space_file, request.space_source)
        write_sealed(self.folder / "sweep.json", self.to_dict())

    def write_first(self) -> Self:
        """Write the sweep unless its folder has one; return it with the id in the folder."""
        with locked(self.folder):
            if (self.folder / "sweep.json").exists():
                return dataclasses.replace(self, id=id_in(self.folder))
            self.write()
            return self


def new_id(folder: Path) -> str:
    """Return a new id for a sweep: the folder's name, by which people recognise its study, and random digits."""
    return f"{folder.resolve().name}-{secrets.token_hex(6)}"


def id_in(folder: Path) -> str | None:
    """Return the id of the sweep in a folder; None if it has none, or there is no sweep that can be read."""
    try:
        return json.loads((folder / "sweep.json").read_text(encoding="utf-8")).get("id")
    except (OSError, ValueError, AttributeError):
        return None


def _moved(place: Path, folder: Path, beside: str | None) -> Path:
    """Return the recorded path, or if it does not exist, the same path relative to the folder."""
    if beside is None or place.exists():
        return place
    other = Path(os.path.normpath(folder.resolve() / beside))
    return other if other.exists() else place


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _source(folder: Path, name: str | None) -> str | None:
    if name is None:
        return None
    try:
        return (folder / name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise InputError(f"{folder / name} cannot be read, which {folder / 'sweep.json'} needs: {error}") from None
