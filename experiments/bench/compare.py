"""Compare two benchmark documents: which cells became faster, which slower, and which differ by noise alone."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any, Literal

import numpy as np

from experiments.bench.machine import CeilingChange, compare_ceilings, has_changed, per_ceiling, times_of
from experiments.bench.render import COORDINATES, TRAINING_COORDINATES
from model.errors import InputError, UnknownNameError

METRICS = ("seconds_per_step", "time_to_first_token_seconds", "time_per_output_token_seconds", "step_seconds")
BOOTSTRAPS = 2000
LEVEL = 95


@dataclass(frozen=True)
class SampleRatio:
    """The medians of two samples of seconds, and how they differ."""

    before: float
    after: float
    ratio: float
    """After over before."""
    interval_95: list[float]
    """The interval of the ratio, bootstrapped from both samples."""
    spread: float
    """Half of the interquartile range over the median, for the noisier sample."""
    machine_times: list[float]
    """[least, most] by which the machine alone may have multiplied a time."""
    samples: list[int]
    """The number of samples before and after."""
    verdict: Literal["within noise", "faster", "slower", "machine changed"]


@dataclass(frozen=True)
class ComparedMetric:
    """One metric of a cell that both documents have."""

    coordinates: dict[str, Any]
    metric: str
    found: SampleRatio
    ratio_per_ceiling: float | None
    """The ratio with both over their own ceilings; None if that ceiling is not known."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        found = asdict(self.found) | {"ratio_per_ceiling": self.ratio_per_ceiling}
        return self.coordinates | {"metric": self.metric} | found


@dataclass(frozen=True)
class UnpairedCell:
    """A cell that only one document has, or that failed in one."""

    coordinates: dict[str, Any]
    before: str
    """"measured", "missing", or its error."""
    after: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return self.coordinates | {"before": self.before, "after": self.after}


@dataclass(frozen=True)
class Comparison:
    """The differences between two documents."""

    rows: list[ComparedMetric]
    alone: list[UnpairedCell]
    machine: list[CeilingChange]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {name: [row.to_dict() for row in rows] for name, rows in vars(self).items()}


def compare(
    before: dict[str, Any], after: dict[str, Any], *, across: Sequence[str] = (), anything: bool = False
) -> Comparison:
    """Join the cells of both documents by their coordinates, except the coordinates in `across`.

    For every metric with raw samples the ratio of medians, after over before. The verdict is "within noise" if the
    interval contains 1, or if the change is smaller than the spread or smaller than the variation of the machine's
    measured ceilings; otherwise "faster" or "slower". If the documents' ceilings differ by more than a tenth, a
    difference beyond noise is "machine changed" instead (unless `anything`), since the code may not be its cause.

    Raises InputError if models or devices differ, unless `anything`, if they have no cell in common, or if two cells of
    one document differ only in `across`.
    """
    if not anything:
        _check_alike(before, after)
    coordinates_of = TRAINING_COORDINATES if before.get("kind") == "train" else COORDINATES
    for name in across:
        if name not in coordinates_of:
            raise UnknownNameError("coordinate", name, coordinates_of)
    names = [name for name in coordinates_of if name not in across]
    machine = compare_ceilings(before, after)
    moved = has_changed(machine) and not anything
    cells = [{tuple(row.get(name) for name in names): row for row in doc["cells"]} for doc in (before, after)]
    if any(len(by_place) < len(doc["cells"]) for by_place, doc in zip(cells, (before, after), strict=True)):
        raise InputError(
            f"a document has several cells that differ in {', '.join(across)} alone; measure them separately"
        )
    rows, alone = [], []
    for place in list(dict.fromkeys([*cells[0], *cells[1]])):
        pair = [by_place.get(place) for by_place in cells]
        coordinates = dict(zip(names, place, strict=True))
        if any(row is None or "error" in row for row in pair):
            states = ["missing" if row is None else row.get("error", "measured") for row in pair]
            alone.append(UnpairedCell(coordinates, *states))
            continue
        for metric in METRICS:
            samples = [row["samples"][metric] for row in pair if row and metric in row.get("samples", {})]
            if len(samples) == 2:
                found = ratio(samples[0], samples[1], times=(1.0, 1.0) if has_changed(machine) else times_of(machine))
                if moved and found.verdict != "within noise":
                    found = replace(found, verdict="machine changed")
                own = per_ceiling(found.ratio, metric, (pair[0] or {}).get("bound"), machine)
                rows.append(ComparedMetric(coordinates, metric, found, own))
    if not rows:
        apart = [name for name in names if not _values(before, name) & _values(after, name)]
        message = "the two documents have no measured cell in common; run both with the same grid"
        if apart:
            message += f", or compare what differs: --across {' '.join(apart)}"
        raise InputError(message)
    return Comparison(rows, alone, machine)


def ratio(before: list[float], after: list[float], seed: int = 0, times: Sequence[float] = (1.0, 1.0)) -> SampleRatio:
    """Return medians of two samples of seconds, their ratio with its interval and spread, and the verdict.

    times: smallest and largest factor on a time that the machine alone explains.
    """
    random = np.random.default_rng(seed)
    draws = [np.median(random.choice(x, (BOOTSTRAPS, len(x))), axis=1) for x in (before, after)]
    tail = (100 - LEVEL) / 2
    low, high = (float(value) for value in np.percentile(draws[1] / draws[0], [tail, 100 - tail]))
    middle = [float(np.median(x)) for x in (before, after)]
    spread = max(float(np.subtract(*np.percentile(x, [75, 25]))) / 2 / m for x, m in zip((before, after), middle))  # noqa: B905
    change = middle[1] / middle[0]
    noise = low <= 1 <= high or abs(change - 1) < spread or (times[0] <= change <= times[1])
    return SampleRatio(
        before=middle[0],
        after=middle[1],
        ratio=change,
        interval_95=[low, high],
        spread=spread,
        machine_times=list(times),
        samples=[len(before), len(after)],
        verdict="within noise" if noise else "slower" if change > 1 else "faster",
    )


def regressions(rows: list[ComparedMetric], share: float) -> list[ComparedMetric]:
    """Return the cells that are slower, beyond noise, by more than this share."""
    return [row for row in rows if row.found.verdict == "slower" and row.found.ratio > 1 + share]


def _values(document: dict[str, Any], name: str) -> set[Any]:
    return {row.get(name) for row in document["cells"]}


def _check_alike(before: dict[str, Any], after: dict[str, Any]) -> None:
    def kind(document: dict[str, Any]) -> dict[str, Any]:
        return {name: document["device"].get(name) for name in ("platform", "kind", "count", "host", "cores")}

    for name, values in (
        ("models (config_hash)", [document["config_hash"] for document in (before, after)]),
        ("devices", [kind(document) for document in (before, after)]),
    ):
        if values[0] != values[1]:
            raise InputError(
                f"the documents are of different {name}: {values[0]} and {values[1]}; --any compares anyway"
            )
