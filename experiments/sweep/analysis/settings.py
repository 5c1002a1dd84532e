"""Group the trials of a sweep into settings, which differ in more than the seed, with means over seeds."""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, TypeVar

import numpy as np

from experiments.sweep.objectives import LOSS

NEAR = 0.5  # nats above the best: further up the noise differs, and the loss is no longer a parabola in log rate

Verdict = Literal["worse", "equal", "better", "higher", "lower", "not compared"]
"""A stopped setting against the winner after equal tokens. worse, equal, better: against the seed noise there.

higher, lower: its loss, if the noise is not known because no setting has two seeds there. not compared: the winner has
no loss after so many tokens.
"""
Row = TypeVar("Row", bound=Mapping[str, Any])


@dataclass(frozen=True)
class MeasuredSetting:
    """The mean loss of a setting over its seeds, at one moment, or the mean of another objective that ranks."""

    values: dict[str, Any]
    """The values of the axes, by name."""
    member: str | None
    """The id of the trial, for a member of a population that left another's run; otherwise None."""
    mean: float | None
    """None if no seed has a value."""
    std: float | None
    """The standard deviation over the seeds; None for fewer than two."""
    seeds: int

    @property
    def key(self) -> tuple[Any, ...]:
        """The key of its trials in `by_setting`."""
        return (*self.values.values(), self.member)

    @property
    def known_mean(self) -> float:
        """The mean of a setting that has one."""
        assert self.mean is not None, "no seed has a value"
        return self.mean

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, those of the axes among them."""
        about = {name: value for name, value in vars(self).items() if name != "values"}
        return self.values | about


@dataclass(frozen=True)
class Stopped:
    """A setting that was stopped early, compared with the winner at the rung where it was stopped."""

    steps: int
    tokens: int
    mean: float
    seeds: int
    winner_mean: float | None
    """After equal tokens; None if the winner has no loss there."""
    verdict: Verdict


@dataclass(frozen=True)
class Setting(MeasuredSetting):
    """The trials that differ in the seed alone: the mean of those that finished, and the others by their state."""

    lost: int
    """The number of seeds that diverged."""
    pruned: int
    failed: int
    pending: int
    stopped: Stopped | None = None
    """None if it was not stopped early, or nothing of it was measured."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, those of the axes among them."""
        return super().to_dict() | {"stopped": None if self.stopped is None else asdict(self.stopped)}


def by_setting(names: Sequence[str], rows: Iterable[Row]) -> dict[tuple[Any, ...], list[Row]]:
    """Group rows by their values in the order of `names` and, last, their member; settings in order of appearance.

    A member of a population that branched off another run is a separate setting: it had its values for a part of the
    run only, and the shared part is not a second seed.
    """
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault((*(row[name] for name in names), row.get("member")), []).append(row)
    return groups


def group(names: Sequence[str], trials: Iterable[Mapping[str, Any]], objective: str = LOSS) -> list[Setting]:
    """Return the settings of trials, with the means of an objective."""
    settings = []
    for key, members in by_setting(names, trials).items():
        states = [trial["state"] for trial in members]
        ended = [trial[objective] for trial, state in zip(members, states, strict=True) if state == "finished"]
        found = [value for value in ended if value is not None]
        settings.append(
            Setting(
                values=dict(zip(names, key[:-1], strict=True)),
                member=key[-1],
                mean=float(np.mean(found)) if found else None,
                std=float(np.std(found, ddof=1)) if len(found) > 1 else None,
                seeds=len(found),
                lost=states.count("diverged"),
                pruned=states.count("pruned"),
                failed=states.count("failed"),
                pending=states.count("planned") + states.count("running"),
            )
        )
    return settings


def candidates_of(settings: Iterable[Setting]) -> list[Setting]:
    """Return the settings that may win: with a mean, and without a diverged or single pruned seed."""
    return [row for row in settings if row.seeds and not row.lost and not row.pruned]


def pooled_noise(settings: Iterable[MeasuredSetting], best: float | None = None) -> tuple[float | None, int]:
    """Return (standard deviation over seeds, degrees of freedom), pooled over replicated settings.

    best: the lowest mean loss, near which they must be; None: all are pooled.
    """
    replicated = [(row, row.std) for row in settings if row.std is not None]
    near = [(row, std) for row, std in replicated if best is None or row.known_mean < best + NEAR] or replicated
    freedom = sum(row.seeds - 1 for row, _ in near)
    if freedom == 0:
        return None, 0
    return math.sqrt(sum((row.seeds - 1) * std**2 for row, std in near) / freedom), freedom
