"""All that a sweep's results say, as one document: what the report shows and `--json` writes."""

from typing import Any

from experiments.sweep.reading.curves import equal_flops
from experiments.sweep.reading.importance import importances
from experiments.sweep.reading.optimum import transfer
from experiments.sweep.reading.pareto import pareto
from experiments.sweep.reading.results import Results, record_troubles
from experiments.sweep.reading.scales import setting_text
from experiments.sweep.reading.summary import candidates_of, summarize


def analyse(results: Results) -> dict[str, Any]:
    """`summarize` of the results, and: sentence (the answer), importance, transfer, equal_flops, pareto, halving, cost.

    A part that does not apply is None; one that cannot be had holds `refused`, with the reason. Of importances, see
    `experiments.sweep.reading.importance`; of transfer, `experiments.sweep.reading.optimum`.
    """
    from experiments.report.figures import read_curve  # here, as it draws with matplotlib

    names = list(results.axes)
    rows = [{name: value for name, value in row.items() if name != "rungs"} for row in results.rows]
    document = summarize(results.axes, rows)
    noise, freedom = document["seed_noise"], document["noise_freedom"]
    costs = equal_flops(names, results.rows, lambda row: read_curve(results.folder / row["run"]))
    if costs is not None:
        document["warnings"].append(_unequal(costs, document["winner"]))
    document["warnings"] += record_troubles(results)
    return document | {
        "sentence": _sentence(document),
        "followers": results.followers,
        "objectives": list(results.objectives),
        "policy": results.policy,
        "sampler": results.sampler,
        "importance": importances(names, rows),
        "transfer": transfer(names, candidates_of(document["settings"]), noise, freedom),
        "equal_flops": costs,
        "pareto": pareto(names, rows, results.objectives),
        "halving": _halving(results),
        "cost": _cost(results),
    }


def _sentence(document: dict[str, Any]) -> str:
    """The answer in a sentence: the winner, how sure it is, and what cannot be told apart from it."""
    winner = document["winner"]
    if winner is None:
        return "There is no winner: " + document["warnings"][0].split(":")[0] + "."
    said = f"{setting_text(winner['setting']) or 'The only setting'} reaches {winner['mean']:.4f} nats per token"
    if winner["interval_95"] is None:
        return f"{said}, the lowest of {winner['candidates']}; with one seed each nobody can say how sure that is."
    low, high = winner["interval_95"]
    said += f" (95 % interval {low:.4f} … {high:.4f}), the lowest of {winner['candidates']}; "
    equal = len(winner["indistinguishable"])
    if not equal:
        return said + "every other setting is worse by more than the seed noise."
    return said + (
        "1 other setting cannot be told apart from it."
        if equal == 1
        else f"{equal} other settings cannot be told apart from it."
    )


def _unequal(costs: dict[str, Any], winner: dict[str, Any] | None) -> str:
    said = f"settings cost up to {costs['ratio']:.2g} times the FLOPs of the cheapest"
    if "refused" in costs:
        return f"{said}, and cannot be compared at equal FLOPs: {costs['refused']}"
    best = costs["settings"][0]
    same = winner is not None and best["setting"] == winner["setting"]
    which = "the same setting leads" if same else f"{setting_text(best['setting'])} leads"
    return f"{said}; at equal FLOPs {which}"


def _halving(results: Results) -> dict[str, Any] | None:
    """How many trials came to each rung, and what stopping the others saved; None where nothing could be stopped."""
    pruned = sum(row["state"] == "pruned" for row in results.rows)
    if results.policy == "all" and not pruned:
        return None
    steps = sorted({step for row in results.rows for step in row["rungs"]})
    rungs = []
    for step in steps:
        here = [row for row in results.rows if step in row["rungs"]]
        stopped = [row for row in here if row["state"] == "pruned" and max(row["rungs"]) == step]
        rungs.append(
            {
                "steps": step,
                "trials": len(here),
                "pruned": len(stopped),
                "best": min(row["rungs"][step] for row in here),
            }
        )
    spent = sum(results.fact(row, "tokens") or 0 for row in results.rows)
    full = sum(row["planned_tokens"] for row in results.rows)
    return {
        "rungs": rungs,
        "pruned": pruned,
        "tokens_spent": spent,
        "tokens_full": full,
        "share": spent / full if full else None,
    }


def _cost(results: Results) -> dict[str, Any]:
    """Totals over all trials. run_seconds: each run's own clock, so that lanes of one program count its time K times.

    worker_seconds: time in which a worker had a claim, the last of each trial, overlaps counted once; None if unknown.
    """
    total = lambda name: sum(results.fact(row, name) or 0 for row in results.rows)
    spans: dict[str, list[tuple[float, float]]] = {}
    for row in results.rows:
        if row["worker"] is not None and row["claimed_at"] is not None and row["ended_at"] is not None:
            spans.setdefault(row["worker"], []).append((row["claimed_at"], row["ended_at"]))
    return {
        "tokens": total("tokens"),
        "flops_6nd": total("flops_6nd"),
        "flops_exact": total("flops_exact"),
        "run_seconds": total("seconds"),
        "compile_seconds": total("compile_seconds"),
        "worker_seconds": sum(map(_covered, spans.values())) if spans else None,
        "workers": len(spans),
        "static_shapes": len({row["cohort"] for row in results.rows}),
    }


def _covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals."""
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, reached))
        reached = max(reached, end)
    return total
