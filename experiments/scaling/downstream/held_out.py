"""Predict the larger sizes of a table from its smaller ones: weights of the forms, and how far intervals must reach."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool, Float

from experiments.scaling.downstream.ensemble import FORMS, LEVEL, Ensemble, Spread, TaskRuns, Weights, fit_ensemble
from experiments.scaling.downstream.link import LINKS
from experiments.scaling.law.intervals import MINIMUM_DISTINCT
from model.errors import InputError

SAME_SIZE = 1.1  # ratio of N below which runs count as one size
MOST_SPLITS = 4  # the last ones: the smallest sizes say least about the largest
ENOUGH_SIZES = MINIMUM_DISTINCT
LAW_FLOOR = 0.01  # natural logarithm of bits per byte: an error below does not distinguish forms of law
LINK_FLOOR = 0.01  # accuracy: an error below does not distinguish links


@dataclass(frozen=True)
class Split:
    """The runs up to one size, fitted, and the errors of that fit on all larger ones."""

    trained: Bool[np.ndarray, " runs"]
    sizes: int
    """Number of sizes that it was fitted to."""
    ensemble: Ensemble
    law_errors: dict[str, Float[np.ndarray, " tested"]]
    """Natural logarithm of predicted over measured bits per byte, by form of law."""
    link_errors: Float[np.ndarray, "links tested"]
    """Accuracy at the measured bits per byte minus the measured accuracy."""


@dataclass(frozen=True)
class HeldOutRuns:
    """The runs that were predicted from smaller ones, by all splits, with the predictions made before calibration."""

    params: Float[np.ndarray, " tested"]
    tokens: Float[np.ndarray, " tested"]
    distance: Float[np.ndarray, " tested"]
    """The natural logarithm of a run's compute over the largest that its prediction had seen."""
    measured_bits: Float[np.ndarray, " tested"]
    measured: Float[np.ndarray, " tested"]
    bits_per_byte: Spread
    accuracy: Spread


def sizes_of(params: Float[np.ndarray, " runs"]) -> Float[np.ndarray, " sizes"]:
    """Return the largest N of each group of runs of about the same N, in increasing order."""
    ordered = np.unique(params)
    ends = np.append(ordered[1:] > SAME_SIZE * ordered[:-1], True)
    return ordered[ends]


def by_size(runs: TaskRuns) -> list[TaskRuns]:
    """Return the runs of each size, in increasing order."""
    ends = sizes_of(runs.params)
    starts = np.concatenate([[0.0], ends[:-1]])
    return [runs.where((runs.params > start) & (runs.params <= end)) for start, end in zip(starts, ends, strict=True)]


def split_by_size(runs: TaskRuns, *, chance: float, ceiling: float, bootstraps: int, seed: int) -> list[Split]:
    """Return a split after every size from the second to the last but one, at most the last `MOST_SPLITS`.

    Sizes whose runs determine no form of law give no split.
    """
    splits = []
    sizes = sizes_of(runs.params)
    for count in range(2, len(sizes))[-MOST_SPLITS:]:
        largest = sizes[count - 1]
        trained = runs.params <= largest
        test = runs.where(~trained)
        try:
            fit = fit_ensemble(runs.where(trained), chance=chance, ceiling=ceiling, bootstraps=bootstraps, seed=seed)
        except InputError:
            continue
        logs = fit.log_bits_per_byte(test.params, test.tokens)
        law_errors = {name: log[0] - np.log(test.bits_per_byte) for name, log in logs.items()}
        splits.append(Split(trained, count, fit, law_errors, fit.accuracy(test.bits_per_byte) - test.accuracy))
    return splits


def weights_by_error(splits: Sequence[Split], known: Bool[np.ndarray, " runs"]) -> Weights:
    """Return weights inverse to the mean square error of the splits on the known runs.

    Splits of fewer than ENOUGH_SIZES trained sizes count only where there is no other: a floor fitted to two sizes says
    nothing about a floor fitted to five. A form that no split could fit gets the mean weight of the others; without any
    errors all weigh the same.
    """
    splits = [split for split in splits if known[~split.trained].any()]
    splits = [split for split in splits if split.sizes >= ENOUGH_SIZES] or splits
    by_law: dict[str, list[np.ndarray]] = {name: [] for name in FORMS}
    by_link: list[np.ndarray] = []
    for split in splits:
        tested = known[~split.trained]
        for name, errors in split.law_errors.items():
            by_law[name].append(errors[tested])
        by_link.append(split.link_errors[:, tested])
    squares = {name: np.concatenate(errors) ** 2 for name, errors in by_law.items() if errors}
    laws = {name: 1 / (square.mean() + LAW_FLOOR**2) for name, square in squares.items() if len(square)}
    usual = float(np.mean(list(laws.values()))) if laws else 1.0
    laws = {name: laws.get(name, usual) for name in FORMS}
    links = np.ones(len(LINKS))
    errors = np.concatenate(by_link, axis=1) if by_link else np.zeros((len(LINKS), 0))
    if errors.shape[1]:
        links = 1 / ((errors**2).mean(1) + LINK_FLOOR**2)
    return Weights({name: weight / sum(laws.values()) for name, weight in laws.items()}, links / links.sum())


def predict_held_out(runs: TaskRuns, splits: Sequence[Split]) -> HeldOutRuns:
    """Predict every split's larger runs, weighted by what was known then: errors on runs that it was trained on."""
    parts = []
    for i, split in enumerate(splits):
        test = runs.where(~split.trained)
        weights = weights_by_error(splits[:i], split.trained)
        bits, accuracy = split.ensemble.predict(test.params, test.tokens, weights)
        distance = np.log(test.flops / runs.flops[split.trained].max())
        parts.append(HeldOutRuns(test.params, test.tokens, distance, test.bits_per_byte, test.accuracy, bits, accuracy))
    return _joined(parts)


def _joined(parts: Sequence[HeldOutRuns]) -> HeldOutRuns:
    def spreads(name: str) -> Spread:
        each = [getattr(part, name) for part in parts]
        return Spread(*(np.concatenate([getattr(s, end) for s in each]) for end in ("value", "low", "high")))

    names = ("params", "tokens", "distance", "measured_bits", "measured")
    columns = {name: np.concatenate([getattr(part, name) for part in parts]) for name in names}
    return HeldOutRuns(**columns, bits_per_byte=spreads("bits_per_byte"), accuracy=spreads("accuracy"))


def stretch(scores: Float[np.ndarray, " tested"]) -> float:
    """Return the factor by which intervals are stretched so that LEVEL per cent of held-out runs are inside.

    It is the conformal quantile of their scores (Vovk et al. 2005), the largest score if there are too few; an interval
    is never made shorter.
    """
    if not len(scores):
        return 1.0
    rank = int(np.ceil((len(scores) + 1) * LEVEL / 100))
    return max(1.0, float(np.sort(scores)[min(rank, len(scores)) - 1]))
