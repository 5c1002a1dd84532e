"""Find the study of a storage that is a sweep's, wherever its folder is, and detect a copied folder.

A sweep's id is the name of its study. An older version named the study after the folder's path instead: such a study is
found by that name, or by its trials if the folder was moved since.

A folder that was copied has the same id as the original. The study records the folders that worked on it. If another of
them still holds a sweep of this id, and is not the same folder under another path (by its inode number), this one is a
copy. A copy on a machine that cannot see the original is taken for a folder that was moved.
"""

import copy
import dataclasses
import hashlib
from pathlib import Path
from typing import Any

from experiments.locks import locked
from experiments.sweep.address import file_of, kept, opened, shown
from experiments.sweep.record import Sweep, id_in
from experiments.sweep.storage import Storage
from experiments.sweep.trials import plan_trials
from model.errors import InputError

_PLACES = "places"
_MOST_PLACES = 16


def study_name(sweep: Sweep, storage: Storage) -> str:
    """Return the name of the sweep's study, whether or not the storage holds it yet.

    Raises InputError if an older version made the sweep, and several studies of the storage could be its own.
    """
    if sweep.storage is None:
        return "sweep"
    if sweep.id is not None:
        return sweep.id
    names = storage.studies()
    own = [name for name in names if name.endswith(_by_path(sweep.folder))]
    known = _known_trials(sweep)
    for candidates in (own, [name for name in names if name not in own]):
        matching = [name for name in candidates if known & _trials(storage, names[name])]
        free = [name for name in matching if not _is_elsewhere(sweep.folder, storage, names[name], name)]
        if len(free or matching) == 1:
            return (free or matching)[0]
        if matching:
            raise InputError(
                f"{sweep.folder} was moved, and several sweeps of its storage could be its own; write the right one, "
                f'as "id": "NAME", into {sweep.folder / "sweep.json"}: {", ".join(free or matching)}'
            )
    return own[0] if own else f"{sweep.name}{_by_path(sweep.folder)}"


def take_place(sweep: Sweep, storage: Storage) -> None:
    """Record in the study that this folder works on it. Raises InputError if the folder is a copy of another one."""
    here = sweep.folder.resolve()
    places = storage.attribute(_PLACES) or []
    if places[-1:] == [str(here)]:
        return
    others = places if places or sweep.id else _older_siblings(here, str(storage.name))
    for place in map(Path, others):
        if place != here and _holds(place, str(storage.name)) and place.stat().st_ino != here.stat().st_ino:
            raise InputError(
                f"{sweep.folder} is a copy of {place}, and would work on the same trials in the same storage; "
                f"`isoflop sweep resume {sweep.folder} --new-id` makes it a sweep of its own"
            )
    rest = [place for place in places if place != str(here)]
    storage.set_attribute(_PLACES, [*rest, str(here)][-_MOST_PLACES:])


def keep_id(folder: Path, name: str) -> Sweep:
    """Return the sweep of a folder, with this name of its study as its id if it has none yet."""
    with locked(folder):
        sweep = Sweep.read(folder)
        if sweep.id is None and sweep.storage is not None:
            sweep = with_id(sweep, name)
            sweep.write()
    return sweep


def with_id(sweep: Sweep, name: str) -> Sweep:
    """Return the sweep with an id, and its storage's address in the present form."""
    storage = None if sweep.storage is None else kept(sweep.address, sweep.folder)
    return dataclasses.replace(sweep, id=name, storage=storage)


def with_storage(sweep: Sweep, storage: str) -> Sweep:
    """Return the sweep with its storage at another address, as `address.kept` gives it.

    Raises InputError if the trials of the sweep are not there.
    """
    if sweep.storage is None:
        raise InputError(f"{sweep.folder} holds a sweep whose trials are in its own folder; leave --storage out")
    moved = dataclasses.replace(sweep, storage=storage if sweep.id else opened(storage, sweep.folder))
    if _is_same_storage(moved.address, sweep.address):
        return sweep
    found = Storage(moved.address, read_only=True)
    if study_name(moved, found) not in found.studies():
        raise InputError(
            f"{sweep.folder} holds a sweep with storage={shown(sweep.address)}; its trials are there and not in "
            f"{shown(moved.address)}; leave --storage out"
        )
    return moved


def _is_same_storage(one: str, other: str) -> bool:
    """Return whether two addresses are the same storage, also if a file is given by different paths."""
    files = [file_of(url) for url in (one, other)]
    if None in files:
        return one == other
    return files[0].resolve() == files[1].resolve()  # type: ignore[union-attr]


def copy_trials(sweep: Sweep, storage: Storage, source: str) -> None:
    """Copy another study's trials into the sweep's new study; ended: only those with runs in the folder."""
    from optuna.trial import TrialState, create_trial

    if source not in storage.studies():
        return
    for trial in storage.trials(storage.studies()[source]):
        name = trial.user_attrs.get("id")
        if name is None and trial.state == TrialState.RUNNING:
            continue  # a point that a worker of the original is drawing
        if trial.state in (TrialState.FAIL, TrialState.WAITING) or (
            name is not None and trial.state.is_finished() and (sweep.folder / "runs" / name / "run.json").is_file()
        ):
            storage.create(copy.deepcopy(trial))
            continue
        kept = {key: trial.user_attrs[key] for key in ("id", "trial", "cohort", "asked") if key in trial.user_attrs}
        storage.create(
            create_trial(
                state=TrialState.WAITING, params=trial.params, distributions=trial.distributions, user_attrs=kept
            )
        )


def _by_path(folder: Path) -> str:
    """Return the suffix of an older version's study name for a sweep in this folder."""
    return f"-{hashlib.sha256(str(folder.resolve()).encode()).hexdigest()[:8]}"


def _known_trials(sweep: Sweep) -> set[str]:
    """Return ids of trials that certainly belong to the sweep: those of its points, and of the runs in its folder."""
    runs = sweep.folder / "runs"
    there = {path.name for path in runs.iterdir()} if runs.is_dir() else set()
    return there | {trial.id for trial in plan_trials(sweep)}


def _trials(storage: Storage, study: int) -> set[Any]:
    return {trial.user_attrs.get("id") for trial in storage.trials(study)} - {None}


def _is_elsewhere(folder: Path, storage: Storage, study: int, name: str) -> bool:
    """Return whether another folder is known to have the study."""
    places = map(Path, storage.attribute(_PLACES, study) or [])
    return any(place != folder.resolve() and _holds(place, name) for place in places)


def _holds(place: Path, name: str) -> bool:
    """Return whether a folder that has worked on the study still holds its sweep; an older version gave that no id."""
    return (place / "sweep.json").is_file() and id_in(place) in (name, None)


def _older_siblings(here: Path, name: str) -> list[str]:
    """Return the sibling folder whose path an older version used as the study's name, if it exists."""
    return [str(place) for place in here.parent.iterdir() if place.is_dir() and name.endswith(_by_path(place))]
