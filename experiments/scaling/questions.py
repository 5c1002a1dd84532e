"""Answer questions about the laws of a table: each gets an answer, or the reason why there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

from experiments.scaling.fit import Fits, choose_form
from experiments.scaling.law.parametric import ParametricFit
from experiments.scaling.serving import ServingCost, ServingOptimum, serving_optimum
from experiments.scaling.use import (
    ComputeForLoss,
    FormLosses,
    OptimalRun,
    PlannedLoss,
    compute_for_loss,
    optimal,
    planned_by_form,
    planned_loss,
)
from model.errors import InputError, check_number

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Refused:
    """A question without an answer, and why it has none."""

    question: dict[str, float]
    """The numbers that were asked about, by name."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: the question, null for what would answer it, and `refused`."""
        unknown = dict.fromkeys(("flops", "params", "tokens", "loss", "interval"))
        return unknown | self.question | {"refused": self.reason}


@dataclass(frozen=True)
class PlannedRun:
    """The loss of a planned run by the parametric law, and by the other forms of law."""

    by_law: PlannedLoss
    by_form: FormLosses | str
    """The losses, or the reason why the forms are not compared."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        forms = {"refused": self.by_form} if isinstance(self.by_form, str) else self.by_form.to_dict()
        return self.by_law.to_dict() | {"forms": forms}


@dataclass(frozen=True)
class Answers:
    """One answer or refusal per question, in the order of the questions."""

    optimal: list[dict[str, OptimalRun | Refused]]
    """One answer per estimator, by its name."""
    compute_for_loss: list[ComputeForLoss | Refused]
    planned: list[PlannedRun | Refused]
    serving: list[ServingOptimum | Refused]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "optimal": [{name: one.to_dict() for name, one in row.items()} for row in self.optimal],
            "compute_for_loss": [one.to_dict() for one in self.compute_for_loss],
            "planned": [one.to_dict() for one in self.planned],
            "serving": [one.to_dict() for one in self.serving],
        }


@dataclass(frozen=True)
class Questions:
    """The questions of one call. planned: (N, D) of runs. serving: (tokens, cost) for all budgets and targets."""

    flops: Sequence[float] = ()
    target_loss: Sequence[float] = ()
    planned: Sequence[tuple[float, float]] = ()
    serving: tuple[float, ServingCost] | None = None
    level: float = 95


def answer(fits: Fits, asked: Questions) -> Answers:
    """Return one answer per question. Raises InputError, with every reason, if no question has an answer."""
    estimators = {"parametric": fits.parametric, "isoflop": fits.isoflop}
    estimators |= {f"isoflop.{name}": fit for name, fit in fits.valleys.items()}
    known = {name: fit for name, fit in estimators.items() if fit is not None}
    found = Answers(
        optimal=[
            {name: _ask({"flops": C}, partial(_optimal, fit, C, asked.level)) for name, fit in known.items()}
            for C in asked.flops
        ],
        compute_for_loss=[
            _ask({"target": target}, partial(_compute, fits, target, asked.level)) for target in asked.target_loss
        ],
        planned=[
            _ask({"params": N, "tokens": D}, partial(_planned, fits, N, D, asked.level)) for N, D in asked.planned
        ],
        serving=[],
    )
    if asked.serving is not None:
        tokens, cost = asked.serving
        goals = [{"training_flops": C} for C in asked.flops] + [{"target": target} for target in asked.target_loss]
        serving = [
            _ask(goal | {"served_tokens": tokens}, partial(_serving, fits, goal, tokens, cost, asked.level))
            for goal in goals
        ]
        found = replace(found, serving=serving)
    optimal_runs = [one for row in found.optimal for one in row.values()]
    every = [*optimal_runs, *found.compute_for_loss, *found.planned, *found.serving]
    refused = [one.reason for one in every if isinstance(one, Refused)]
    if len(refused) == len(every):
        raise InputError("; ".join(dict.fromkeys(refused)))
    return found


def _ask(question: dict[str, float], ask: Callable[[], Answer]) -> Answer | Refused:
    try:
        return ask()
    except InputError as error:
        return Refused(question, str(error))


def _optimal(fit: Any, flops: float, level: float) -> OptimalRun:
    check_number("--flops", flops, above=0)
    return optimal({"": fit}, flops, level)[""]


def _compute(fits: Fits, target: float, level: float) -> ComputeForLoss:
    check_number("--target-loss", target, above=0)
    return compute_for_loss(_law(fits), target, level)


def _planned(fits: Fits, params: float, tokens: float, level: float) -> PlannedRun:
    law = _law(fits)
    check_number("--params", params, above=0)
    check_number("--tokens", tokens, above=0)
    told = planned_loss(law, params, tokens, level)
    try:
        choice = choose_form(fits, delta=law.delta, bootstraps=min(100, law.bootstraps), seed=law.seed)
        return PlannedRun(told, planned_by_form(choice, params, tokens))
    except InputError as error:
        return PlannedRun(told, str(error))


def _serving(fits: Fits, goal: dict[str, float], tokens: float, cost: ServingCost, level: float) -> ServingOptimum:
    law = _law(fits)
    for name, value in goal.items():
        check_number("--target-loss" if name == "target" else "--flops", value, above=0)
    return serving_optimum(law, served_tokens=tokens, cost=cost, level=level, **goal)


def _law(fits: Fits) -> ParametricFit:
    """Return the law that predicts losses. Raises InputError if it was refused."""
    if fits.parametric is None:
        raise InputError(f"only the parametric law predicts a loss, and it was refused: {fits.refused['parametric']}")
    return fits.parametric
