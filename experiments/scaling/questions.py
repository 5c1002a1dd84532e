"""Answer questions about the laws of a table: each gets an answer, or the reason why there is none."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from experiments.scaling.fit import Fits, choose_form
from experiments.scaling.law.parametric import ParametricFit
from experiments.scaling.serving import ServingCost, serving_optimum
from experiments.scaling.use import compute_for_loss, optimal, planned_by_form, planned_loss
from model.checks import check_number
from model.errors import InputError

Answer = dict[str, Any]


@dataclass(frozen=True)
class Questions:
    """The questions of one call. planned: (N, D) of runs. serving: (tokens, cost) for all budgets and targets."""

    flops: Sequence[float] = ()
    target_loss: Sequence[float] = ()
    planned: Sequence[tuple[float, float]] = ()
    serving: tuple[float, ServingCost] | None = None
    level: float = 95


def answer(fits: Fits, asked: Questions) -> dict[str, list[Answer]]:
    """Return {"optimal", "compute_for_loss", "planned", "serving"}: one answer per question, in order.

    A question without an answer keeps its inputs; all else is null, with the reason next to it under "refused".
    Raises InputError, with every reason, where no question has an answer.
    """
    estimators = {"parametric": fits.parametric, "isoflop": fits.isoflop}
    estimators |= {f"isoflop.{name}": fit for name, fit in fits.valleys.items()}
    known = {name: fit for name, fit in estimators.items() if fit is not None}
    found: dict[str, list[Answer]] = {
        "optimal": [
            {name: _ask({"flops": C}, partial(_optimal, fit, C, asked.level)) for name, fit in known.items()}
            for C in asked.flops
        ],
        "compute_for_loss": [
            _ask({"target": target}, partial(_compute, fits, target, asked.level)) for target in asked.target_loss
        ],
        "planned": [
            _ask({"params": N, "tokens": D}, partial(_planned, fits, N, D, asked.level)) for N, D in asked.planned
        ],
        "serving": [],
    }
    if asked.serving is not None:
        tokens, cost = asked.serving
        goals = [{"training_flops": C} for C in asked.flops] + [{"target": target} for target in asked.target_loss]
        found["serving"] = [
            _ask(goal | {"served_tokens": tokens}, partial(_serving, fits, goal, tokens, cost, asked.level))
            for goal in goals
        ]
    every = [one for row in found["optimal"] for one in row.values()]
    every += [one for name in ("compute_for_loss", "planned", "serving") for one in found[name]]
    if all("refused" in one for one in every):
        raise InputError("; ".join(dict.fromkeys(one["refused"] for one in every)))
    return found


def is_refused(one: Answer) -> bool:
    """Return whether a question had no answer."""
    return "refused" in one


def _ask(question: Answer, ask: Callable[[], Answer]) -> Answer:
    try:
        return ask()
    except InputError as error:
        unknown = dict.fromkeys(("flops", "params", "tokens", "loss", "interval"))
        return unknown | question | {"refused": str(error)}


def _optimal(fit: Any, flops: float, level: float) -> Answer:
    check_number("--flops", flops, above=0)
    return optimal({"": fit}, flops, level)[""]


def _compute(fits: Fits, target: float, level: float) -> Answer:
    check_number("--target-loss", target, above=0)
    return compute_for_loss(_law(fits), target, level)


def _planned(fits: Fits, params: float, tokens: float, level: float) -> Answer:
    law = _law(fits)
    check_number("--params", params, above=0)
    check_number("--tokens", tokens, above=0)
    told = planned_loss(law, params, tokens, level)
    try:
        choice = choose_form(fits, delta=law.delta, bootstraps=min(100, law.bootstraps), seed=law.seed)
        return told | {"forms": planned_by_form(choice, params, tokens)}
    except InputError as error:
        return told | {"forms": {"refused": str(error)}}


def _serving(fits: Fits, goal: dict[str, float], tokens: float, cost: ServingCost, level: float) -> Answer:
    law = _law(fits)
    for name, value in goal.items():
        check_number("--target-loss" if name == "target" else "--flops", value, above=0)
    return goal | serving_optimum(law, served_tokens=tokens, cost=cost, level=level, **goal)


def _law(fits: Fits) -> ParametricFit:
    """Return the law that predicts losses. Raises InputError if it was refused."""
    if fits.parametric is None:
        raise InputError(f"only the parametric law predicts a loss, and it was refused: {fits.refused['parametric']}")
    return fits.parametric
