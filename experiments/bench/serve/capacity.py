"""Find the capacity of a server at a service level: the highest rate at which enough requests are good."""

import dataclasses
import itertools
import math
import statistics
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float
from scipy import stats

from experiments.evaluate.statistics.mean import wilson
from model.errors import InputError, check_number, check_whole

Measure = Callable[[float, int], Sequence[bool]]
"""Load the server at a rate in requests per second, with a seed: whether each request was good, by arrival."""

BATCHES = 8  # of a rate's requests, in the order of arrival: neighbours wait together, so they are good together
CONFIDENCE = 0.9
MOST_STEPS = 24  # rates until a bracket must be found
BISECTIONS = 2
REFINEMENTS = 8
_AROUND = (-0.2, 0.2, 0.0, -0.1, 0.1)  # of the logarithms of the rates that are measured about the estimate
_SPAN = 1.5  # rates within this factor of the crossing enter the fit: further off the curve is no logistic
_BEYOND = math.log(3)  # how far beyond the rates of the fit its capacity is searched for
_FEWEST = 6  # rates in the fit
METHOD = (
    "logistic regression of good requests on log rate, within a factor of 1.5 of the crossing; interval by the profile "
    "of its likelihood, over the dispersion between rates, or between batches of neighbours if that is larger"
)


@dataclasses.dataclass(frozen=True)
class RateShare:
    """The goodput at one rate. low, high: Wilson interval of the share, wider by the dispersion between batches."""

    rate: float
    requests: int
    good: int
    batches: tuple[tuple[int, int], ...]
    """(good, requests) of neighbouring requests."""
    low: float = 0.0
    high: float = 1.0

    @property
    def share(self) -> float:
        """The share of good requests."""
        return self.good / self.requests

    @classmethod
    def of(cls, rate: float, good: Sequence[bool]) -> "RateShare":
        """Count good requests, in the order of arrival."""
        edges = np.linspace(0, len(good), min(BATCHES, len(good)) + 1).astype(int).tolist()
        batches = tuple((sum(good[a:b]), b - a) for a, b in itertools.pairwise(edges))
        return cls(rate, len(good), sum(good), batches)


@dataclasses.dataclass(frozen=True)
class Capacity:
    """The capacity in requests per second, with its interval, and the rates that were measured."""

    rate: float
    low: float
    high: float
    share: float
    """The share of good requests at the capacity: the service level."""
    dispersion: float
    """The variance of the number of good requests over that of independent requests; at least 1."""
    rates: tuple[RateShare, ...]
    confidence: float = CONFIDENCE
    method: str = METHOD

    @property
    def standard_error(self) -> float:
        """Half the interval, in requests per second, over the normal quantile of its confidence."""
        return (self.high - self.low) / 2 / statistics.NormalDist().inv_cdf((1 + self.confidence) / 2)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        rates = [vars(row) | {"share": row.share, "batches": list(map(list, row.batches))} for row in self.rates]
        return {
            "capacity_requests_per_second": self.rate,
            "capacity_requests_per_second_low": self.low,
            "capacity_requests_per_second_high": self.high,
            "standard_error": self.standard_error,
            "confidence": self.confidence,
            "service_share": self.share,
            "dispersion": self.dispersion,
            "method": self.method,
            "rates": rates,
        }


def find_capacity(
    measure: Measure,
    start: float,
    *,
    share: float = 0.95,
    lowest: float | None = None,
    highest: float | None = None,
    refinements: int = REFINEMENTS,
    seed: int = 0,
) -> Capacity:
    """Return the highest rate at which at least `share` of the requests are good, with a 90 % interval.

    From `start` the rate is doubled until the share is below, or halved until it is not; the bracket is bisected twice
    on the logarithm of the rate; then rates up to a fifth about the present estimate are measured. Every rate has a
    seed of its own, so that the draws of arrivals are independent.
    lowest, highest: rates beyond which the search ends, by default 1/1000 and 1000 times `start`. Raises InputError
    with the reason where even the lowest rate fails, or the highest never does.
    """
    check_number("start", start, above=0)
    check_number("share", share, above=0, below=1)
    check_whole("refinements", refinements, 3)
    lowest, highest = lowest or start / 1000, highest or start * 1000
    measured: list[RateShare] = []

    def holds(rate: float) -> bool:
        measured.append(RateShare.of(rate, measure(rate, seed + len(measured))))
        return measured[-1].share >= share

    low, high = _bracket(holds, start, lowest, highest, measured)
    for _ in range(BISECTIONS):
        middle = math.sqrt(low * high)
        if holds(middle):
            low = middle
        else:
            high = middle
    for number in range(refinements):
        holds(estimate(measured, share).rate * math.exp(_AROUND[number % len(_AROUND)]))
    return estimate(measured, share)


def _bracket(
    holds: Callable[[float], bool], start: float, lowest: float, highest: float, measured: list[RateShare]
) -> tuple[float, float]:
    """Return (a rate that holds, a higher one that does not)."""
    rate = min(max(start, lowest), highest)
    factor = 2.0 if holds(rate) else 0.5
    for _ in range(MOST_STEPS):
        following = min(max(rate * factor, lowest), highest)
        if following == rate:
            break
        if holds(following) == (factor < 1):
            return min(rate, following), max(rate, following)
        rate = following
    last = measured[-1]
    words = f"{last.good} of {last.requests} requests are good"
    if factor < 1:
        raise InputError(
            f"even at {rate:.3g} requests per second {words}: the server never holds this service level; give wider "
            "limits or shorter requests"
        )
    raise InputError(
        f"still at {rate:.3g} requests per second {words}: no rate is too high for this service level; give tighter "
        "limits or more requests"
    )


def estimate(measured: Sequence[RateShare], share: float) -> Capacity:
    """Return the capacity from the shares at several rates, at least one of them on either side.

    P(good) = 1 / (1 + exp(slope · (log rate − log capacity) − logit(share))): the capacity is a parameter, and its
    interval the values whose best likelihood is near the largest one. Requests that wait together are good together, so
    that the likelihood is divided by a dispersion (McCullagh and Nelder 1989, section 4.5), Pearson's chi-squared over
    the degrees of freedom: of the rates, or of batches of neighbouring requests, whichever is larger.
    """
    rates = sorted(measured, key=lambda row: row.rate)
    near = _near(rates, share)
    x = np.log([row.rate for row in near])
    good = np.array([row.good for row in near], float)
    requests = np.array([row.requests for row in near], float)
    logit = math.log(share / (1 - share))
    candidates = np.linspace(x.min() - _BEYOND, x.max() + _BEYOND, 401)
    losses = _losses(x, good, requests, candidates, logit)
    least = np.unravel_index(losses.argmin(), losses.shape)
    at, slope = float(candidates[least[0]]), float(_SLOPES[least[1]])
    probability = 1 / (1 + np.exp(slope * (x - at) - logit))
    freedom = max(len(near) - 2, 1)
    dispersion = max(
        1.0,
        _dispersion([((row.good, row.requests),) for row in near], probability),
        _dispersion([row.batches for row in near], probability),
    )
    reach = dispersion * float(stats.f.ppf(CONFIDENCE, 1, freedom)) / 2
    inside = candidates[losses.min(axis=1) <= losses.min() + reach]
    rows = tuple(_with_interval(row, dispersion) for row in rates)
    return Capacity(math.exp(at), math.exp(inside[0]), math.exp(inside[-1]), share, dispersion, rows)


def _near(rates: Sequence[RateShare], share: float) -> list[RateShare]:
    """Return the rates near the crossing, at least a few."""
    holding = max((row.rate for row in rates if row.share >= share), default=rates[0].rate)
    failing = min((row.rate for row in rates if row.share < share), default=rates[-1].rate)
    middle = math.log(holding * failing) / 2
    ordered = sorted(rates, key=lambda row: abs(math.log(row.rate) - middle))
    near = [row for row in ordered if abs(math.log(row.rate) - middle) <= math.log(_SPAN)]
    return near if len(near) >= _FEWEST else ordered[:_FEWEST]


_SLOPES = np.geomspace(0.5, 200, 40)  # of the logit per unit of log rate


def _losses(
    x: Float[np.ndarray, " rates"],
    good: Float[np.ndarray, " rates"],
    requests: Float[np.ndarray, " rates"],
    candidates: Float[np.ndarray, " candidates"],
    logit: float,
) -> Float[np.ndarray, "candidates slopes"]:
    """Return the negative log-likelihood of every capacity (its logarithm) and slope."""
    score = _SLOPES[None, :, None] * (x[None, None, :] - candidates[:, None, None]) - logit
    return np.logaddexp(0, score) @ requests - score @ (requests - good)  # of bad ones: log(1 + e^-s)


def _dispersion(groups: Sequence[Sequence[tuple[int, int]]], probability: Float[np.ndarray, " rates"]) -> float:
    """Return Pearson's chi-squared of (good, requests) of each rate over the degrees of freedom."""
    squares, count = 0.0, 0
    for batches, chance in zip(groups, np.clip(probability, 0.01, 0.99).tolist(), strict=True):
        for good, requests in batches:
            squares += (good - requests * chance) ** 2 / (requests * chance * (1 - chance))
            count += 1
    return squares / max(count - 2, 1)


def _with_interval(row: RateShare, dispersion: float) -> RateShare:
    count = row.requests / dispersion
    low, high = wilson(row.share * count, count, statistics.NormalDist().inv_cdf((1 + CONFIDENCE) / 2))
    return dataclasses.replace(row, low=float(low), high=float(high))
