"""Define a sweep from the options of a call and the definition that its folder already holds."""

import dataclasses
import hashlib
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.evaluate.in_training import ITEMS
from experiments.inputs import check_free
from experiments.sweep.address import check_given, kept
from experiments.sweep.branches import Listed
from experiments.sweep.capacity import ServiceLevel
from experiments.sweep.checks import check_sweep
from experiments.sweep.identity import with_storage
from experiments.sweep.record import Sweep, TrialRequest, new_id
from experiments.sweep.space import Replicate
from experiments.sweep.space.build import load_space
from experiments.sweep.space.overlay import rebase
from experiments.sweep.trial import Trial
from model import ModelConfig
from model.errors import InputError
from train import HParams, TrainConfig
from train.data import load_manifest
from train.objectives import LanguageModeling, Objective
from train.recipe import Recipe, Weights, difference

# Of a sweep, however often it is added to.
_SAME = ("data_hash", "objectives", "policy", "evaluate_tokens", "forgetting", "evaluate_task_items", "service")


def define(
    config: ModelConfig,
    *,
    data: str | Path,
    folder: str | Path,
    steps: int | None = None,
    axes: Sequence[str] = (),
    space_file: str | Path | None = None,
    listed: Sequence[Listed] = (),
    seeds: int | Sequence[int] | None = None,
    base: Mapping[str, Any] = {},
    batch_size: int = 8,
    seq_len: int = 128,
    objectives: Sequence[str] = ("loss",),
    sampler: str = "all",
    trials: int = 0,
    sampler_seed: int = 0,
    policy: str = "all",
    policy_settings: dict[str, Any] | None = None,
    storage: str | None = None,
    lanes: int | None = None,
    evaluate_tokens: int = 65_536,
    weights: Weights | None = None,
    objective: Objective | None = None,
    forgetting: Path | None = None,
    evaluate_task_items: int = ITEMS,
    service: ServiceLevel | None = None,
) -> Sweep:
    """Return a sweep with the given options and the trials of its folder; all are checked, nothing is written.

    config: gets the vocabulary of the data, unless all trials start from weights, whose model it then is. steps: of
    every trial whose point has no length of its own. space_file: a Python file. listed: trials by name, in place of
    axes and a space. base: fields of all trials. seeds: how many, or which; None: those of the file's outermost
    `replicate`, or one. Warm-up is 5 % of the steps unless the base gives another. objective: used unless the base has
    one; None: language modelling.

    From a folder that holds a sweep of the same base, data, objectives and policy it takes over the trials that former
    calls requested, and the storage where none is given; axes, seeds, sampler, trials, policy settings and lanes are
    those of this call. Raises InputError, with the difference, if it holds another sweep or other files, and as
    `check_sweep` does.
    """
    manifest = load_manifest(data)
    if storage is not None:
        check_given(storage)
    if weights is None:
        config = config.replace(vocab_size=manifest.vocab_size, eos_token_ids=(manifest.eos_id,))
    start = Recipe(
        config,
        TrainConfig(batch_size=batch_size, seq_len=seq_len),
        HParams(warmup_fraction=0.05),
        manifest.hash,
        steps or 0,
        LanguageModeling() if objective is None else objective,
        weights,
        folders=str(Path(data).resolve()),
    )
    source = None
    if space_file is not None:
        try:
            source = Path(space_file).read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"the space {space_file} cannot be read: {error}") from None
    if source is not None:
        own = load_space(source, Path(str(space_file)))
        if isinstance(own, Replicate):
            if seeds is not None:
                raise InputError(f"seeds are given twice: by replicate in {space_file}, and by --seeds; give one")
            seeds = own.seeds
    sweep = Sweep(
        folder=Path(folder),
        base=rebase(Trial(start), base),
        data=Path(data).resolve(),
        axes=tuple(axes),
        space_file=None if source is None else f"space-{hashlib.sha256(source.encode()).hexdigest()[:8]}.py",
        seeds=_seeds(1 if seeds is None else seeds),
        objectives=tuple(objectives),
        sampler=sampler,
        trials=trials,
        sampler_seed=sampler_seed,
        policy=policy,
        policy_settings=dict(policy_settings or {}),
        storage=None if storage is None else kept(storage, Path(folder)),
        lanes=lanes,
        evaluate_tokens=evaluate_tokens,
        weights=None if weights is None else weights.path,
        forgetting=None if forgetting is None else Path(forgetting).resolve(),
        evaluate_task_items=evaluate_task_items,
        service=service,
        id=new_id(Path(folder)),
        space_source=source,
        listed=tuple(listed),
    )
    sweep = _joined(sweep)
    check_sweep(sweep)
    return sweep


def _joined(sweep: Sweep) -> Sweep:
    """Return the sweep merged with the one in its folder."""
    folder = sweep.folder
    if not (folder / "sweep.json").exists():
        check_free(folder, "sweep", "has no sweep.json", "choose another folder for the sweep")
        return sweep
    there = Sweep.read(folder)
    sweep = dataclasses.replace(sweep, base=sweep.base.replace(recipe=sweep.base.recipe.as_in(there.base.recipe)))
    hashless = [one.base.recipe.replace(data="") for one in (there, sweep)]  # the data are compared below
    differences = difference(*hashless, steps=True)
    if differences:
        raise InputError(f"{folder} holds a sweep of another base: {differences}; choose another folder or that base")
    old, new = ({name: getattr(one, name) for name in _SAME} | {"decode": one.base.decode} for one in (there, sweep))
    differences = _differences(old, new)
    if differences:
        raise InputError(f"{folder} holds another sweep: {differences}; choose another folder or that setting")
    storage = there.storage if sweep.storage is None else with_storage(there, sweep.storage).storage
    axes, asked = ({name for r in all for name in _names(r, folder)} for all in (_requests(there), [sweep.request]))
    if axes != asked:
        raise InputError(
            f"{folder} holds a sweep over {_listed(axes)}, and this one is over {_listed(asked)}: one setting would "
            "have two names in it; choose another folder, or give every axis a value"
        )
    earlier = tuple(r for r in _requests(there) if not _covers(sweep.request, r))
    return dataclasses.replace(sweep, storage=storage, earlier=earlier, id=there.id)


def _requests(sweep: Sweep) -> tuple[TrialRequest, ...]:
    return (*sweep.earlier, sweep.request)


def _names(request: TrialRequest, folder: Path) -> Collection[str]:
    return request.names if request.listed else request.space(folder).names


def _listed(names: set[str]) -> str:
    return ", ".join(sorted(names)) or "no axis"


def _covers(new: TrialRequest, old: TrialRequest) -> bool:
    """Return whether the new request has every trial of the old one."""
    same = dataclasses.replace(old, seeds=new.seeds) == new
    return same and set(old.seeds) <= set(new.seeds)


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    names = [name for name in dict.fromkeys((*there, *here)) if there.get(name) != here.get(name)]
    return ", ".join(f"{name}={there.get(name)} there, {here.get(name)} here" for name in names)


def _seeds(seeds: int | Sequence[int]) -> tuple[int, ...]:
    chosen = tuple(range(seeds)) if isinstance(seeds, int) else tuple(seeds)
    if not chosen or len(set(chosen)) < len(chosen):
        raise InputError(f"a sweep needs at least one seed, each once, not {seeds}")
    return chosen
