"""Summarize a sweep: its settings, its winner, and how both compare with the seed noise."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, get_args

from experiments.sweep.analysis.comparisons import best_of_many, selected_interval
from experiments.sweep.analysis.executions import compare_executions, one_per_training
from experiments.sweep.analysis.optimum import rate_optimum
from experiments.sweep.analysis.rungs import Rungs, lineage, verdicts
from experiments.sweep.analysis.scales import MANY, distinct, edge_of, is_number, text
from experiments.sweep.analysis.settings import Setting, by_setting, candidates_of, group, pooled_noise
from experiments.sweep.row import State
from experiments.words import counted, is_or_are


def summarize(
    axes: Mapping[str, Sequence[Any]], trials: Sequence[dict[str, Any]], executions: Iterable[str] = ()
) -> dict[str, Any]:
    """Return the document of a sweep. axes: name → the values tried.

    trials: flat rows with every axis, seed, loss and state. executions: fields of Execution that vary (they are not
    axes); the part `executions` of the document compares them (see `executions.py`). Rows with a `recipe` in common are
    one run: where losses are compared, one row with their mean. settings: per setting the mean loss over its finished
    seeds, and how many runs diverged (`lost`), were pruned, failed or are pending; those never enter a mean. stopped:
    for a setting that was stopped early, its comparison with the winner at equal tokens (see `rungs.py`). seed_noise:
    the standard deviation of one run over seeds, pooled over the settings within 0.5 nats of the best, where it
    matters. winner: the lowest mean among settings that were trained to the end (`candidates` of them), its 95 %
    interval, which allows for its having been chosen, and the candidates that are indistinguishable from it: with the
    winner they hold the best of the candidates with 95 % probability (see `comparisons.py`). A setting with a diverged
    run, or with only some of its runs pruned, is not a candidate. lineage: the settings of a winner that changed them
    along its run, as in a population. optimum: see `optimum.py`; None if it cannot be determined, and optimum_refused
    says why. warnings: sentences.
    """
    names, runs = list(axes), one_per_training(trials)
    settings = group(names, runs)
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
        "executions": None,
        "warnings": [],
    }
    candidates = candidates_of(settings)
    best = min(candidates, key=lambda row: row["mean"], default=None)
    _compare_stopped(names, settings, runs, best)
    noise, freedom = (None, 0) if best is None else pooled_noise(candidates, best["mean"])
    document["executions"] = compare_executions(list(executions), trials, noise, freedom)
    if best is None:
        document["warnings"] += [_no_winner(settings), *_execution_warnings(document)]
        return document
    stopped = sum(row["stopped"] is not None for row in settings)
    winner = _winner(names, best, candidates, noise, freedom, stopped)
    if best["member"] is not None:
        own = next(row for row in runs if row["id"] == best["member"])
        winner["lineage"] = lineage(own, runs, names)
    found = rate_optimum(names, best, candidates, noise, freedom) if "learning_rate" in names else {}
    refused = found.get("refused")
    return document | {
        "seed_noise": noise,
        "noise_freedom": freedom,
        "winner": winner,
        "optimum": found if found and not refused else None,
        "optimum_refused": refused,
        "warnings": [*_warnings(axes, best, winner, document, noise), *_execution_warnings(document)],
    }


def fate(setting: Setting) -> str:
    """Return in a few words why a setting is not compared at the end; "" if it is."""
    if setting["lost"]:
        return "diverged"
    if setting["pruned"]:
        stopped = setting.get("stopped")
        return "stopped early" if stopped is None else f"stopped after {stopped['steps']:,} updates"
    if setting["seeds"]:
        return ""
    return "failed" if setting["failed"] else "not finished"


def _compare_stopped(
    names: Sequence[str], settings: Sequence[Setting], trials: Sequence[dict[str, Any]], best: Setting | None
) -> None:
    """Set `stopped` of every setting: None, or its comparison with the best at the rung at which it was stopped."""
    members, rungs = by_setting(names, trials), Rungs(names, trials)

    def of(row: dict[str, Any]) -> list[Any]:
        return members[(*(row[name] for name in names), row["member"])]

    for row in settings:
        row["stopped"] = rungs.stopped(of(row), [] if best is None else of(best)) if row["pruned"] else None


def _no_winner(settings: Sequence[Setting]) -> str:
    states = [fate(row) for row in settings]
    if states.count("diverged") == len(states):
        return "every setting lost a run to divergence: no winner; lower the learning rates"
    kinds = {"diverged": 0, "failed": 0, "not finished": 0, "stopped early": 0}
    for state in states:
        kinds["stopped early" if state.startswith("stopped") else state] += 1
    return f"no setting was trained to the end: {', '.join(f'{n} {kind}' for kind, n in kinds.items() if n)}"


def _counts(trials: Sequence[Mapping[str, Any]]) -> dict[str, int]:
    states = [trial["state"] for trial in trials]
    return {state: states.count(state) for state in get_args(State)}


def _winner(
    names: Sequence[str],
    best: Setting,
    candidates: Sequence[Setting],
    noise: float | None,
    freedom: int,
    stopped: int,
) -> dict[str, Any]:
    """Return the winner.

    stopped: number of settings that competed with it at a rung; its interval corrects for the selection from all.
    """
    winner = {
        "setting": {name: best[name] for name in names},
        "member": best["member"],
        "mean": best["mean"],
        "seeds": best["seeds"],
        "candidates": len(candidates),
        "interval_95": None,
        "indistinguishable": None,
        "lineage": None,
    }
    if noise is None:
        return winner
    others = [row for row in candidates if row is not best]
    critical = best_of_many(len(others), freedom) if others else 0.0

    def reach(row: dict[str, Any]) -> float:
        return critical * noise * math.sqrt(1 / row["seeds"] + 1 / best["seeds"])

    error = noise / math.sqrt(best["seeds"])
    return winner | {
        "interval_95": list(selected_interval(best["mean"], error, len(candidates) + stopped, freedom)),
        "indistinguishable": [
            {name: row[name] for name in names} for row in others if row["mean"] - best["mean"] <= reach(row)
        ],
    }


def _warnings(
    axes: Mapping[str, Sequence[Any]], best: Setting, winner: Setting, document: Mapping[str, Any], noise: float | None
) -> list[str]:
    counts, settings = document["counts"], document["settings"]
    total = sum(counts.values())
    warnings = []
    population = any(row["member"] is not None for row in settings)
    if not population:  # a population moves beyond its initial values
        warnings += [said for name, values in axes.items() if (said := _edge(name, values, best, settings))]
    equal = len(winner["indistinguishable"] or ())
    if equal:
        others = counted(equal, "other setting")
        warnings.append(f"the winner is within the seed noise: {others} cannot be distinguished from it")
    warnings += [] if population else _stopped_warnings(settings)
    if counts["diverged"]:
        warnings.append(f"{counts['diverged']} of {counted(total, 'run')} diverged")
    if counts["failed"]:
        warnings.append(f"{counts['failed']} of {counted(total, 'run')} failed and left no result")
    if noise is None:
        single = (
            max(row["seeds"] + row["lost"] + row["pruned"] + row["failed"] + row["pending"] for row in settings) == 1
        )
        alone = "no two members of the population had the same settings throughout"
        why = (
            alone
            if population
            else "one seed per setting"
            if single
            else "no setting was trained to the end with two seeds"
        )
        warnings.append(f"{why}: the noise of the winner is not known")
    return warnings


def _edge(name: str, values: Sequence[Any], best: Setting, settings: Sequence[Setting]) -> str | None:
    """Warn if a better value may be beyond the best one: it is the last value that was tried, or that has a result."""
    value = f"the best {name}={text(best[name])}"
    side = edge_of(values, best[name])
    if side is not None:
        of = "of the grid" if len(distinct(values)) <= MANY else "of what was drawn, or near it"
        return f"{value} is the {side} {of}: the optimum may be beyond it"
    known = [row[name] for row in settings if row["seeds"] or row["lost"] or row["pruned"]]
    unknown = [v for v in distinct(values) if v not in known and is_number(v)]
    found = [v for v in distinct(values) if v in known and is_number(v)]
    if best[name] is None or not unknown or best[name] not in (found[0], found[-1]):
        return None
    beyond = [v for v in unknown if (v > best[name] if best[name] == found[-1] else v < best[name])]
    if not beyond:
        return None
    side = "highest" if best[name] == found[-1] else "lowest"
    listed = ", ".join(map(text, beyond[:3])) + (" …" if len(beyond) > 3 else "")
    return f"{value} is the {side} that has a result, {listed} none: the optimum may be beyond it"


def _stopped_warnings(settings: Sequence[Setting]) -> list[str]:
    """Warn about settings that were stopped early without evidence that they are worse than the winner."""
    said = verdicts(settings)
    lower, never = said.get("lower", 0), said.get("not compared", 0)
    close = said.get("equal", 0) + said.get("better", 0)

    def were(count: int) -> str:
        return "1 setting was" if count == 1 else f"{count} settings were"

    return [
        *(
            [
                f"{were(close)} stopped early, not worse than the winner at equal tokens by more than the seed noise: "
                f"{'it' if close == 1 else 'they'} may be as good"
            ]
            if close
            else []
        ),
        *([f"{were(lower)} stopped early at a lower loss than the winner had at equal tokens"] if lower else []),
        *([f"{were(never)} stopped where the winner has no loss, and never compared with it"] if never else []),
    ]


def _execution_warnings(document: Mapping[str, Any]) -> list[str]:
    """Warn if executions of one recipe differ by more than rounding explains."""
    found = document["executions"]
    if found is None:
        return []
    said = []
    if found["verdict"] == "beyond":
        said.append(
            f"the losses of one recipe under several executions differ by up to {found['difference']:.2g} nats, more "
            f"than {found['limit_by']}: rounding does not explain that, so something else differs too"
        )
    if found["split"]:
        recipes = counted(found["split"], "recipe")
        said.append(
            f"{recipes} diverged under one execution and not under another: {is_or_are(found['split'])} at the edge of "
            "stability, and counted as diverged"
        )
    return said
