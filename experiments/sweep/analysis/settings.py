"""Group the trials of a sweep into settings, which differ in more than the seed, with means over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

import numpy as np

NEAR = 0.5  # nats above the best: further up the noise differs, and the loss is no longer a parabola in log rate

Setting = dict[str, Any]
Row = TypeVar("Row", bound=Mapping[str, Any])


def by_setting(names: Sequence[str], rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by their values in the order of `names` and, last, their member; settings in order of appearance.

    A member of a population that branched off another run is a separate setting: it had its values for a part of the
    run only, and the shared part is not a second seed.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row[name] for name in names), row.get("member")), []).append(row)
    return groups


def group(names: Sequence[str], trials: Iterable[Mapping[str, Any]]) -> list[Setting]:
    """Return one row per setting: the mean of its finished seeds, and the number of seeds in every other state."""
    settings = []
    for key, members in by_setting(names, trials).items():
        states = [trial["state"] for trial in members]
        losses = [trial["loss"] for trial, state in zip(members, states, strict=True) if state == "finished"]
        settings.append(
            dict(zip((*names, "member"), key, strict=True))
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


def candidates_of(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings that may win: with a mean, and without a diverged or single pruned seed."""
    return [row for row in settings if row["seeds"] and not row["lost"] and not row["pruned"]]


def pooled_noise(settings: Iterable[Setting], best: float) -> tuple[float | None, int]:
    """Return (standard deviation over seeds, degrees of freedom), pooled over replicated settings near the best."""
    replicated = [row for row in settings if row["std"] is not None]
    near = [row for row in replicated if row["mean"] < best + NEAR] or replicated
    freedom = sum(row["seeds"] - 1 for row in near)
    if freedom == 0:
        return None, 0
    return math.sqrt(sum((row["seeds"] - 1) * row["std"] ** 2 for row in near) / freedom), freedom
