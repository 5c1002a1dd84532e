"""Flat field names over the configs that a run is made of: what is not known, or cannot be, is refused.

One name belongs to one of ModelConfig, TrainConfig and HParams. A name with a dot reaches into a part of the model
(`experts.count`), which is made where the base has none and all it needs is given.
"""

import dataclasses
import functools
import types
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from experiments.sweep.space.kinds import describe
from experiments.sweep.trial import Decode, Setting
from model import ModelConfig, accounting
from model.errors import InputError, UnknownNameError
from model.parts import Part
from train import HParams, TrainConfig
from train.plan import Plan
from train.schedule import uses_horizon

LENGTHS = ("steps", "tokens", "tokens_per_parameter")
"""Of a run, as a point may give it: updates; tokens seen; tokens over parameters, the embedding table once."""
_WARMUPS = ("warmup_steps", "warmup_fraction")


def apply(base: Setting, point: Mapping[str, Any]) -> Setting:
    """The setting at a point: the base with some fields changed, its horizon that of the run.

    Beside the configs' fields a point may have one of LENGTHS, and `decode.batch` and the like of `Decode`; a name that
    begins with "_" is passed over. Raises InputError, with the point, on a field that is unknown or of the wrong type,
    and on a setting that is impossible.
    """
    changes = {name: value for name, value in point.items() if not name.startswith("_")}
    lengths = {name: changes.pop(name) for name in LENGTHS if name in changes}
    try:
        if len(lengths) > 1:
            raise InputError(f"{' and '.join(lengths)} say the same thing; give one")
        setting = rebase(base, changes)
        steps = _steps(setting.config, setting.train_config, lengths, base.steps)
    except UnknownNameError:
        raise
    except InputError as error:
        raise InputError(f"{describe(point)}: {error}") from error
    hparams = setting.hparams
    if hparams.total_steps == 0 and uses_horizon(setting.train_config, hparams):
        # As `train` would set it, but for the whole run: it may stop at a rung before.
        hparams = hparams.replace(total_steps=steps)
    return dataclasses.replace(setting, hparams=hparams, steps=steps)


def rebase(base: Setting, changes: Mapping[str, Any]) -> Setting:
    """The base itself with some fields changed, `decode.batch` and the like among them; its length stays as it is."""
    speed = {name: value for name, value in changes.items() if name.startswith("decode.")}
    others = {name: value for name, value in changes.items() if name not in speed}
    for name in LENGTHS:
        if name in others:
            raise InputError(f"{name} is no field of the base; give --steps, or --set {name}={others[name]}")
    _check_names(others, [*_fields(), *LENGTHS])
    config, train_config, hparams = overlay(others, base.config, base.train_config, base.hparams)
    decode = _replace_part("decode", Decode, base.decode, {_below(name): value for name, value in speed.items()})
    return Setting(config, train_config, hparams, base.steps, decode)


def overlay(
    changes: Mapping[str, Any], config: ModelConfig, train_config: TrainConfig, hparams: HParams
) -> tuple[ModelConfig, TrainConfig, HParams]:
    """Each change in whichever of the three has that field, all of one config at once.

    Of `warmup_steps` and `warmup_fraction` the one that is given replaces the other. Raises InputError.
    """
    _check_names(changes, _fields())
    of_train = {name: _typed(name, value, kind) for name, value, kind in _taken(changes, _kinds(TrainConfig))}
    of_hparams = {name: _typed(name, value, kind) for name, value, kind in _taken(changes, _hparams_kinds())}
    of_model = {name: value for name, value in changes.items() if name not in of_train and name not in of_hparams}
    warmups = [name for name in _WARMUPS if name in of_hparams]
    if len(warmups) == 1:
        of_hparams |= {name: 0 for name in _WARMUPS if name not in warmups}
    return (
        overlay_model(of_model, config),
        train_config.replace(**of_train) if of_train else train_config,
        hparams.replace(**of_hparams) if of_hparams else hparams,
    )


def overlay_model(changes: Mapping[str, Any], config: ModelConfig) -> ModelConfig:
    """Each change in the model's config, all at once, those inside its parts among them. Raises InputError."""
    _check_names(changes, list(_kinds(ModelConfig)))
    made = {name: _typed(name, value, kind) for name, value, kind in _taken(changes, _kinds(ModelConfig))}
    inside: dict[str, dict[str, Any]] = {}
    for name, value in changes.items():
        part, dot, below = name.partition(".")
        if dot:
            inside.setdefault(part, {})[below] = value
    for part, fields in inside.items():
        if part in made:
            raise InputError(f"{part} is given as a whole and as {part}.{next(iter(fields))}; give one of them")
        made[part] = _replace_part(part, _parts()[part], getattr(config, part), fields)
    return config.replace(**made) if made else config


def _steps(config: ModelConfig, train_config: TrainConfig, lengths: dict[str, Any], steps: int) -> int:
    phases = Plan.of(train_config).total_steps if train_config.phases else None
    for name, value in lengths.items():
        if name == "steps":
            steps = _typed(name, value, int)
        elif phases is not None:
            raise InputError(f"{name} cannot be given beside phases, which have tokens of their own; give steps")
        else:
            tokens = _typed(name, value, float)
            tokens *= accounting.parameters(config).total if name == "tokens_per_parameter" else 1
            if not 0 < tokens < float("inf"):
                raise InputError(f"{name}={value!r} must be positive")
            steps = max(1, round(tokens / train_config.tokens_per_step))
    steps = steps or phases or 0
    if steps == 0 and not lengths:
        raise InputError("a trial needs a length: give --steps, or steps, tokens or tokens_per_parameter on an axis")
    if steps < 1:
        raise InputError(f"steps={steps} must be at least 1")
    if phases is not None and steps > phases:
        raise InputError(f"steps={steps} exceed the {phases} of the phases")
    return steps


def _fields() -> list[str]:
    return [*_kinds(ModelConfig), *_kinds(TrainConfig), *HParams.DEFAULTS]


def _hparams_kinds() -> dict[str, Any]:
    return {name: int if isinstance(value, int) else float for name, value in HParams.DEFAULTS.items()}


def _taken(changes: Mapping[str, Any], kinds: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    return [(name, value, kinds[name]) for name, value in changes.items() if name in kinds]


def _check_names(changes: Mapping[str, Any], known: Sequence[str]) -> None:
    for name in changes:
        part, dot, below = name.partition(".")
        if part in _parts() and dot:
            _check_field(part, _parts()[part], below)
        elif dot or name not in known:
            raise UnknownNameError("setting", name, known)


def _check_field(part: str, kind: Any, field: str) -> None:
    if field not in _kinds(kind):
        raise UnknownNameError("setting", f"{part}.{field}", [f"{part}.{known}" for known in _kinds(kind)])


def _replace_part(name: str, kind: Any, part: Any, fields: dict[str, Any]) -> Any:
    for field in fields:
        _check_field(name, kind, field)
    typed = {field: _typed(f"{name}.{field}", value, _kinds(kind)[field]) for field, value in fields.items()}
    return kind.from_dict(typed) if part is None else part.replace(**typed)


@functools.cache
def _kinds(cls: Any) -> dict[str, Any]:
    """Of every field that is a setting: its type, where None stands for a default that is derived too."""
    hints = get_type_hints(cls)
    fields = [field for field in dataclasses.fields(cls) if field.name != "derived"]
    return {f.name: hints[f.name] | None if f.default is None else hints[f.name] for f in fields}


@functools.cache
def _parts() -> dict[str, Any]:
    """The parts of a model, by the field that holds them."""
    found = {}
    for name, kind in _kinds(ModelConfig).items():
        for arm in _arms(kind):
            if isinstance(arm, type) and issubclass(arm, Part):
                found[name] = arm
    return found


def _typed(name: str, value: Any, kind: Any) -> Any:
    """The value, whole numbers as floats where the field is one, so that 1 and 1.0 name the same trial."""
    arms = _arms(kind)
    if value is None and type(None) in arms:
        return None
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if bool in arms:
        if not isinstance(value, bool):
            raise InputError(f"{name}={value!r} must be true or false")
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


def _arms(kind: Any) -> tuple[Any, ...]:
    return get_args(kind) if get_origin(kind) in (Union, types.UnionType) else (kind,)


def _below(name: str) -> str:
    return name.partition(".")[2]
