"""Fit every form of law with every link to the runs of one task, and to resamples of those runs.

Runs are resampled, not checkpoints, as the checkpoints of one run are not independent. A resample is fitted by both
steps, so that the errors of the steps stay paired.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Bool, Float

from experiments.scaling.downstream.link import LINKS, LinkFit, fit_link
from experiments.scaling.forms.fit import FormProblem
from experiments.scaling.forms.registry import get
from experiments.scaling.forms.rows import reason_against
from experiments.scaling.law.huber import best_of
from experiments.scaling.law.intervals import draw_counts
from model.errors import InputError

FORMS = ("chinchilla", "shared-exponent", "no-floor", "compute", "compute-no-floor")
"""Forms of the law of bits per byte, in (N, D) and in C = 6·N·D, with a floor and without."""
DELTA = 0.01  # natural logarithm of bits per byte from where Huber's loss is linear, about the noise of one run
LEVEL = 95
_ITERATIONS = 40  # later ones move a vanishing term, not the predictions
_LARGEST = 50.0  # of a logarithm: a resample may send a law anywhere


@dataclass(frozen=True)
class TaskRuns:
    """The runs of one task, one row each: the mean of a run's last checkpoints."""

    params: Float[np.ndarray, " runs"]
    tokens: Float[np.ndarray, " runs"]
    bits_per_byte: Float[np.ndarray, " runs"]
    accuracy: Float[np.ndarray, " runs"]

    def __len__(self) -> int:
        return len(self.params)

    @property
    def flops(self) -> Float[np.ndarray, " runs"]:
        """Training compute C = 6·N·D."""
        return 6.0 * self.params * self.tokens

    @property
    def columns(self) -> dict[str, np.ndarray]:
        """The columns by the names that forms of law need."""
        return {"params": self.params, "tokens": self.tokens, "flops": self.flops, "loss": self.bits_per_byte}

    def where(self, kept: Bool[np.ndarray, " runs"]) -> "TaskRuns":
        """Return some of the runs."""
        return TaskRuns(self.params[kept], self.tokens[kept], self.bits_per_byte[kept], self.accuracy[kept])


@dataclass(frozen=True)
class Spread:
    """A centre at each of several points, and the 95 % interval of the draws, which contains the centre."""

    value: Float[np.ndarray, " points"]
    low: Float[np.ndarray, " points"]
    high: Float[np.ndarray, " points"]

    def score(self, measured: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
        """Return the distance of measured values from the centre, 1 being at an end of the interval."""
        above = (measured - self.value) / np.maximum(self.high - self.value, 1e-12)
        below = (self.value - measured) / np.maximum(self.value - self.low, 1e-12)
        return np.maximum(above, below)

    def stretched(self, factor: float, least: float, most: float) -> "Spread":
        """Return the interval stretched about its centre by a factor, within [least, most]."""
        low = np.clip(self.value - factor * (self.value - self.low), least, most)
        high = np.clip(self.value + factor * (self.high - self.value), least, most)
        return Spread(np.clip(self.value, least, most), low, high)


@dataclass(frozen=True)
class Weights:
    """The weight of every form of law by name, and of every link in the order of `LINKS`; each adds up to 1."""

    laws: Mapping[str, float]
    links: Float[np.ndarray, " links"]

    def among(self, names: Iterable[str]) -> Float[np.ndarray, " laws"]:
        """Return the weights of some forms of law, which add up to 1: a small table supports some of them only."""
        weights = np.array([self.laws[name] for name in names])
        return weights / weights.sum()


@dataclass(frozen=True)
class Ensemble:
    """Every supported form of law and every link. The first problem of each is the fit to the runs themselves."""

    laws: Mapping[str, tuple[FormProblem, np.ndarray]] = field(repr=False)
    links: tuple[LinkFit, ...] = field(repr=False)
    law_noise: float
    """Standard deviation of the runs about the closest law, in natural-log bits per byte."""
    link_noise: Float[np.ndarray, " links"]
    """Standard deviation of the runs about each link, in accuracy."""
    seed: int

    @property
    def in_both(self) -> bool:
        """Return whether some form of law is one in N and D, not in compute alone."""
        return any("params" in problem.form.needs for problem, _ in self.laws.values())

    def log_bits_per_byte(
        self, params: Float[np.ndarray, " points"], tokens: Float[np.ndarray, " points"]
    ) -> dict[str, Float[np.ndarray, "problems points"]]:
        """Return the natural logarithm of bits per byte by form of law."""
        columns = {"params": params, "tokens": tokens, "flops": 6.0 * params * tokens}
        found = {name: problem.log_prediction(theta, columns) for name, (problem, theta) in self.laws.items()}
        return {name: np.clip(log, -_LARGEST, _LARGEST) for name, log in found.items()}

    def accuracy(self, bits_per_byte: Float[np.ndarray, " points"]) -> Float[np.ndarray, "links points"]:
        """Return the accuracy at given bits per byte by every link, fitted to the runs themselves."""
        return np.stack([fit.first.predict(bits_per_byte[None])[0] for fit in self.links])

    def predict(
        self, params: Float[np.ndarray, " points"], tokens: Float[np.ndarray, " points"], weights: Weights
    ) -> tuple[Spread, Spread]:
        """Return (bits per byte, accuracy) of runs that were not trained, with the noise of one run.

        The centre is the weighted mean over the fits to the runs themselves; the interval is that of all combinations
        and all resamples.
        """
        logs = self.log_bits_per_byte(params, tokens)
        by_law = weights.among(logs)
        rng = np.random.default_rng([self.seed, 1])
        draws = len(self.links[0].theta)
        noise = self.law_noise * rng.standard_normal((draws, 1))
        noise[0] = 0.0
        accuracies, points, shares = [], [], []
        for fit, deviation, by_link in zip(self.links, self.link_noise, weights.links, strict=True):
            added = deviation * rng.standard_normal((draws, 1))
            for log, share in zip(logs.values(), by_law, strict=True):
                found = fit.predict(np.exp(log + noise))
                points.append(found[0])
                accuracies.append((found + added)[1:])
                shares.append(by_link * share)
        bits = [np.exp(log + noise)[1:] for log in logs.values()]
        centre = np.exp(by_law @ np.stack([log[0] for log in logs.values()]))
        return _spread(centre, bits, by_law), _spread(np.array(shares) @ np.stack(points), accuracies, shares)


def fit_ensemble(runs: TaskRuns, *, chance: float, ceiling: float, bootstraps: int, seed: int) -> Ensemble:
    """Fit all combinations to the runs and to `bootstraps` resamples. Raises InputError if no form is supported."""
    columns = runs.columns
    reasons = {name: reason_against(get(name), columns) for name in FORMS}
    forms = [name for name, reason in reasons.items() if reason is None]
    if not forms:
        raise InputError(next(reason for reason in reasons.values() if reason is not None))
    in_both = any("params" in get(name).needs for name in forms)
    varied = (runs.params, runs.tokens) if in_both else (runs.flops,)
    least = max(len(get(name).unknowns) for name in forms)
    weights = draw_counts(varied, least, np.random.default_rng(seed), bootstraps)
    laws, noise = {}, []
    for name in forms:
        problem = FormProblem.of(get(name), columns, DELTA)
        end = problem.minimise(problem.grid, max_iterations=_ITERATIONS)
        best = end.theta[best_of(end.objective, end.gradient, len(runs), DELTA)[0]]
        laws[name] = problem, np.concatenate([best[None], problem.refit(best, weights, max_iterations=_ITERATIONS)])
        residuals = problem.log_prediction(best[None], columns)[0] - problem.log_loss
        noise.append(_deviation(residuals, len(problem.form.unknowns)))
    every = np.concatenate([np.ones((1, len(runs))), weights])
    links = tuple(
        fit_link(link, runs.bits_per_byte, runs.accuracy, every, chance=chance, ceiling=ceiling) for link in LINKS
    )
    unfinished = Ensemble(laws, links, min(noise), np.zeros(len(links)), seed)
    residuals = unfinished.accuracy(runs.bits_per_byte) - runs.accuracy
    link_noise = np.array([_deviation(row, link.unknowns) for row, link in zip(residuals, LINKS, strict=True)])
    return Ensemble(laws, links, min(noise), link_noise, seed)


def _deviation(residuals: np.ndarray, unknowns: int) -> float:
    return float(np.sqrt((residuals**2).sum() / max(len(residuals) - unknowns, 1)))


def _spread(value: np.ndarray, draws: Sequence[np.ndarray], weights: Sequence[float] | np.ndarray) -> Spread:
    """Return the interval of several groups of draws [draws, points], a group counting by its weight."""
    pooled = np.concatenate(draws)
    weight = np.repeat(np.asarray(weights), [len(group) for group in draws])
    order = np.argsort(pooled, axis=0)
    ranked = np.take_along_axis(pooled, order, axis=0)
    share = np.cumsum(weight[order], axis=0)
    share /= share[-1]
    tail = (100 - LEVEL) / 200
    low, high = (
        np.take_along_axis(ranked, np.argmax(share >= level, axis=0)[None], axis=0)[0] for level in (tail, 1 - tail)
    )
    return Spread(value, np.minimum(low, value), np.maximum(high, value))
