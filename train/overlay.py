"""Apply changes by flat field names to a recipe and its execution; unknown names and wrong types raise InputError.

A name belongs to one of ModelConfig, TrainConfig, HParams and Execution. A name with a dot is a field of a part of the
model (`experts.count`), which is created if the base has none and all its required fields are given, or of the training
objective (`objective.mask_id`); `objective` itself is given by name.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from model import Execution, ModelConfig
from model.adapters import Adapter
from model.errors import InputError, UnknownNameError, check_bool
from model.execution import FIELDS as EXECUTION
from model.parts import Part
from train import objectives
from train.config import HParams, TrainConfig
from train.data.manifest import Manifest, load_manifest
from train.objectives import Objective
from train.recipe import Recipe

OBJECTIVE = "objective"
_WARMUPS = ("warmup_steps", "warmup_fraction")


def overlay(changes: Mapping[str, Any], recipe: Recipe, execution: Execution = Execution()) -> tuple[Recipe, Execution]:
    """Apply each change to the part that has the field, all changes of one part together.

    Giving one of `warmup_steps` and `warmup_fraction` resets the other. A new objective gives the model the head and
    the ids that it needs (`Objective.fit`). Raises InputError. Whether the microbatches divide the batch is not checked
    here, but before training (`TrainConfig.check`).
    """
    check_names(changes, fields())
    of_train = _typed_changes(changes, kinds(TrainConfig))
    of_hparams = _typed_changes(changes, _hparams_kinds())
    of_execution = _typed_changes(changes, kinds(Execution))
    of_objective = {name: value for name, value in changes.items() if name.partition(".")[0] == OBJECTIVE}
    others = {*of_train, *of_hparams, *of_execution, *of_objective}
    of_model = {name: value for name, value in changes.items() if name not in others}
    warmups = [name for name in _WARMUPS if name in of_hparams]
    if len(warmups) == 1:
        of_hparams |= {name: 0 for name in _WARMUPS if name not in warmups}
    execution = execution.replace(**of_execution)
    model, objective = overlay_model(of_model, recipe.model), _overlay_objective(of_objective, recipe.objective)
    if objective.NAME != recipe.objective.NAME:
        given = {name: getattr(model, name) for name in of_model if "." not in name}
        fitted, with_ids = objective.fit(model, _manifest(recipe))
        model = fitted.replace(**given)
        # A vocabulary size that was given includes the objective's ids already.
        objective = objective.resolved(model) if "vocab_size" in given else with_ids
    made = recipe.replace(
        model=model,
        objective=objective,
        train=recipe.train.replace(**of_train) if of_train else recipe.train,
        hparams=recipe.hparams.replace(**of_hparams) if of_hparams else recipe.hparams,
        former={name: of_execution.get(name, value) for name, value in recipe.former.items()},
    )
    return made.under(execution), execution


def overlay_model(changes: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Apply all changes to the model's config together, including those of its parts. Raises InputError."""
    check_names(changes, list(kinds(ModelConfig)))
    made = _typed_changes(changes, kinds(ModelConfig))
    inside: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        part, dot, below = name.partition(".")
        if dot:
            inside.setdefault(part, {})[below] = value
    for part, values in inside.items():
        if part in made:
            raise InputError(f"{part} is given as a whole and as {part}.{next(iter(values))}; give one of them")
        made[part] = replace_part(part, _parts()[part], getattr(config, part), values)
    return config.replace(**made) if made else config


def overlay_program(changes: Mapping[str, Any], config: ModelConfig) -> tuple[ModelConfig, Execution]:
    """Apply changes to a model's config and to a default execution, for use without training. Raises InputError."""
    check_names(changes, [*kinds(ModelConfig), *EXECUTION])
    of_execution = _typed_changes(changes, kinds(Execution))
    of_model = {name: value for name, value in changes.items() if name not in of_execution}
    return overlay_model(of_model, config), Execution(**of_execution)


def fields() -> list[str]:
    """Return the names of all fields that `overlay` takes."""
    return [*kinds(ModelConfig), *kinds(TrainConfig), *HParams.DEFAULTS, *EXECUTION, OBJECTIVE]


def check_names(changes: Mapping[str, Any], known: Sequence[str]) -> None:
    """Raise UnknownNameError for a name that is neither in `known` nor a field of a part of the model.

    Fields of the objective depend on which objective it is; `overlay` checks them.
    """
    for name in changes:
        part, dot, below = name.partition(".")
        if part == OBJECTIVE and dot and OBJECTIVE in known:
            continue
        if part in _parts() and dot:
            _check_field(part, _parts()[part], below)
        elif dot or name not in known:
            raise UnknownNameError("setting", name, known)


def replace_part(name: str, kind: Any, part: Any, changes: Mapping[str, Any]) -> Any:
    """Return a part of a config with some fields changed, or a new one if it is None. Raises InputError."""
    for field in changes:
        _check_field(name, kind, field)
    values = {field: typed(f"{name}.{field}", value, kinds(kind)[field]) for field, value in changes.items()}
    return kind.from_dict(values) if part is None else part.replace(**values)


def _overlay_objective(changes: Mapping[str, Any], base: Objective) -> Objective:
    """Return the objective after these changes; a new name starts from its defaults."""
    objective = base
    if OBJECTIVE in changes:
        named = objectives.get(str(changes[OBJECTIVE]))
        objective = base if type(named) is type(base) else named
    kind = type(objective)
    values: dict[str, Any] = {}
    of_adapter: dict[str, Any] = {}
    for name, value in changes.items():
        _, dot, field = name.partition(".")
        if field.startswith("adapter."):
            inside = field.removeprefix("adapter.")
            of_adapter[inside] = _listed(value, kinds(Adapter).get(inside))
        elif dot:
            _check_field(OBJECTIVE, kind, field)
            values[field] = _listed(typed(name, value, kinds(kind)[field]), kinds(kind)[field])
    if of_adapter:
        values["adapter"] = replace_part(f"{OBJECTIVE}.adapter", Adapter, objective.adapter, of_adapter)
    return objective.replace(**values) if values else objective


def _listed(value: Any, kind: Any) -> Any:
    """Return "a,b" as a tuple if the field is one."""
    return tuple(value.split(",")) if isinstance(value, str) and get_origin(kind) in (tuple, Sequence) else value


def _manifest(recipe: Recipe) -> Manifest | None:
    """Return the manifest of a recipe's first data folder; None if the recipe has no folders."""
    if recipe.folders is None:
        return None
    return load_manifest(recipe.folders if isinstance(recipe.folders, str) else next(iter(recipe.folders.values())))


@functools.cache
def kinds(cls: Any) -> dict[str, Any]:
    """Return the type of every settable field; a field whose default is None, to be derived, also takes None."""
    hints = get_type_hints(cls)
    settings = [field for field in dataclasses.fields(cls) if field.name != "derived"]
    found = {}
    for field in settings:
        hint = hints[field.name]
        found[field.name] = hint | None if field.default is None else hint
    return found


def typed(name: str, value: Any, kind: Any) -> Any:
    """Return the value; for a float field as a float, so that 1 and 1.0 name the same trial.

    Raises InputError if it is of another type.
    """
    arms = _arms(kind)
    if value is None and type(None) in arms:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if bool in arms:
        check_bool(name, value)
    elif float in arms:
        if not number:
            raise InputError(f"{name}={value!r} must be a number")
        return float(value)
    elif int in arms:
        if not number or isinstance(value, float):
            raise InputError(f"{name}={value!r} must be a whole number")
    elif (str in arms or any(get_origin(arm) is Literal for arm in arms)) and not isinstance(value, str):
        raise InputError(f"{name}={value!r} must be text")
    return value


def _typed_changes(changes: Mapping[str, Any], known: Mapping[str, Any]) -> dict[str, Any]:
    return {name: typed(name, value, known[name]) for name, value in changes.items() if name in known}


def _hparams_kinds() -> dict[str, Any]:
    return {name: int if isinstance(value, int) else float for name, value in HParams.DEFAULTS.items()}


def _check_field(part: str, kind: Any, field: str) -> None:
    if field not in kinds(kind):
        raise UnknownNameError("setting", f"{part}.{field}", [f"{part}.{known}" for known in kinds(kind)])


@functools.cache
def _parts() -> dict[str, Any]:
    """Return the types of a model's parts by the field that holds them."""
    found = {}
    for name, kind in kinds(ModelConfig).items():
        for arm in _arms(kind):
            if isinstance(arm, type) and issubclass(arm, Part):
                found[name] = arm
    return found


def _arms(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)
