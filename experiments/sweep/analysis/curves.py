"""Select learning curves of a sweep's runs, and compare settings of different cost at equal FLOPs."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from experiments.runs.curves import LossCurve
from experiments.sweep.analysis.settings import by_setting, candidates_of, group

MOST = 60  # runs in one figure
UNEQUAL = 1.02  # ratio of FLOPs from which settings count as differing in cost
Read = Callable[[Mapping[str, Any]], LossCurve | None]


def chosen(rows: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return at most sixty runs to draw: evenly spaced from best to worst, those without a loss last."""
    begun = [row for row in rows if row["state"] != "planned" or row["rungs"]]
    order = sorted(begun, key=lambda row: (row["last_loss"] is None, row["last_loss"] or 0.0, row["number"]))
    if len(order) <= MOST:
        return order
    return [order[i] for i in np.unique(np.round(np.linspace(0, len(order) - 1, MOST)).astype(int))]


def equal_flops(names: Sequence[str], rows: Sequence[dict[str, Any]], read: Read) -> dict[str, Any] | None:
    """Compare settings of different cost by their training loss at the FLOPs at which the cheapest one ended.

    Only settings that were trained to the end are compared, in a population those whose values did not change. None if
    all have the same cost within 2 %. Otherwise {flops_6nd (the common cost), ratio (most expensive to cheapest),
    settings: [{setting, flops_6nd, loss, seeds}] best first}, or {ratio, refused: why}. read: the learning curve of a
    row. The training loss is smoothed over a tenth of the steps, and interpolated in log FLOPs.
    """
    allowed = by_setting(names, candidates_of(group(names, rows)))
    ended = [row for row in rows if row["state"] == "finished" and row["flops_6nd"]]
    members = {key: runs for key, runs in by_setting(names, ended).items() if key in allowed and key[-1] is None}
    cost = {key: float(np.mean([row["flops_6nd"] for row in runs])) for key, runs in members.items()}
    if len(cost) < 2 or max(cost.values()) <= UNEQUAL * min(cost.values()):
        return None
    common, ratio = min(cost.values()), max(cost.values()) / min(cost.values())
    found = []
    for key, runs in members.items():
        losses = [loss for row in runs if (loss := _at(read(row), common)) is not None]
        if losses:
            found.append(
                {
                    "setting": dict(zip(names, key, strict=False)),
                    "flops_6nd": cost[key],
                    "loss": float(np.mean(losses)),
                    "seeds": len(losses),
                }
            )
    if len(found) < len(members):
        return {"ratio": ratio, "refused": "not every run left a learning curve that reaches the cheapest one's cost"}
    return {"flops_6nd": common, "ratio": ratio, "settings": sorted(found, key=lambda row: row["loss"])}


def _at(curve: LossCurve | None, flops: float) -> float | None:
    if curve is None or curve.flops[-1] < flops / UNEQUAL:
        return None
    return float(np.interp(np.log(flops), np.log(curve.flops), curve.loss))
