"""Analyse a sweep's results as one document, which the report shows and `--json` writes."""

import statistics
from collections.abc import Sequence
from typing import Any

from experiments.runs.curves import read_curve
from experiments.sweep.analysis.curves import equal_flops
from experiments.sweep.analysis.executions import one_per_training, with_shared_losses
from experiments.sweep.analysis.importance import importances
from experiments.sweep.analysis.optimum import transfer
from experiments.sweep.analysis.pareto import pareto
from experiments.sweep.analysis.results import Results, record_troubles
from experiments.sweep.analysis.rungs import Rungs
from experiments.sweep.analysis.scales import setting_text
from experiments.sweep.analysis.sentence import leader, sentence
from experiments.sweep.analysis.settings import candidates_of
from experiments.sweep.analysis.summary import summarize
from experiments.sweep.objectives import LOSS, TRAINING_SPEED


def analyse(results: Results) -> dict[str, Any]:
    """Return `summarize` with unit, sentence, importance, transfer, equal_flops, pareto, halving and cost.

    A part that does not apply is None; one that cannot be computed holds `refused`, with the reason.
    `experiments.sweep.analysis.importance` describes importances, `experiments.sweep.analysis.optimum` transfer. Losses
    are compared as by `summarize`, with one run for all executions of a recipe; other objectives, and pareto, keep
    executions apart.
    """
    names = list(results.axes)
    document = summarize(results.axes, results.rows, results.executions) | {"unit": results.unit}
    everywhere, runs = [*names, *results.executions], one_per_training(results.rows)
    document["trials"] = [{name: value for name, value in row.items() if name != "rungs"} for row in results.rows]
    every = with_shared_losses(results.rows)
    # If only the execution varies, `executions` already compares the training speed.
    others = [name for name in results.objectives if name != LOSS and (names or name != TRAINING_SPEED)]
    kept = [row for row in candidates_of(document["settings"]) if row["member"] is None]
    noise, freedom = document["seed_noise"], document["noise_freedom"]
    costs = equal_flops(names, runs, lambda row: read_curve(results.folder / row["run"]))
    if costs is not None:
        document["warnings"].append(_unequal(costs, document["winner"]))
    document["warnings"] += record_troubles(results)
    return document | {
        "sentence": " ".join(
            [
                sentence(document, results.policy),
                *(said for name in others if (said := leader(everywhere, _one_speed_a_program(every), name))),
            ]
        ),
        "followers": results.followers,
        "objectives": list(results.objectives),
        "policy": results.policy,
        "sampler": results.sampler,
        "importance": importances(names, runs),
        "transfer": transfer(names, kept, noise, freedom),
        "equal_flops": costs,
        "pareto": pareto(everywhere, every, results.objectives),
        "halving": _halving(results),
        "cost": _cost(results),
    }


def _one_speed_a_program(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the rows with the mean training speed of their program: trials of one program share its speed."""
    speeds: dict[str, list[float]] = {}
    for row in rows:
        if row["state"] == "finished" and row[TRAINING_SPEED] is not None:
            speeds.setdefault(row["cohort"], []).append(row[TRAINING_SPEED])
    means = {cohort: statistics.fmean(found) for cohort, found in speeds.items()}
    return [row | {TRAINING_SPEED: means.get(row["cohort"])} for row in rows]


def _unequal(costs: dict[str, Any], winner: dict[str, Any] | None) -> str:
    said = f"settings cost up to {costs['ratio']:.2g} times the FLOPs of the cheapest"
    if "refused" in costs:
        return f"{said}, and cannot be compared at equal FLOPs: {costs['refused']}"
    best = costs["settings"][0]
    same = winner is not None and best["setting"] == winner["setting"]
    which = "the same setting leads" if same else f"{setting_text(best['setting'])} leads"
    return f"{said}; at equal FLOPs {which}"


def _halving(results: Results) -> dict[str, Any] | None:
    """Return rungs (`Rungs.table`), stopped trials and saved tokens; None without early stopping.

    share: tokens spent, relative to training every trial to its end; None for a population, where new members replace
    stopped ones.
    """
    pruned = sum(row["state"] == "pruned" for row in results.rows)
    if results.policy == "all" and not pruned:
        return None
    spent = sum(results.spent(row, "tokens") for row in results.rows)

    def own(row: dict[str, Any]) -> int:
        return row["planned_tokens"] * (row["planned_steps"] - row["parent_steps"]) // row["planned_steps"]

    full = sum(map(own, results.rows))
    return {
        "rungs": Rungs(list(results.axes), one_per_training(results.rows)).table(),
        "pruned": pruned,
        "tokens_spent": spent,
        "tokens_full": full,
        "share": spent / full if full and results.policy != "population" else None,
    }


def _cost(results: Results) -> dict[str, Any]:
    """Return totals over all trials; steps that a trial shares with its parent's run count once.

    run_seconds: summed over runs, so that K lanes of one program count its time K times.
    worker_seconds: time in which a worker had a claim, the last of each trial, overlaps counted once; None if unknown.
    """

    def total(name: str) -> float:
        return sum(results.fact(row, name) or 0 for row in results.rows)

    def spent(name: str) -> float:
        return sum(results.spent(row, name) for row in results.rows)

    spans: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        if row["worker"] is not None and row["claimed_at"] is not None and row["ended_at"] is not None:
            spans.setdefault(row["worker"], []).append((row["claimed_at"], row["ended_at"]))
    return {
        "tokens": spent("tokens"),
        "flops_6nd": spent("flops_6nd"),
        "flops_exact": spent("flops_exact"),
        "run_seconds": total("seconds"),
        "compile_seconds": total("compile_seconds"),
        "worker_seconds": sum(map(_covered, spans.values())) if spans else None,
        "workers": len(spans),
        "static_shapes": len({row["cohort"] for row in results.rows}),
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """Return the length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
