"""Select learning curves of a sweep's runs, and compare settings of different cost at equal FLOPs."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.runs.curves import LossCurve
from experiments.sweep.analysis.ranking import BY_LOSS, Ranking
from experiments.sweep.analysis.settings import by_setting, candidates_of, group

MOST = 60  # runs in one figure
UNEQUAL = 1.02  # ratio of FLOPs from which settings count as differing in cost
Read = Callable[[Mapping[str, Any]], LossCurve | None]


@dataclass(frozen=True)
class SettingAtCost:
    """The training loss of a setting where the cheapest one ended."""

    setting: dict[str, Any]
    flops_6nd: float
    """The FLOPs of a whole run of the setting."""
    loss: float
    seeds: int


@dataclass(frozen=True)
class EqualFlops:
    """Settings of unlike cost, compared at the cost of the cheapest."""

    ratio: float
    """The cost of the most expensive over that of the cheapest."""
    flops_6nd: float
    """The common cost."""
    settings: list[SettingAtCost]
    """Best first; empty if the comparison was refused."""
    refused: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON: of a refused comparison, its ratio and the reason."""
        if self.refused is not None:
            return {"ratio": self.ratio, "refused": self.refused}
        settings = [asdict(setting) for setting in self.settings]
        return {"flops_6nd": self.flops_6nd, "ratio": self.ratio, "settings": settings}


def chosen(rows: Sequence[dict[str, Any]], ranked: Ranking = BY_LOSS) -> list[dict[str, Any]]:
    """Return at most sixty runs to draw: evenly spaced from best to worst, those without a value last."""
    by = "last_loss" if ranked.by_loss else ranked.objective
    begun = [row for row in rows if row["state"] != "planned" or row["rungs"]]
    order = sorted(begun, key=lambda row: (row[by] is None, ranked.cost(row[by] or 0.0), row["number"]))
    if len(order) <= MOST:
        return order
    return [order[i] for i in np.unique(np.round(np.linspace(0, len(order) - 1, MOST)).astype(int))]


def equal_flops(names: Sequence[str], rows: Sequence[dict[str, Any]], read: Read) -> EqualFlops | None:
    """Compare settings of different cost by their training loss at the FLOPs at which the cheapest one ended.

    Only settings that were trained to the end are compared, in a population those whose values did not change. None if
    all have the same cost within 2 %. read: the learning curve of a row. The training loss is smoothed over a tenth of
    the steps, and interpolated in log FLOPs.
    """
    allowed = {setting.key for setting in candidates_of(group(names, rows))}
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
                SettingAtCost(dict(zip(names, key, strict=False)), cost[key], float(np.mean(losses)), len(losses))
            )
    if len(found) < len(members):
        reason = "not every run left a learning curve that reaches the cheapest one's cost"
        return EqualFlops(ratio, common, [], reason)
    return EqualFlops(ratio, common, sorted(found, key=lambda row: row.loss))


def _at(curve: LossCurve | None, flops: float) -> float | None:
    if curve is None or curve.flops[-1] < flops / UNEQUAL:
        return None
    return float(np.interp(np.log(flops), np.log(curve.flops), curve.loss))
