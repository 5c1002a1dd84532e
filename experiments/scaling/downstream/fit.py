"""Fit downstream laws, (N, D) → bits per byte of the gold answer → accuracy, with intervals and refusals.

What was chosen, and why. Choices were made on rolling hold-outs within the ladder of Bhagia et al. 2024 (arXiv
2412.04403), 20 tasks: train on the sizes up to 760M, and up to 1B, and predict all larger ones up to 3B. Errors below
are geometric means over tasks of the root mean square error of accuracy in points, for the two splits.

- No single form is trusted. Five forms of law (in N and D, and in compute; with a floor and without) are combined with
  six links (logistic in bits per byte or in their logarithm; the floor at chance or a little off it; the ceiling at the
  task's or free). Together they have an error of 1.55 and 1.71; the law of Hoffmann et al. alone has 2.13 and 1.62, the
  laws with a floor 1.82 and 1.57, those without a shared exponent 1.57 and 1.75.
- The centre weighs forms and links by the inverse of their own mean square error on the task's hold-outs. Equal weights
  have an error of 1.72 and 1.77, squared ones 1.57 and 1.79. Splits trained on two sizes do not weigh forms: on
  simulated ladders they favour laws without a floor, and 81 % instead of all of the far targets were inside.
- The interval is that of all combinations and all resamples of runs, with the noise of single runs about law and link.
  The disagreement of the forms grows with the extrapolation about as fast as their error does: errors of held-out
  runs, in units of the interval, do not grow with the distance in compute.
- The interval is then stretched by the factor that puts 95 % of all held-out runs of the table inside. It is never made
  shorter: runs of one size share their error, so that there are fewer independent hold-outs than runs. Beyond the
  largest distance in compute that was tested on hold-outs it grows in proportion to the distance.
- Links are fitted to the last checkpoints of runs only: earlier ones have a higher learning rate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.scaling.downstream.ensemble import Ensemble, Weights, fit_ensemble
from experiments.scaling.downstream.held_out import (
    HeldOutRuns,
    predict_held_out,
    sizes_of,
    split_by_size,
    stretch,
    weights_by_error,
)
from experiments.scaling.downstream.table import DownstreamTable, TargetRun, Task, TaskKey
from experiments.words import counted
from model.errors import InputError, UnknownNameError, check_at_least_one, check_number

WIDEST = 0.20  # accuracy: a wider interval is refused
MINIMUM_SIZES = 3
MINIMUM_RUNS = 6
SIGNAL = 2.0  # times the noise that the accuracy of the largest runs is above chance
FARTHEST_RATIO = 3.0  # times the tokens per parameter of the runs up to which a law of compute alone is trusted
RISING = 1.645  # standard errors of a rank correlation, 5 % one-sided


@dataclass(frozen=True)
class DownstreamPrediction:
    """The accuracy of one run on one task. Without an answer the numbers are None."""

    task: str
    recipe: str | None
    params: float
    tokens: float
    value: float | None = None
    low: float | None = None
    high: float | None = None
    bits_per_byte: float | None = None
    bits_per_byte_low: float | None = None
    bits_per_byte_high: float | None = None
    refused: str | None = None
    """Why the accuracy should not be used; of a task that was fitted the numbers are still given."""
    target: TargetRun | None = None
    """The measured run, where the table has it as held out."""

    @property
    def name(self) -> str:
        """The task, with its recipe where there is one."""
        return str(TaskKey(self.task, self.recipe))

    @property
    def width(self) -> float | None:
        """The width of the interval, in accuracy."""
        return None if self.low is None or self.high is None else self.high - self.low

    @property
    def inside(self) -> bool | None:
        """Return whether the measured accuracy is in the interval; None if unknown or if the prediction is refused."""
        if self.target is None or self.refused is not None or self.low is None or self.high is None:
            return None
        return self.low <= self.target.accuracy <= self.high

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; the error is predicted minus measured."""
        measured = None if self.target is None else self.target.accuracy
        names = ("task", "recipe", "params", "tokens", "value", "low", "high", "bits_per_byte")
        return {name: getattr(self, name) for name in names} | {
            "bits_per_byte_interval": [self.bits_per_byte_low, self.bits_per_byte_high],
            "refused": self.refused,
            "run": None if self.target is None else self.target.name,
            "measured": measured,
            "measured_bits_per_byte": None if self.target is None else self.target.bits_per_byte,
            "error": None if measured is None or self.value is None else self.value - measured,
            "inside": self.inside,
        }


@dataclass(frozen=True)
class Coverage:
    """Counts and errors of predictions against measured runs."""

    pairs: int
    """Pairs of task and run."""
    refused: int
    inside: int
    mean_width: float | None
    """Mean width of the intervals that were not refused, in accuracy; None if all were."""
    mean_error: float | None
    """Mean absolute error of the predictions that were not refused."""

    @property
    def answered(self) -> int:
        """The pairs that were not refused."""
        return self.pairs - self.refused

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "pairs": self.pairs,
            "refused": self.refused,
            "refused_share": self.refused / self.pairs if self.pairs else None,
            "coverage": self.inside / self.answered if self.answered else None,
            "mean_width": self.mean_width,
            "mean_absolute_error": self.mean_error,
        }


@dataclass(frozen=True)
class TaskFit:
    """The fit of one task."""

    task: Task
    ensemble: Ensemble
    weights: Weights
    held_out: HeldOutRuns

    def reach(self, N: float, D: float) -> float:
        """Return the distance of (N, D) from the runs over the largest distance tested on hold-outs, 1 up to there.

        Distances are logarithms of compute.
        """
        distance = np.log(6 * N * D / self.task.runs.flops.max())
        return max(1.0, float(distance / max(self.held_out.distance.max(), np.log(2))))

    def reason_against(self, N: float, D: float) -> str | None:
        """Return why (N, D) is none that the laws are of: runs at about one D/N determine a law of compute alone."""
        ratios = self.task.runs.tokens / self.task.runs.params
        low, high = float(ratios.min()), float(ratios.max())
        if self.ensemble.in_both or low / FARTHEST_RATIO <= D / N <= high * FARTHEST_RATIO:
            return None
        own, least, most = (
            np.format_float_positional(x, precision=3, fractional=False, trim="-") for x in (D / N, low, high)
        )
        return (
            f"{own} tokens per parameter are far from the {least} … {most} of the runs, which determine a law of "
            "compute alone; add runs at other ratios"
        )


@dataclass(frozen=True)
class DownstreamFit:
    """The fits of a table's tasks. A refused task has its reason in `refused`."""

    table: DownstreamTable
    fits: dict[TaskKey, TaskFit]
    refused: dict[TaskKey, str]
    accuracy_stretch: float
    """The factor by which intervals of accuracy are stretched, of the table's hold-outs."""
    bits_stretch: float
    widest: float
    bootstraps: int
    seed: int

    @property
    def unit(self) -> str:
        """The unit of what the links start from, such as "bits per byte"."""
        return self.table.unit

    def predict(self, N: float, D: float, task: str, recipe: str | None = None) -> DownstreamPrediction:
        """Return the accuracy of a run of N parameters on D tokens, with its 95 % interval or why it is refused."""
        check_number("N", N, above=0)
        check_number("D", D, above=0)
        key = TaskKey(task, recipe)
        if key not in self.table.tasks:
            raise UnknownNameError("task", str(key), map(str, self.table.tasks))
        return self._predict(key, float(N), float(D))

    def predict_targets(self) -> list[DownstreamPrediction]:
        """Return the predictions of the table's held-out runs, next to what was measured."""
        return [
            self._predict(key, target.params, target.tokens, target)
            for key, task in self.table.tasks.items()
            for target in task.targets
        ]

    def _predict(self, key: TaskKey, N: float, D: float, target: TargetRun | None = None) -> DownstreamPrediction:
        if key in self.refused:
            return DownstreamPrediction(*key, params=N, tokens=D, refused=self.refused[key], target=target)
        fit = self.fits[key]
        found = fit.ensemble.predict(np.array([N]), np.array([D]), fit.weights)
        reach = fit.reach(N, D)
        bits = found[0].stretched(reach * self.bits_stretch, 0.0, np.inf)
        accuracy = found[1].stretched(reach * self.accuracy_stretch, 0.0, fit.task.ceiling)
        low, high = float(accuracy.low[0]), float(accuracy.high[0])
        return DownstreamPrediction(
            *key,
            params=N,
            tokens=D,
            value=float(accuracy.value[0]),
            low=low,
            high=high,
            bits_per_byte=float(bits.value[0]),
            bits_per_byte_low=float(bits.low[0]),
            bits_per_byte_high=float(bits.high[0]),
            refused=fit.reason_against(N, D) or self._too_wide(low, high),
            target=target,
        )

    def _too_wide(self, low: float, high: float) -> str | None:
        if high - low <= self.widest:
            return None
        return f"the 95 % interval is {100 * (high - low):.1f} points wide, more than {100 * self.widest:g}"

    @property
    def held_out_coverage(self) -> Coverage:
        """Return the coverage of hold-outs within the table: larger sizes predicted from smaller ones."""
        pairs = refused = inside = 0
        widths: list[np.ndarray] = []
        errors: list[np.ndarray] = []
        for fit in self.fits.values():
            tested = fit.held_out
            interval = tested.accuracy.stretched(self.accuracy_stretch, 0.0, fit.task.ceiling)
            width = interval.high - interval.low
            kept = width <= self.widest
            pairs, refused = pairs + len(width), refused + int((~kept).sum())
            inside += int(((interval.low <= tested.measured) & (tested.measured <= interval.high))[kept].sum())
            widths.append(width[kept])
            errors.append(np.abs(interval.value - tested.measured)[kept])
        return Coverage(pairs, refused, inside, _mean(widths), _mean(errors))

    def document(self, predictions: Sequence[DownstreamPrediction]) -> dict[str, Any]:
        """Return plain values for JSON: the predictions, the tasks' fits, coverage, and what was left out."""
        measured = [prediction for prediction in predictions if prediction.target is not None]
        return {
            "unit": self.unit,
            "predictions": [prediction.to_dict() for prediction in predictions],
            "measured": coverage(measured).to_dict() if measured else None,
            "held_out": self.held_out_coverage.to_dict(),
            "tasks": [self._task(task) for task in self.table.tasks.values()],
            "widest": self.widest,
            "stretch": {"accuracy": self.accuracy_stretch, "bits_per_byte": self.bits_stretch},
            "bootstraps": self.bootstraps,
            "seed": self.seed,
            "dropped": [row.to_dict() for row in self.table.dropped],
            "notes": self.table.notes,
        }

    def _task(self, task: Task) -> dict[str, Any]:
        fit = self.fits.get(task.key)
        found: dict[str, Any] = {
            "task": task.key.task,
            "recipe": task.key.recipe,
            "runs": len(task.runs),
            "sizes": len(sizes_of(task.runs.params)),
            "chance": task.chance,
            "ceiling": task.ceiling,
            "questions": task.questions,
            "checkpoint_noise": task.checkpoint_noise,
            "refused": self.refused.get(task.key),
        }
        if fit is not None:
            laws, links = list(fit.ensemble.laws), [link.link.name for link in fit.ensemble.links]
            found |= {
                "law_weights": dict(zip(laws, fit.weights.among(laws).tolist(), strict=True)),
                "link_weights": dict(zip(links, fit.weights.links.tolist(), strict=True)),
                "law_noise": fit.ensemble.law_noise,
                "link_noise": float(fit.weights.links @ fit.ensemble.link_noise),
            }
        return found


def coverage(predictions: Sequence[DownstreamPrediction]) -> Coverage:
    """Return how predictions with a measured run fared."""
    kept = [prediction for prediction in predictions if prediction.refused is None]
    widths = np.array([prediction.width for prediction in kept])
    errors = np.array([abs(p.value - p.target.accuracy) for p in kept if p.value is not None and p.target is not None])
    inside = sum(bool(prediction.inside) for prediction in kept)
    return Coverage(len(predictions), len(predictions) - len(kept), inside, _mean([widths]), _mean([errors]))


def _mean(parts: Sequence[np.ndarray]) -> float | None:
    values = np.concatenate(parts) if parts else np.zeros(0)
    return float(values.mean()) if len(values) else None


def fit_downstream(
    table: DownstreamTable,
    *,
    tasks: Sequence[str] = (),
    bootstraps: int = 100,
    seed: int = 0,
    widest: float = WIDEST,
    advance: Callable[..., None] | None = None,
) -> DownstreamFit:
    """Fit the tasks of a table, by default all; `advance(1, task)` is called after each.

    A task is refused, with the reason, if its chance level is unknown, if there are too few sizes or runs, if no larger
    size can be predicted from smaller ones, if its accuracy is at chance within its noise, or if the accuracy does not
    rise with compute and with falling bits per byte. widest: the width of an interval, in accuracy, above which a
    prediction is refused. Raises `InputError` if a name of `tasks` is not in the table.
    """
    check_at_least_one(bootstraps=bootstraps)
    check_number("widest", widest, above=0, most=1)
    table = _only_tasks(table, tasks)
    tell = advance or (lambda *_: None)
    fits: dict[TaskKey, TaskFit] = {}
    refused: dict[TaskKey, str] = {}
    for key, task in table.tasks.items():
        try:
            fits[key] = _fit_task(task, bootstraps, seed)
        except InputError as error:
            refused[key] = str(error)
        tell(1, str(key))
    tested = [fit.held_out for fit in fits.values()]
    accuracy = [runs.accuracy.score(runs.measured) for runs in tested]
    bits = [runs.bits_per_byte.score(runs.measured_bits) for runs in tested]
    by_accuracy, by_bits = (stretch(np.concatenate(scores)) if scores else 1.0 for scores in (accuracy, bits))
    return DownstreamFit(table, fits, refused, by_accuracy, by_bits, widest, bootstraps, seed)


def _only_tasks(table: DownstreamTable, names: Sequence[str]) -> DownstreamTable:
    known = list(dict.fromkeys(key.task for key in table.tasks))
    for name in names:
        if name not in known:
            raise UnknownNameError("task", name, known)
    if not names:
        return table
    kept: Mapping[TaskKey, Task] = {key: task for key, task in table.tasks.items() if key.task in names}
    return DownstreamTable(dict(kept), table.unit, table.dropped, table.notes)


def _fit_task(task: Task, bootstraps: int, seed: int) -> TaskFit:
    chance = _check(task)
    runs = task.runs
    settings: dict[str, Any] = {"chance": chance, "ceiling": task.ceiling, "bootstraps": bootstraps, "seed": seed}
    ensemble = fit_ensemble(runs, **settings)
    splits = split_by_size(runs, **settings)
    if not splits:
        raise InputError("no larger size can be predicted from the smaller ones, which have too few runs for any law")
    weights = weights_by_error(splits, np.ones(len(runs), bool))
    return TaskFit(task, ensemble, weights, predict_held_out(runs, splits))


def _check(task: Task) -> float:
    """Return the task's chance level. Raises InputError if its runs cannot be fitted."""
    runs, chance = task.runs, task.chance
    if chance is None:
        raise InputError(
            f"the chance level of {task.key.task!r} is not known; add a column chance, or --chance {task.key.task}=0.25"
        )
    if not 0 <= chance < task.ceiling <= 1:
        raise InputError(
            f"chance is {chance:g} and the ceiling {task.ceiling:g}; chance must be below it, both in 0 … 1: give them "
            "with --chance and --ceiling"
        )
    sizes = len(sizes_of(runs.params)) if len(runs) else 0
    if sizes < MINIMUM_SIZES or len(runs) < MINIMUM_RUNS:
        raise InputError(
            f"{counted(len(runs), 'run')} of {counted(sizes, 'size')} cannot determine the laws; at least "
            f"{MINIMUM_RUNS} runs of {MINIMUM_SIZES} sizes are needed"
        )
    top = runs.flops >= np.quantile(runs.flops, 2 / 3)
    best, noise = float(runs.accuracy[top].mean()), _noise(task)
    if best - chance < SIGNAL * noise:
        raise InputError(
            f"the largest runs are at chance within noise: {100 * best:.1f} % with chance at {100 * chance:.1f} % and "
            f"noise of {100 * noise:.1f} points"
        )
    falls = _rank_correlation(runs.flops, -runs.bits_per_byte)
    rises = _rank_correlation(-runs.bits_per_byte, runs.accuracy)
    least = RISING / np.sqrt(len(runs) - 1)
    if falls < least:
        raise InputError(f"the loss of the gold answer does not fall with compute (rank correlation {falls:+.2f})")
    if rises < least:
        raise InputError(
            f"the accuracy does not rise as the loss of the gold answer falls (rank correlation {rises:+.2f})"
        )
    return chance


def _noise(task: Task) -> float:
    """Return the standard deviation of one run's accuracy: about a line in ln C, and of its number of questions."""
    log_flops, accuracy = np.log(task.runs.flops), task.runs.accuracy
    residuals = accuracy - np.polyval(np.polyfit(log_flops, accuracy, 1), log_flops)
    spread = (residuals**2).sum() / (len(accuracy) - 2)
    chance = task.chance or 0.0
    sampling = chance * (1 - chance) / task.questions if task.questions else 0.0
    return float(np.sqrt(spread + sampling))


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation; ties share their mean rank, and constant values have none."""
    ranks = [_ranks(values) for values in (x, y)]
    spreads = [rank.std() for rank in ranks]
    if min(spreads) == 0:
        return 0.0
    return float(((ranks[0] - ranks[0].mean()) * (ranks[1] - ranks[1].mean())).mean() / (spreads[0] * spreads[1]))


def _ranks(values: np.ndarray) -> np.ndarray:
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[inverse]
