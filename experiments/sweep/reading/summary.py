"""What a sweep says, with the seed noise beside it."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar, get_args

import numpy as np

from experiments.sweep.reading.comparisons import best_of_many, selected_interval
from experiments.sweep.reading.optimum import NEAR, rate_optimum
from experiments.sweep.reading.scales import edge_of, text
from experiments.sweep.row import State
from experiments.words import counted

Setting = dict[str, Any]
Row = TypeVar("Row", bound=Mapping[str, Any])


def summarize(axes: Mapping[str, Sequence[Any]], trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The document of a sweep. axes: name → the values tried. trials: flat rows with every axis, seed, loss and state.

    settings: per setting the mean loss over its finished seeds, and how many runs diverged (`lost`), were pruned,
    failed or are pending; those never enter a mean. seed_noise: the standard deviation of one run over seeds, pooled
    over the settings within 0.5 nats of the best, where it matters. winner: the lowest mean, its 95 % interval, which
    allows for its having been chosen, and the settings that cannot be told apart from it: with the winner they hold the
    truly best one with 95 % probability (see `comparisons.py`). A setting that lost a run to divergence or of which
    only a part was pruned is no candidate. optimum: see `optimum.py`; None where it is refused, and optimum_refused
    says why. warnings: sentences.
    """
    names = list(axes)
    settings = group(names, trials)
    document: dict[str, Any] = {
        "schema_version": 1,
        "axes": {name: list(values) for name, values in axes.items()},
        "trials": list(trials),
        "settings": settings,
        "counts": _counts(trials),
        "winner": None,
        "seed_noise": None,
        "noise_freedom": 0,
        "optimum": None,
        "optimum_refused": None,
        "warnings": [],
    }
    candidates = candidates_of(settings)
    if not candidates:
        if any(row["lost"] for row in settings):
            lost = "every setting lost a run to divergence: no winner; lower the learning rates"
            document["warnings"].append(lost)
        else:
            document["warnings"].append("no setting has finished: no winner yet")
        return document
    best = min(candidates, key=lambda row: row["mean"])
    noise, freedom = pooled_noise(candidates, best["mean"])
    winner = _winner(names, best, candidates, noise, freedom)
    found = rate_optimum(names, best, candidates, noise, freedom) if "learning_rate" in names else {}
    refused = found.get("refused")
    return document | {
        "seed_noise": noise,
        "noise_freedom": freedom,
        "winner": winner,
        "optimum": found if found and not refused else None,
        "optimum_refused": refused,
        "warnings": _warnings(axes, best, winner, document["counts"], noise),
    }


def group(names: Sequence[str], trials: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """One row per setting, in order of appearance: the mean of its finished seeds, and what befell the rest."""
    settings = []
    for values, members in by_setting(names, trials).items():
        states = [trial["state"] for trial in members]
        losses = [trial["loss"] for trial, state in zip(members, states, strict=True) if state == "finished"]
        settings.append(
            dict(zip(names, values, strict=True))
            | {
                "mean": float(np.mean(losses)) if losses else None,
                "std": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
                "seeds": len(losses),
                "lost": states.count("diverged"),
                "pruned": states.count("pruned"),
                "failed": states.count("failed"),
                "pending": states.count("planned") + states.count("running"),
            }
        )
    return settings


def by_setting(names: Sequence[str], rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """The rows of every setting, by its values in the order of `names`; settings in order of appearance."""
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row[name] for name in names), []).append(row)
    return groups


def candidates_of(settings: Iterable[Setting]) -> list[Setting]:
    """Settings that may win: with a mean, and with no seed that diverged or was pruned while others went on."""
    return [row for row in settings if row["seeds"] and not row["lost"] and not row["pruned"]]


def pooled_noise(settings: Iterable[Setting], best: float) -> tuple[float | None, int]:
    """(standard deviation of one run over seeds, its degrees of freedom) of the replicated settings near the best."""
    replicated = [row for row in settings if row["std"] is not None]
    near = [row for row in replicated if row["mean"] < best + NEAR] or replicated
    freedom = sum(row["seeds"] - 1 for row in near)
    if freedom == 0:
        return None, 0
    return math.sqrt(sum((row["seeds"] - 1) * row["std"] ** 2 for row in near) / freedom), freedom


def _counts(trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    states = [trial["state"] for trial in trials]
    return {state: states.count(state) for state in get_args(State)}


def _winner(
    names: Sequence[str], best: Setting, candidates: Sequence[Setting], noise: float | None, freedom: int
) -> dict[str, Any]:
    winner = {
        "setting": {name: best[name] for name in names},
        "mean": best["mean"],
        "seeds": best["seeds"],
        "candidates": len(candidates),
        "interval_95": None,
        "indistinguishable": None,
    }
    if noise is None:
        return winner
    others = [row for row in candidates if row is not best]
    critical = best_of_many(len(others), freedom) if others else 0.0
    reach = lambda row: critical * noise * math.sqrt(1 / row["seeds"] + 1 / best["seeds"])
    error = noise / math.sqrt(best["seeds"])
    return winner | {
        "interval_95": list(selected_interval(best["mean"], error, len(candidates), freedom)),
        "indistinguishable": [
            {name: row[name] for name in names} for row in others if row["mean"] - best["mean"] <= reach(row)
        ],
    }


def _warnings(
    axes: Mapping[str, Sequence[Any]], best: Setting, winner: Setting, counts: dict[str, int], noise: float | None
) -> list[str]:
    warnings = []
    for name, values in axes.items():
        side = edge_of(values, best[name])
        if side is not None:
            value = f"{name}={text(best[name])}"
            warnings.append(f"the best {value} is the {side} of the grid: the optimum may lie beyond it")
    equal = len(winner["indistinguishable"] or ())
    if equal:
        others = counted(equal, "other setting")
        warnings.append(f"the winner lies inside the seed noise: {others} cannot be told apart from it")
    if counts["diverged"]:
        warnings.append(f"{counts['diverged']} of {counted(sum(counts.values()), 'run')} diverged")
    if counts["failed"]:
        warnings.append(f"{counts['failed']} of {counted(sum(counts.values()), 'run')} failed and left no result")
    if noise is None:
        warnings.append("one seed per setting: the noise of the winner is not known")
    return warnings
