"""What a sweep says, with the seed noise beside it."""

import math
from typing import Any

import numpy as np
from scipy import stats


def summarize(axes: dict[str, list[float]], trials: list[dict[str, Any]]) -> dict[str, Any]:
    """The document of a sweep.

    settings: per setting the mean loss over seeds. seed_noise: the standard deviation of one run over seeds,
    pooled over the settings near the winner, where it matters. winner: the best mean, its 95 % interval, and the
    settings that cannot be told apart from it (two-sided t-test at 5 %). warnings: an optimum on the grid's edge,
    lost runs, a single seed. optimum: a parabola through the mean losses against log learning rate.
    """
    names = list(axes)
    groups: dict[tuple[float, ...], list[dict[str, Any]]] = {}
    for trial in trials:
        groups.setdefault(tuple(trial[name] for name in names), []).append(trial)
    settings: list[dict[str, Any]] = []
    for values, members in groups.items():
        losses = [trial["loss"] for trial in members if trial["loss"] is not None]
        settings.append(
            dict(zip(names, values, strict=True))
            | {
                "mean": float(np.mean(losses)) if losses else None,
                "std": float(np.std(losses, ddof=1)) if len(losses) > 1 else None,
                "seeds": len(losses),
                "lost": len(members) - len(losses),
            }
        )
    document: dict[str, Any] = {
        "schema_version": 1,
        "axes": axes,
        "trials": trials,
        "settings": settings,
        "warnings": [],
    }
    # A setting that loses a run to divergence is no candidate, however good its other seeds are.
    candidates = [row for row in settings if row["lost"] == 0]
    if not candidates:
        document["warnings"].append("every setting lost a run to divergence: no winner; lower the learning rates")
        return document | {"winner": None, "seed_noise": None, "optimum": None}
    best = min(candidates, key=lambda row: row["mean"])
    noise, freedom = _pooled_noise(candidates, best["mean"])
    return document | {
        "seed_noise": noise,
        "winner": _winner(names, best, candidates, noise, freedom),
        "optimum": _parabola(names, best, candidates),
        "warnings": _warnings(axes, best, settings, noise),
    }


def _pooled_noise(candidates: list[dict[str, Any]], best: float) -> tuple[float | None, int]:
    replicated = sorted((row for row in candidates if row["std"] is not None), key=lambda row: row["mean"])
    near = [row for row in replicated if row["mean"] < best + 0.5] or replicated
    freedom = sum(row["seeds"] - 1 for row in near)
    if freedom == 0:
        return None, 0
    return math.sqrt(sum((row["seeds"] - 1) * row["std"] ** 2 for row in near) / freedom), freedom


def _winner(names, best, candidates, noise, freedom) -> dict[str, Any]:
    setting = {name: best[name] for name in names}
    if noise is None:
        return {"setting": setting, "mean": best["mean"], "interval_95": None, "indistinguishable": None}
    t = float(stats.t.ppf(0.975, freedom))
    half = t * noise / math.sqrt(best["seeds"])
    apart = lambda row: t * noise * math.sqrt(1 / row["seeds"] + 1 / best["seeds"])
    return {
        "setting": setting,
        "mean": best["mean"],
        "interval_95": [best["mean"] - half, best["mean"] + half],
        "indistinguishable": [
            {name: row[name] for name in names}
            for row in candidates
            if row is not best and row["mean"] - best["mean"] < apart(row)
        ],
    }


def _warnings(axes, best, settings, noise) -> list[str]:
    warnings = []
    for name, values in axes.items():
        ordered = sorted(values)
        if len(ordered) > 2 and best[name] in (ordered[0], ordered[-1]):
            side = "lowest" if best[name] == ordered[0] else "highest"
            warnings.append(f"the best {name}={best[name]:g} is the {side} of the grid: the optimum may lie beyond it")
    lost = sum(row["lost"] for row in settings)
    if lost:
        warnings.append(f"{lost} of {sum(row['seeds'] + row['lost'] for row in settings)} runs diverged")
    if noise is None:
        warnings.append("one seed per setting: the noise of the winner is not known")
    return warnings


def _parabola(names, best, candidates) -> dict[str, float] | None:
    """The vertex of loss against log learning rate through the best point and its neighbours, other axes held."""
    if "learning_rate" not in names:
        return None
    others = [name for name in names if name != "learning_rate"]
    line = [row for row in candidates if all(row[name] == best[name] for name in others) and row["learning_rate"] > 0]
    line.sort(key=lambda row: row["learning_rate"])
    index = line.index(best) if best in line else -1
    if not 0 < index < len(line) - 1:
        return None
    near = line[index - 1 : index + 2]
    c2, c1, c0 = np.polyfit([math.log(row["learning_rate"]) for row in near], [row["mean"] for row in near], 2)
    if c2 <= 0:
        return None
    return {"learning_rate": float(np.exp(-c1 / (2 * c2))), "loss": float(c0 - c1**2 / (4 * c2))}
