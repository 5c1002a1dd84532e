"""From a table to the valleys of its budgets, gross outliers left out and listed."""

from dataclasses import replace

import numpy as np
from jaxtyping import Float

from experiments.scaling.law.outliers import screen_surface, screen_valleys
from experiments.scaling.rows.table import Table
from experiments.scaling.valleys.recognise import BY_CHANCE, recognise_budgets
from experiments.scaling.valleys.valley import MINIMUM_SIZES, PARABOLA, Shape, Valley, group_budgets, reason_against

TOO_FEW = "too few to say which is wrong"


def valleys_of(table: Table, budgets: Float[np.ndarray, " rows"]) -> list[Valley]:
    """Every group's valley with its parabola, without gross outliers; groups that are no budget have the reason."""
    every = group_budgets(budgets)
    if not every:
        return []
    known = recognise_budgets(every, np.log(table.params), np.log(table.tokens), np.log(budgets))
    groups = [group for group, is_budget in zip(every, known, strict=True) if is_budget]
    others = [_no_budget(table, budgets, group) for group, is_budget in zip(every, known, strict=True) if not is_budget]
    if not groups:
        return others
    log_params = [np.log(table.params[group]) for group in groups]
    together = screen_surface(
        np.repeat(np.arange(len(groups)), [len(group) for group in groups]),
        np.concatenate(log_params),
        np.concatenate([np.full(len(group), np.log(budgets[group]).mean()) for group in groups]),
        np.concatenate([table.loss[group] for group in groups]),
    )
    keeps, distances, undecided = screen_valleys(
        [(log - log.mean(), table.loss[group]) for log, group in zip(log_params, groups, strict=True)],
        np.split(together, np.cumsum([len(group) for group in groups])[:-1]),
    )
    valleys = []
    for group, keep, distance, doubt in zip(groups, keeps, distances, undecided, strict=True):
        reason = reason_against(table.params[group[keep]], table.loss[group[keep]], PARABOLA)
        if reason is not None and not keep.all():  # leaving runs out did not save the valley: nothing is left out
            keep = np.ones(len(group), bool)
            reason, doubt = reason_against(table.params[group], table.loss[group], PARABOLA), True
        at_fault = len(np.unique(table.params[group[keep]])) < MINIMUM_SIZES
        if reason is None and doubt:
            at_fault = True
            reason = (
                f"its runs lie up to {distance:.0f} times the noise of all budgets off any parabola, and are {TOO_FEW}"
            )
        kept = group[keep]
        params, loss = table.params[kept], table.loss[kept]
        outliers = [
            {"flops": float(budgets[i]), "params": float(table.params[i]), "tokens": float(table.tokens[i])}
            | {
                "loss": float(table.loss[i]),
                "reason": "gross outlier: no noise of these runs puts it off its valley so far",
            }
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


def _centred(params: np.ndarray) -> np.ndarray:
    return np.log(params) - np.log(params).mean()


def with_shape(valley: Valley, shape: Shape) -> Valley:
    """The same runs under another curve; a reason that lies in the runs stays."""
    reason = valley.reason if valley.runs_at_fault else reason_against(valley.params, valley.loss, shape)
    return replace(valley, shape=shape, reason=reason)
