"""Apply a point to the base of a sweep: fields of its recipe and execution, its length, how its speed is measured."""

from collections.abc import Mapping
from typing import Any

from experiments.sweep.space.kinds import describe
from experiments.sweep.trial import Decode, Trial
from model import accounting
from model.errors import InputError, UnknownNameError, check_at_least_one, check_number
from train.overlay import check_names, fields, overlay, replace_part, typed
from train.plan import Plan
from train.recipe import Recipe
from train.schedule import uses_horizon

LENGTHS = ("steps", "tokens", "tokens_per_parameter")
"""Of a run, as a point may give it: updates; tokens seen; tokens over parameters, the embedding table once."""


def apply(base: Trial, point: Mapping[str, Any]) -> Trial:
    """Return the trial at a point: the base with some fields changed, its horizon that of the run.

    Beside the fields of `train.overlay` a point may have one of LENGTHS, and `decode.batch` and the like of `Decode`;
    names that begin with "_" are ignored. Raises InputError, with the point, on a field that is unknown or of the wrong
    type, and on a trial that is impossible.
    """
    changes = {name: value for name, value in point.items() if not name.startswith("_")}
    lengths = {name: changes.pop(name) for name in LENGTHS if name in changes}
    try:
        if len(lengths) > 1:
            raise InputError(f"{' and '.join(lengths)} say the same thing; give one")
        trial = rebase(base, changes)
        trial.recipe.objective.check_execution(trial.recipe.train, trial.execution)
        steps = _steps(trial.recipe, lengths)
    except UnknownNameError:
        raise
    except InputError as error:
        raise InputError(f"{describe(point)}: {error}") from error
    hparams = trial.recipe.hparams
    if hparams.total_steps == 0 and uses_horizon(trial.recipe.train, hparams):
        # As `train` would set it, but for the whole run, which may stop at an earlier rung.
        hparams = hparams.replace(total_steps=steps)
    return trial.replace(recipe=trial.recipe.replace(hparams=hparams, steps=steps), point=dict(point))


def rebase(base: Trial, changes: Mapping[str, Any]) -> Trial:
    """Return the base with some fields changed, including `decode.batch` and the like, with the same length."""
    speed = {name: value for name, value in changes.items() if name.startswith("decode.")}
    others = {name: value for name, value in changes.items() if name not in speed}
    for name in LENGTHS:
        if name in others:
            raise InputError(f"{name} is not a field of the base; give --steps, or --set {name}={others[name]}")
    check_names(others, [*fields(), *LENGTHS])
    recipe, execution = overlay(others, base.recipe, base.execution)
    inside = {name.partition(".")[2]: value for name, value in speed.items()}
    return base.replace(recipe=recipe, execution=execution, decode=replace_part("decode", Decode, base.decode, inside))


def _steps(recipe: Recipe, lengths: Mapping[str, Any]) -> int:
    phases = Plan.of(recipe.train).total_steps if recipe.train.phases else None
    steps = recipe.steps or 0
    for name, value in lengths.items():
        if name == "steps":
            steps = typed(name, value, int)
        elif phases is not None:
            raise InputError(f"{name} cannot be given with phases, which have their own tokens; give steps")
        else:
            tokens = typed(name, value, float)
            check_number(name, value, above=0)
            tokens *= accounting.parameters(recipe.model).total if name == "tokens_per_parameter" else 1
            steps = max(1, round(tokens / recipe.train.tokens_per_step))
    steps = steps or phases or 0
    if steps == 0 and not lengths:
        raise InputError("a trial needs a length: give --steps, or steps, tokens or tokens_per_parameter on an axis")
    check_at_least_one(steps=steps)
    if phases is not None and steps > phases:
        raise InputError(f"steps={steps} exceed the {phases} of the phases")
    return steps
