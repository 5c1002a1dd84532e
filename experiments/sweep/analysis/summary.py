"""Summarize a sweep: its settings, its winner, and how both compare with the seed noise."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, get_args

from experiments.sweep.analysis.comparisons import best_of_many, highest_interval, selected_interval
from experiments.sweep.analysis.executions import (
    ExecutionComparison,
    compare_executions,
    one_per_training,
)
from experiments.sweep.analysis.optimum import RateOptimum, rate_optimum
from experiments.sweep.analysis.outcome import Summary, Winner
from experiments.sweep.analysis.ranking import Ranking, ranking
from experiments.sweep.analysis.rungs import Rungs, lineage, verdicts
from experiments.sweep.analysis.scales import MANY, distinct, edge_of, is_number, text
from experiments.sweep.analysis.settings import Setting, by_setting, candidates_of, group, pooled_noise
from experiments.sweep.objectives import LOSS
from experiments.sweep.row import State
from experiments.words import counted, is_or_are

NO_PARABOLA = "settings are ranked by {}, and the parabola is one through losses"


def summarize(
    axes: Mapping[str, Sequence[Any]],
    trials: Sequence[dict[str, Any]],
    executions: Iterable[str] = (),
    objectives: Sequence[str] = (LOSS,),
) -> Summary:
    """Return what the trials of a sweep say. axes: name → the values tried.

    trials: flat rows with every axis, seed, loss and state. executions: fields of Execution that vary (they are not
    axes; see `executions.py`). Rows with a `recipe` in common are one run: where losses are compared, one row with
    their mean. objectives: of the sweep, of which one ranks where losses are different functions (`ranking`).
    """
    ranked = ranking(axes, objectives)
    names, runs = list(axes), one_per_training(trials, ranked.objective)
    settings = group(names, runs, ranked.objective)
    candidates = candidates_of(settings)
    best = min(candidates, key=lambda row: ranked.cost(row.known_mean), default=None)
    settings = _compare_stopped(names, settings, runs, best if ranked.by_loss else None)
    noise, freedom = (None, 0)
    if best is not None:
        noise, freedom = pooled_noise(candidates, best.known_mean if ranked.by_loss else None)
    summary = Summary(
        axes={name: list(values) for name, values in axes.items()},
        trials=list(trials),
        settings=settings,
        counts=_counts(trials),
        winner=None,
        seed_noise=None,
        noise_freedom=0,
        optimum=None,
        optimum_refused=None,
        executions=compare_executions(list(executions), trials, *((noise, freedom) if ranked.by_loss else ())),
        warnings=[],
        ranking=ranked,
    )
    of_executions = _execution_warnings(summary.executions)
    if best is None:
        return replace(summary, warnings=[_no_winner(settings), *of_executions])
    stopped = sum(row.stopped is not None for row in settings)
    winner = _winner(names, best, candidates, noise, freedom, stopped, ranked)
    if best.member is not None:
        own = next(row for row in runs if row["id"] == best.member)
        winner = replace(winner, lineage=lineage(own, runs, names))
    found: RateOptimum | str | None = None
    if "learning_rate" in names:
        found = NO_PARABOLA.format(ranked.words)
        if ranked.by_loss:
            found = rate_optimum(names, best, candidates, noise, freedom)
    return replace(
        summary,
        seed_noise=noise,
        noise_freedom=freedom,
        winner=winner,
        optimum=found if isinstance(found, RateOptimum) else None,
        optimum_refused=found if isinstance(found, str) else None,
        warnings=[*_warnings(axes, best, winner, summary, noise), *of_executions],
    )


def fate(setting: Setting) -> str:
    """Return in a few words why a setting is not compared at the end; "" if it is."""
    if setting.lost:
        return "diverged"
    if setting.pruned:
        stopped = setting.stopped
        return "stopped early" if stopped is None else f"stopped after {stopped.steps:,} updates"
    if setting.seeds:
        return ""
    return "failed" if setting.failed else "not finished"


def _compare_stopped(
    names: Sequence[str], settings: Sequence[Setting], trials: Sequence[dict[str, Any]], best: Setting | None
) -> list[Setting]:
    """Return the settings, those that were stopped early with their comparison with the best."""
    members, rungs = by_setting(names, trials), Rungs(names, trials)
    winning = [] if best is None else members[best.key]
    return [replace(row, stopped=rungs.stopped(members[row.key], winning)) if row.pruned else row for row in settings]


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
    ranked: Ranking,
) -> Winner:
    """Return the winner.

    stopped: number of settings that competed with it at a rung; its interval corrects for the selection from all.
    """
    winner = Winner(
        setting={name: best.values[name] for name in names},
        member=best.member,
        mean=best.known_mean,
        seeds=best.seeds,
        candidates=len(candidates),
        interval_95=None,
        indistinguishable=None,
        lineage=None,
        tied=[
            {name: row.values[name] for name in names}
            for row in candidates
            if not ranked.by_loss and row is not best and row.known_mean == best.known_mean
        ],
    )
    if noise is None:
        return winner
    others = [row for row in candidates if row is not best]
    critical = best_of_many(len(others), freedom) if others else 0.0

    def reach(row: Setting) -> float:
        return critical * noise * math.sqrt(1 / row.seeds + 1 / best.seeds)

    error = noise / math.sqrt(best.seeds)
    near = [row for row in others if ranked.cost(row.known_mean) - ranked.cost(winner.mean) <= reach(row)]
    interval = highest_interval if ranked.highest else selected_interval
    return replace(
        winner,
        interval_95=list(interval(winner.mean, error, len(candidates) + stopped, freedom)),
        indistinguishable=[{name: row.values[name] for name in names} for row in near],
    )


def _warnings(
    axes: Mapping[str, Sequence[Any]], best: Setting, winner: Winner, summary: Summary, noise: float | None
) -> list[str]:
    counts, settings = summary.counts, summary.settings
    total = sum(counts.values())
    warnings = []
    population = any(row.member is not None for row in settings)
    if not population:  # a population moves beyond its initial values
        free = {name for row in winner.tied for name in axes if row[name] != best.values[name]}
        held = {name: values for name, values in axes.items() if name not in free}
        warnings += [said for name, values in held.items() if (said := _edge(name, values, best, settings))]
    if said := summary.ranking.warning():
        warnings.append(said)
    if summary.ranking.shaping and counts["pruned"]:
        functions = f"losses, which at different {' or '.join(summary.ranking.shaping)} are different functions"
        warnings.append(f"{counted(counts['pruned'], 'run')} ended early by a comparison of {functions}")
    equal = len(winner.indistinguishable or ())
    if equal:
        others = counted(equal, "other setting")
        warnings.append(f"the winner is within the seed noise: {others} cannot be distinguished from it")
    warnings += [] if population else _stopped_warnings(settings)
    if counts["diverged"]:
        warnings.append(f"{counts['diverged']} of {counted(total, 'run')} diverged")
    if counts["failed"]:
        warnings.append(f"{counts['failed']} of {counted(total, 'run')} failed and left no result")
    if noise is None:
        single = max(row.seeds + row.lost + row.pruned + row.failed + row.pending for row in settings) == 1
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
    chosen = best.values[name]
    value = f"the best {name}={text(chosen)}"
    side = edge_of(values, chosen)
    if side is not None:
        of = "of the grid" if len(distinct(values)) <= MANY else "of what was drawn, or near it"
        return f"{value} is the {side} {of}: the optimum may be beyond it"
    known = [row.values[name] for row in settings if row.seeds or row.lost or row.pruned]
    unknown = [v for v in distinct(values) if v not in known and is_number(v)]
    found = [v for v in distinct(values) if v in known and is_number(v)]
    if chosen is None or not unknown or chosen not in (found[0], found[-1]):
        return None
    beyond = [v for v in unknown if (v > chosen if chosen == found[-1] else v < chosen)]
    if not beyond:
        return None
    side = "highest" if chosen == found[-1] else "lowest"
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


def _execution_warnings(found: ExecutionComparison | None) -> list[str]:
    """Warn if executions of one recipe differ by more than rounding explains."""
    if found is None:
        return []
    said = []
    if found.verdict == "beyond":
        said.append(
            f"the losses of one recipe under several executions differ by up to {found.difference:.2g} nats, more "
            f"than {found.limit_by}: rounding does not explain that, so something else differs too"
        )
    if found.split:
        recipes = counted(found.split, "recipe")
        said.append(
            f"{recipes} diverged under one execution and not under another: {is_or_are(found.split)} at the edge of "
            "stability, and counted as diverged"
        )
    return said
