"""Build the valleys of a table's budgets; with screening, gross outliers are left out and listed."""

from dataclasses import replace

import numpy as np
from jaxtyping import Bool, Float, Int

from experiments.scaling.law.outliers import Outlier, screen_surface, screen_valleys
from experiments.scaling.law.parametric import fit_parametric
from experiments.scaling.rows.table import Table
from experiments.scaling.rows.thin import evenly, most_per_budget
from experiments.scaling.valleys.recognise import BY_CHANCE, recognise_budgets
from experiments.scaling.valleys.valley import (
    MINIMUM_SIZES,
    PARABOLA,
    Valley,
    ValleyShape,
    group_budgets,
    reason_against,
)
from model.errors import InputError

TOO_FEW = "too few to say which is wrong"


def fewer_per_budget(table: Table, budgets: Float[np.ndarray, " rows"]) -> tuple[Table, np.ndarray, int]:
    """Return (a sorted table with no more runs per budget than its valley can use, their budgets, how many that are).

    The runs kept are evenly spaced in the order of N within their budget, independent of their losses.
    """
    groups = group_budgets(budgets)
    most = most_per_budget([len(group) for group in groups])
    if all(len(group) <= most for group in groups):
        return table, budgets, most
    kept = np.sort(np.concatenate([group[evenly(len(group), most)] for group in groups]))
    return Table(table.params[kept], table.tokens[kept], table.loss[kept], None, table.dropped), budgets[kept], most


def thinned_in_words(used: int, rows: int, most: int) -> str | None:
    """Return what `fewer_per_budget` did; None if it kept every run."""
    if used == rows:
        return None
    return (
        f"the valleys go through {used:,} of {rows:,} runs, at most {most:,} of a budget at even steps of their order "
        "in N: the work of a curve grows with the cube of its runs"
    )


def valleys_of(table: Table, budgets: Float[np.ndarray, " rows"], *, screen: bool = False) -> list[Valley]:
    """Return every group's valley with its parabola; groups that are not a budget have a reason.

    screen: without gross outliers.
    """
    every = group_budgets(budgets)
    if not every:
        return []
    known = recognise_budgets(every, np.log(table.params), np.log(table.tokens), np.log(budgets))
    groups = [group for group, is_budget in zip(every, known, strict=True) if is_budget]
    others = [_no_budget(table, budgets, group) for group, is_budget in zip(every, known, strict=True) if not is_budget]
    if not groups:
        return others
    if screen:
        keeps, distances, undecided = _screened(table, budgets, groups)
    else:
        keeps = [np.ones(len(group), bool) for group in groups]
        distances, undecided = [0.0] * len(groups), [False] * len(groups)
    valleys = []
    for group, keep, distance, doubt in zip(groups, keeps, distances, undecided, strict=True):
        reason = reason_against(table.params[group[keep]], table.loss[group[keep]], PARABOLA)
        if reason is not None and not keep.all():  # the valley is rejected even without the outliers: keep all runs
            keep = np.ones(len(group), bool)
            reason, doubt = reason_against(table.params[group], table.loss[group], PARABOLA), True
        at_fault = len(np.unique(table.params[group[keep]])) < MINIMUM_SIZES
        if reason is None and doubt:
            at_fault = True
            reason = (
                f"its runs are up to {distance:.0f} times the noise of all budgets off any parabola, and are {TOO_FEW}"
            )
        kept = group[keep]
        params, loss = table.params[kept], table.loss[kept]
        outliers = [
            Outlier(
                params=float(table.params[i]),
                tokens=float(table.tokens[i]),
                loss=float(table.loss[i]),
                reason="gross outlier: no noise of these runs puts it off its valley so far",
                flops=float(budgets[i]),
            )
            for i in group[~keep]
        ]
        sizes = len(np.unique(params))
        coefficients = PARABOLA.coefficients(_centred(params), loss) if sizes >= MINIMUM_SIZES else None
        middle = float(np.exp(np.log(budgets[kept]).mean()))
        curve = coefficients, reason, PARABOLA, outliers, at_fault
        valleys.append(Valley(middle, params, table.tokens[kept], loss, *curve))
    return sorted(valleys + others, key=lambda valley: valley.flops)


def _no_budget(table: Table, budgets: np.ndarray, group: np.ndarray) -> Valley:
    params, tokens, loss = table.params[group], table.tokens[group], table.loss[group]
    few = len(np.unique(params)) < MINIMUM_SIZES
    reason = reason_against(params, loss, PARABOLA) if few else BY_CHANCE
    flops = float(np.exp(np.log(budgets[group]).mean()))
    return Valley(flops, params, tokens, loss, None, reason, runs_at_fault=True)


def _screened(
    table: Table, budgets: Float[np.ndarray, " rows"], groups: list[Int[np.ndarray, " _members"]]
) -> tuple[list[Bool[np.ndarray, " _members"]], list[float], list[bool]]:
    """(runs to keep, distance of the worst, whether it is undecided which run is wrong) of every budget.

    In a wide window a cubic does not follow a law to its ends, and its error there is not noise. So the losses are
    judged twice, as they are and as multiples of the parametric law's, where it can be fitted: a run is an outlier only
    if it is one by the law's multiples, and if the losses themselves do not show that it is valid.
    """
    keeps, distances, undecided = _judged(table.params, table.loss, budgets, groups)
    try:
        law = fit_parametric(table.params, table.tokens, table.loss, bootstraps=1)
    except InputError:
        return keeps, distances, undecided
    flat = table.loss / law.predict(table.params, table.tokens)
    by_law, far, doubts = _judged(table.params, flat, budgets, groups)
    keeps = [one if doubt else one | other for one, other, doubt in zip(by_law, keeps, undecided, strict=True)]
    return keeps, far, [one and other for one, other in zip(doubts, undecided, strict=True)]


def _judged(
    params: Float[np.ndarray, " rows"],
    loss: Float[np.ndarray, " rows"],
    budgets: Float[np.ndarray, " rows"],
    groups: list[Int[np.ndarray, " _members"]],
) -> tuple[list[Bool[np.ndarray, " _members"]], list[float], list[bool]]:
    """Return `screen_valleys` of the budgets, given what they say together."""
    log_params = [np.log(params[group]) for group in groups]
    together = screen_surface(
        np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        np.concatenate(log_params),
        np.concatenate([np.full(len(group), np.log(budgets[group]).mean()) for group in groups]),
        np.concatenate([loss[group] for group in groups]),
    )
    return screen_valleys(
        [(log - log.mean(), loss[group]) for log, group in zip(log_params, groups, strict=True)],
        np.split(together, np.cumsum([len(group) for group in groups])[:-1]),
    )


def _centred(params: np.ndarray) -> np.ndarray:
    return np.log(params) - np.log(params).mean()


def with_shape(valley: Valley, shape: ValleyShape) -> Valley:
    """Return the same runs under another curve; a reason that comes from the runs stays."""
    reason = valley.reason if valley.runs_at_fault else reason_against(valley.params, valley.loss, shape)
    return replace(valley, shape=shape, reason=reason)
