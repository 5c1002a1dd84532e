"""Answer questions with a fit: the optimum of a budget, the compute for a target loss, the loss of a planned run.

Every answer states how far it extrapolates. N in parameters, D in tokens, losses in nats per token, C = 6·N·D FLOPs.
"""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.scaling.forms.choose import FormChoice
from experiments.scaling.law.intervals import LARGEST_LOG, exponential, own_interval_warnings, percentile_interval
from experiments.scaling.law.parametric import ParametricFit, law, optimum
from experiments.scaling.valleys.isoflop import IsoflopFit
from model.errors import InputError, check_number

_BELOW = "the compute is below that of the fit"
FAR = 10.0  # multiple of the fit's largest compute from which an answer comes with a warning


@dataclass(frozen=True)
class Extrapolation:
    """The distance of (N, D) from the runs: `params_times` and `tokens_times` are 1 inside the range of the runs,
    above 1 beyond its top, below 1 beneath its bottom.
    """

    flops_over_largest: float
    params_times: float
    tokens_times: float
    warnings: list[str]


@dataclass(frozen=True)
class OptimalRun:
    """The compute-optimal run at a budget, by one estimator."""

    flops: float
    params: float
    tokens: float
    loss: float | None
    """None for estimators other than the parametric law."""
    intervals: dict[str, list[float]] | None
    """[low, high] of params, tokens and, where there is one, loss; None if the table does not determine an interval."""
    level: float
    """The level of the intervals, in per cent."""
    extrapolation: Extrapolation
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class FormLosses:
    """The losses of a run at (N, D) by every form of law, and the form that held-out budgets prefer."""

    winner: str
    told_apart: bool
    reason: str
    runs: int
    """The number of runs in the fits."""
    losses: dict[str, float]
    """The loss by each form."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class PlannedLoss:
    """The predicted loss of one new run at (N, D)."""

    params: float
    tokens: float
    flops: float
    loss: float
    interval: list[float]
    level: float
    """The level of the interval, in per cent."""
    extrapolation: Extrapolation
    warnings: list[str]

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ComputeForLoss:
    """The least compute that reaches a loss, and the run that it is spent on."""

    target: float
    flops: float
    warnings: list[str]
    params: float
    tokens: float
    interval: list[float | None]
    """The interval of the FLOPs; an upper bound of None: some laws of the bootstrap never reach the loss."""
    level: float
    """The level of the interval, in per cent."""
    unreachable_share: float
    """The share of the bootstrap's laws that never reach the loss."""
    extrapolation: Extrapolation

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


def extrapolation(fit: ParametricFit | IsoflopFit, params: float, tokens: float) -> Extrapolation:
    """Return how far (N, D) is from the runs: compute over the largest fitted, N and D over their ranges, words."""
    if isinstance(fit, ParametricFit):
        sizes, seen, flops = fit.table.params, fit.table.tokens, 6 * fit.table.params * fit.table.tokens
    else:
        sizes, seen = (np.concatenate([getattr(v, name) for v in fit.accepted]) for name in ("params", "tokens"))
        flops = np.array([v.flops for v in fit.accepted])
    compute = 6 * params * tokens * _convention(fit)

    def outside(value: float, values: np.ndarray) -> float:
        return float(max(value / values.max(), 1.0) * min(value / values.min(), 1.0))

    times = {"params_times": outside(params, sizes), "tokens_times": outside(tokens, seen)}
    ratio = float(compute / flops.max())
    warnings = []
    if ratio > FAR:
        warnings.append(f"the compute is {ratio:.3g} times the largest of the fit: far beyond what it has seen")
    for letter, key, values in (("N", "params_times", sizes), ("D", "tokens_times", seen)):
        if times[key] != 1.0:
            value = params if letter == "N" else tokens
            warnings.append(f"{letter}={value:.3g} is outside the runs' {values.min():.3g}…{values.max():.3g}")
    if compute < (1 - 1e-9) * flops.min():
        warnings.append(f"{_BELOW}: {compute / flops.min():.2g} of its smallest")
    return Extrapolation(ratio, **times, warnings=warnings)


def is_far(extrapolated: Extrapolation) -> bool:
    """Return whether an answer's compute is more than `FAR` times the largest of the fit."""
    return extrapolated.flops_over_largest > FAR


def in_words(extrapolated: Extrapolation) -> str:
    """Describe the result of `extrapolation`; the text begins with FAR if the answer is not reliable."""
    ratio = extrapolated.flops_over_largest
    warnings = list(extrapolated.warnings)
    times = f"{ratio:,.0f}" if 100 <= ratio < 1e9 else f"{ratio:.3g}"
    if is_far(extrapolated):
        warnings.pop(0)  # the same in other words
        words = [f"FAR: {times} times the largest compute of the fit, beyond what it can vouch for"]
    elif ratio > 1 + 1e-9:
        words = [f"{times} times the largest compute of the fit"]
    elif warnings and warnings[-1].startswith(_BELOW):
        words = [warnings.pop()]
    else:
        words = [f"within the compute of the fit ({ratio:.2g} of its largest)"]
    return "; ".join(words + warnings)


def _convention(fit: ParametricFit | IsoflopFit) -> float:
    """Return C of a fit's own convention over 6·N·D, the mean over its runs; the parametric law uses 6·N·D only."""
    if isinstance(fit, ParametricFit):
        return 1.0
    ratios = [np.log(v.flops) - np.log(6 * v.params * v.tokens).mean() for v in fit.accepted]
    return float(np.exp(np.mean(ratios)))


def optimal(fits: dict[str, ParametricFit | IsoflopFit], C: float, level: int | float = 95) -> dict[str, OptimalRun]:
    """Return the compute-optimal run at C FLOPs by each estimator."""
    check_number("C", C, above=0)
    answers = {}
    for name, fit in fits.items():
        best = fit.optimal(C)
        params, tokens = float(best.params), float(best.tokens)
        try:
            intervals: dict[str, list[float]] | None = {
                key: [float(bound) for bound in pair] for key, pair in fit.optimal_interval(C, level).items()
            }
        except InputError:
            intervals = None
        values = {"params": params, "tokens": tokens}
        if isinstance(fit, ParametricFit) and intervals is not None:
            values["loss"] = float(fit.predict(params, tokens))
            intervals["loss"] = [float(bound) for bound in _optimal_losses(fit, C, level)]
        pairs = {key: {level: (low, high)} for key, (low, high) in (intervals or {}).items()}
        answers[name] = OptimalRun(
            flops=float(C),
            params=params,
            tokens=tokens,
            loss=values.get("loss"),
            intervals=intervals,
            level=level,
            extrapolation=extrapolation(fit, params, tokens),
            warnings=own_interval_warnings({key: values[key] for key in pairs}, pairs),
        )
    return answers


def _optimal_losses(fit: ParametricFit, C: float, level: int | float) -> tuple[Any, Any]:
    """Return the interval of the law's loss at each draw's own optimum."""
    params, tokens = optimum(fit.draws, C)
    losses = [law(theta, n, d) for theta, n, d in zip(fit.draws, params, tokens, strict=True)]
    return percentile_interval(np.array(losses), level)


def planned_loss(fit: ParametricFit, params: float, tokens: float, level: int | float = 95) -> PlannedLoss:
    """Return where the loss of one new run at (N, D) should fall."""
    check_number("params", params, above=0)
    check_number("tokens", tokens, above=0)
    check_number("6·params·tokens", 6.0 * params * tokens, above=0)
    low, high = fit.predict_interval(params, tokens, level)
    loss = float(fit.predict(params, tokens))
    return PlannedLoss(
        params=float(params),
        tokens=float(tokens),
        flops=6.0 * params * tokens,
        loss=loss,
        interval=[float(low), float(high)],
        level=level,
        extrapolation=extrapolation(fit, params, tokens),
        warnings=own_interval_warnings({"loss": loss}, {"loss": {level: (float(low), float(high))}}),
    )


def planned_by_form(choice: FormChoice, params: float, tokens: float) -> FormLosses:
    """Return how far the forms differ at (N, D).

    An interval is conditional on its form of law; this shows the uncertainty about the form.
    """
    losses = {name: float(fit.predict(params=params, tokens=tokens)) for name, fit in choice.fits.items()}
    return FormLosses(choice.winner, choice.told_apart, choice.reason, choice.held_out.runs, losses)


def log_compute(theta: np.ndarray, target: float) -> float:
    """Return ln of the least C = 6ND at which the law reaches the target; +inf if it never does.

    Along the optimum both terms are powers of C, C^(−αβ/(α+β)), in the fixed ratio β : α.
    """
    E, _, _, alpha, beta = theta
    if target <= E or not min(alpha, beta) > 0:
        return math.inf
    rate = alpha * beta / (alpha + beta)
    at_one = float(law(theta, *optimum(theta, 6.0))) - E  # the reducible loss at C = 6, where ln(C/6) = 0
    if not 0 < at_one < math.inf:  # a term of the law is lost: it has no optimum
        return math.inf
    return math.log(6.0) + math.log(at_one / (target - E)) / rate


def compute_for_loss(fit: ParametricFit, target: float, level: int | float = 95) -> ComputeForLoss:
    """Return the least compute that reaches a loss. Raises `InputError` for a target at or below the floor E."""
    check_number("target", target, above=0)
    if target <= fit.E:
        raise InputError(
            f"a loss of {target:g} is at or below the law's floor E={fit.E:.4g}; no compute reaches it, ask for a "
            "higher one"
        )
    log_flops = log_compute(fit.theta, target)
    if log_flops > LARGEST_LOG:
        raise InputError(
            f"a loss of {target:g} is so near the law's floor E={fit.E:.4g} that no number holds its FLOPs"
        )
    flops = math.exp(log_flops)
    draws = np.array([log_compute(theta, target) for theta in fit.draws])
    tail = (100 - level) / 2
    # Order statistics, since interpolation towards an infinite draw would be infinite too early.
    low, high = np.nanpercentile(draws, [tail, 100 - tail], method="nearest")
    best = fit.optimal(flops)
    pair = float(exponential(low)), float(exponential(high))
    return ComputeForLoss(
        target=float(target),
        flops=flops,
        warnings=own_interval_warnings({"flops": flops}, {"flops": {level: pair}}),
        params=float(best.params),
        tokens=float(best.tokens),
        interval=[float(np.exp(bound)) if bound <= LARGEST_LOG else None for bound in (low, high)],
        level=level,
        unreachable_share=float(np.isinf(draws).mean()),
        extrapolation=extrapolation(fit, float(best.params), float(best.tokens)),
    )
