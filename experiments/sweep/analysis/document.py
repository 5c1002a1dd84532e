"""Analyse a sweep's results as one document, which the report shows and `--json` writes."""

import statistics
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

from experiments.runs.curves import read_curve
from experiments.sweep.analysis.curves import EqualFlops, equal_flops
from experiments.sweep.analysis.executions import one_per_training, with_shared_losses
from experiments.sweep.analysis.importance import Importances, importances
from experiments.sweep.analysis.optimum import RateTransfer, transfer
from experiments.sweep.analysis.outcome import Summary, Winner
from experiments.sweep.analysis.pareto import ParetoFront, pareto
from experiments.sweep.analysis.results import Results, record_troubles
from experiments.sweep.analysis.rungs import Rungs, SweepRung
from experiments.sweep.analysis.scales import setting_text
from experiments.sweep.analysis.sentence import leader, sentence
from experiments.sweep.analysis.settings import candidates_of
from experiments.sweep.analysis.summary import summarize
from experiments.sweep.analysis.tasks import TaskComparison, compare_by_task
from experiments.sweep.objectives import LOSS, TRAINING_SPEED
from train.task_sets import is_task_metric


@dataclass(frozen=True)
class EarlyStopping:
    """The rungs of a sweep, the trials that were stopped, and what that saved."""

    rungs: list[SweepRung]
    pruned: int
    tokens_spent: float
    tokens_full: int
    """The tokens of all trials, each to its end."""
    share: float | None
    """tokens_spent over tokens_full; None for a population, whose new members take the places of those that leave."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return vars(self) | {"rungs": [rung.to_dict() for rung in self.rungs]}


@dataclass(frozen=True)
class SweepCost:
    """Totals over all trials; what a trial shares with a run that it left counts once."""

    tokens: float
    flops_6nd: float
    flops_exact: float
    run_seconds: float
    """Each run's own clock, so that lanes of one program count its time K times."""
    compile_seconds: float
    worker_seconds: float | None
    """Time in which a worker had a claim, the last of each trial, overlaps counted once; None if unknown."""
    workers: int
    static_shapes: int


@dataclass(frozen=True)
class SweepAnalysis:
    """All that a sweep's results say. A part that does not apply is None.

    Settings are compared as by `summarize`, with one run for all executions of a recipe; other objectives, and pareto,
    keep executions apart. Where another objective than the loss ranks them, there is no transfer.
    """

    summary: Summary
    unit: str
    """The unit of the losses."""
    sentence: str
    """The result in a few sentences."""
    followers: dict[str, str]
    objectives: list[str]
    policy: str
    sampler: str
    importance: Importances
    transfer: RateTransfer | None
    equal_flops: EqualFlops | None
    pareto: ParetoFront | None
    tasks: list[TaskComparison]
    halving: EarlyStopping | None
    cost: SweepCost

    @property
    def rungs(self) -> list[SweepRung]:
        """The rungs of a sweep that stops trials, from the first to the last."""
        return [] if self.halving is None else self.halving.rungs

    @property
    def compared_rungs(self) -> list[SweepRung]:
        """The rungs at which settings can be compared: none if another objective than the loss ranks them."""
        return self.rungs if self.summary.ranking.by_loss else []

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: those of the summary, and the other parts beside them."""
        parts = (self.transfer, self.equal_flops, self.pareto, self.halving)
        names = ("transfer", "equal_flops", "pareto", "halving")
        return self.summary.to_dict() | {
            "unit": self.unit,
            "sentence": self.sentence,
            "followers": self.followers,
            "objectives": self.objectives,
            "policy": self.policy,
            "sampler": self.sampler,
            "importance": self.importance.to_dict(),
            "tasks": [task.to_dict() for task in self.tasks],
            **{name: None if part is None else part.to_dict() for name, part in zip(names, parts, strict=True)},
            "cost": asdict(self.cost),
        }


def analyse(results: Results) -> SweepAnalysis:
    """Return all that the results say."""
    names = list(results.axes)
    summary = summarize(results.axes, results.rows, results.executions, results.objectives)
    ranked = summary.ranking
    everywhere, runs = [*names, *results.executions], one_per_training(results.rows, ranked.objective)
    every = with_shared_losses(results.rows)
    # If only the execution varies, `executions` already compares the training speed.
    ranking = (LOSS, ranked.objective)
    others = [name for name in results.objectives if name not in ranking and (names or name != TRAINING_SPEED)]
    of_tasks = [name for name in results.objectives if is_task_metric(name)]
    compared = [compare_by_task(results.folder, everywhere, every, name) for name in of_tasks]
    tasks = [task for task in compared if task is not None]
    others = [name for name in others if name not in of_tasks]
    kept = [row for row in candidates_of(summary.settings) if row.member is None]
    costs = equal_flops(names, runs, lambda row: read_curve(results.folder / row["run"]))
    if costs is not None and ranked.shaping:
        functions = f"their losses at different {' or '.join(ranked.shaping)} are different functions"
        costs = replace(costs, settings=[], refused=functions)
    unequal = [] if costs is None else [_unequal(costs, summary.winner)]
    summary = replace(
        summary,
        trials=[{name: value for name, value in row.items() if name != "rungs"} for row in results.rows],
        warnings=[*summary.warnings, *unequal, *record_troubles(results)],
    )
    return SweepAnalysis(
        summary=summary,
        unit=results.unit,
        sentence=" ".join(
            [
                sentence(summary, results.policy, results.unit),
                *(said for name in others if (said := leader(everywhere, _one_speed_a_program(every), name))),
                *(task.sentence for task in tasks),
            ]
        ),
        followers=results.followers,
        objectives=list(results.objectives),
        policy=results.policy,
        sampler=results.sampler,
        importance=importances(names, runs, ranked),
        transfer=transfer(names, kept, summary.seed_noise, summary.noise_freedom) if ranked.by_loss else None,
        equal_flops=costs,
        pareto=pareto(everywhere, every, results.objectives),
        tasks=tasks,
        halving=_halving(results),
        cost=_cost(results),
    )


def _one_speed_a_program(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the mean training speed of their program: trials of one program share its speed."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        if row["state"] == "finished" and row[TRAINING_SPEED] is not None:
            speeds.setdefault(row["cohort"], []).append(row[TRAINING_SPEED])
    means = {cohort: statistics.fmean(found) for cohort, found in speeds.items()}
    return [row | {TRAINING_SPEED: means.get(row["cohort"])} for row in rows]


def _unequal(costs: EqualFlops, winner: Winner | None) -> str:
    said = f"settings cost up to {costs.ratio:.2g} times the FLOPs of the cheapest"
    if costs.refused is not None:
        return f"{said}, and cannot be compared at equal FLOPs: {costs.refused}"
    best = costs.settings[0]
    same = winner is not None and best.setting == winner.setting
    which = "the same setting leads" if same else f"{setting_text(best.setting)} leads"
    return f"{said}; at equal FLOPs {which}"


def _halving(results: Results) -> EarlyStopping | None:
    """Return what early stopping did; None without early stopping."""
    pruned = sum(row["state"] == "pruned" for row in results.rows)
    if results.policy == "all" and not pruned:
        return None
    spent = sum(results.spent(row, "tokens") for row in results.rows)

    def own(row: dict[str, Any]) -> int:
        return row["planned_tokens"] * (row["planned_steps"] - row["parent_steps"]) // row["planned_steps"]

    full = sum(map(own, results.rows))
    return EarlyStopping(
        rungs=Rungs(list(results.axes), one_per_training(results.rows)).table(),
        pruned=pruned,
        tokens_spent=spent,
        tokens_full=full,
        share=spent / full if full and results.policy != "population" else None,
    )


def _cost(results: Results) -> SweepCost:
    def total(name: str) -> float:
        return sum(results.fact(row, name) or 0 for row in results.rows)

    def spent(name: str) -> float:
        return sum(results.spent(row, name) for row in results.rows)

    spans: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        if row["worker"] is not None and row["claimed_at"] is not None and row["ended_at"] is not None:
            spans.setdefault(row["worker"], []).append((row["claimed_at"], row["ended_at"]))
    return SweepCost(
        tokens=spent("tokens"),
        flops_6nd=spent("flops_6nd"),
        flops_exact=spent("flops_exact"),
        run_seconds=total("seconds"),
        compile_seconds=total("compile_seconds"),
        worker_seconds=sum(map(_covered, spans.values())) if spans else None,
        workers=len(spans),
        static_shapes=len({row["cohort"] for row in results.rows}),
    )


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
