"""Minimise training plus serving cost at a given loss (Sardana & Frankle 2023)."""

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.optimize import brentq

from experiments.scaling.law.intervals import LARGEST_LOG, percentile_interval
from experiments.scaling.law.parametric import ParametricFit, optimum
from experiments.scaling.use import Extrapolation, compute_for_loss, extrapolation, log_compute
from model.errors import InputError, check_number

LN_RANGE = 12.0  # largest distance, in ln N, of a serving optimum from the optimum of training alone


@dataclass(frozen=True)
class ServingCost:
    """The cost of one served token as a power law of the model's size: coefficient·N^exponent, in `unit`.

    The default is 2·N FLOPs (Sardana & Frankle 2023, equation 2). A measured cost is in seconds, and then training is
    too: `training_unit` is what one training FLOP costs in the same unit.
    """

    coefficient: float = 2.0
    exponent: float = 1.0
    unit: str = "FLOPs"
    training_unit: float = 1.0
    measured_params: tuple[float, ...] = ()
    """Sizes that were measured, ascending."""

    def __post_init__(self) -> None:
        check_number("coefficient", self.coefficient, above=0)
        check_number("training_unit", self.training_unit, above=0)
        if not self.exponent >= 0:
            raise InputError(
                f"the cost of a served token falls with the size of the model, as N^{self.exponent:.2g}; measure sizes "
                "further apart"
            )

    def __call__(self, params: Any) -> Any:
        """Return the cost of one token of a model with N parameters."""
        return self.coefficient * np.asarray(params, np.float64) ** self.exponent

    @classmethod
    def through(
        cls, params: Sequence[float], seconds_per_token: Sequence[float], training_flops_per_second: float
    ) -> "ServingCost":
        """Return the power law in N through measured seconds per token; training runs at this many 6ND FLOPs per
        second.

        One point gives a cost proportional to N, as reading the weights is. Raises `InputError` on values that are not
        positive.
        """
        sizes, seconds = np.asarray(params, np.float64), np.asarray(seconds_per_token, np.float64)
        for name, values in (
            ("params", sizes),
            ("seconds_per_token", seconds),
            ("training_flops_per_second", np.array([training_flops_per_second])),
        ):
            if not len(values) or not (np.isfinite(values) & (values > 0)).all():
                raise InputError(f"{name}={values.tolist()} must be positive numbers, at least one")
        exponent = 1.0
        if len(np.unique(sizes)) > 1:
            exponent = float(np.polyfit(np.log(sizes), np.log(seconds), 1)[0])
        coefficient = float(np.exp((np.log(seconds) - exponent * np.log(sizes)).mean()))
        measured = tuple(sorted(set(sizes.tolist())))
        return cls(coefficient, exponent, "seconds", 1 / training_flops_per_second, measured)

    @classmethod
    def measured(
        cls, documents: Sequence[str | Path], training_flops_per_second: float, *, batch: int | None = None
    ) -> "ServingCost":
        """Read the cost from the JSON files of `isoflop bench decode`, one per model size.

        `batch` picks the cells (None: the largest). The cost per token of a cell is its seconds
        per step over its batch; of a size, the median over its contexts and weights. Cells that failed, or that changed
        the number of KV heads, are left out.
        """
        from model import ModelConfig, accounting

        sizes, costs = [], []
        for path in map(Path, documents):
            document = _document(path, "isoflop bench decode --json", ("config", "cells"))
            try:
                config = ModelConfig.from_dict(document["config"])
                cells = [
                    cell
                    for cell in document["cells"]
                    if "error" not in cell and cell.get("kv_heads") in (None, config.num_kv_heads)
                ]
                wanted = max((cell["batch"] for cell in cells), default=0) if batch is None else batch
                seconds = [
                    cell["time_per_output_token_seconds"] / cell["batch"] for cell in cells if cell["batch"] == wanted
                ]
            except (KeyError, ValueError, TypeError, AttributeError) as error:
                raise InputError(f"{path} is not a document of `isoflop bench decode --json` ({error})") from error
            if not seconds:
                raise InputError(f"{path} has no measured cell{f' of batch {wanted}' if wanted else ''}")
            sizes.append(accounting.parameters(config).total)
            costs.append(float(np.median(seconds)))
        return cls.through(sizes, costs, training_flops_per_second)


@dataclass(frozen=True)
class TrainingOptimum:
    """The model that is best for training alone at the same loss."""

    params: float
    tokens: float
    total_cost: float
    """The cost of training and serving it."""


@dataclass(frozen=True)
class ServingOptimum:
    """The model of least lifetime cost at a loss; costs are in the unit of `cost`."""

    target: float
    """The loss, in nats per token."""
    training_flops: float | None
    """The budget whose optimum has that loss, where a budget was given."""
    served_tokens: float
    params: float
    tokens: float
    flops: float
    """The FLOPs of training."""
    interval: dict[str, list[float]]
    """[low, high] of params and tokens."""
    unreachable_share: float
    """The share of the bootstrap's laws that never reach the loss."""
    level: float
    """The level of the interval, in per cent."""
    cost: ServingCost
    training_cost: float
    serving_cost: float
    total_cost: float
    training_optimal: TrainingOptimum
    saving: float
    """The share of the total cost of `training_optimal` that is saved."""
    extrapolation: Extrapolation

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON, with training_flops first where that was given."""
        goal = {} if self.training_flops is None else {"training_flops": self.training_flops}
        return goal | {
            "target": self.target,
            "served_tokens": self.served_tokens,
            "params": self.params,
            "tokens": self.tokens,
            "flops": self.flops,
            "interval": self.interval,
            "unreachable_share": self.unreachable_share,
            "level": self.level,
            "unit": self.cost.unit,
            "cost_per_token": {
                "coefficient": self.cost.coefficient,
                "exponent": self.cost.exponent,
                "measured_params": list(self.cost.measured_params),
            },
            "training_cost": self.training_cost,
            "serving_cost": self.serving_cost,
            "total_cost": self.total_cost,
            "training_optimal": asdict(self.training_optimal),
            "saving": self.saving,
            "extrapolation": asdict(self.extrapolation),
        }


def training_rate(path: str | Path) -> float:
    """Return the FLOPs per second (6·N·D) of one training run, from the JSON file of `isoflop bench train`.

    The row of one lane counts (where there is none: the fastest); of a comparison, isoflop's own. Raises `InputError`
    for another file.
    """
    document = _document(path, "isoflop bench train --json", ())
    try:
        if "contenders" in document:
            rows = [row for row in document["contenders"] if row["name"] == "isoflop"]
        else:
            rows = [row for row in document["rows"] if row["lanes"] == 1] or document["rows"]
        return max(float(row["flops_6nd_per_second"]) for row in rows)
    except (KeyError, ValueError, TypeError) as error:
        raise InputError(f"{path} is not a document of `isoflop bench train --json` ({error})") from error


def _document(path: str | Path, command: str, needs: Sequence[str]) -> dict[str, Any]:
    path = Path(path)
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror or error}") from error
    except ValueError as error:
        raise InputError(f"{path} is not a document of `{command}`: it is not JSON ({error})") from error
    missing = [name for name in needs if not isinstance(document, dict) or name not in document]
    if missing or not isinstance(document, dict):
        raise InputError(f"{path} is not a document of `{command}`: it has no {' and no '.join(map(repr, missing))}")
    return document


def tokens_for_loss(theta: np.ndarray, params: Any, target: float) -> Any:
    """Return the D at which a model of N parameters reaches the target; inf if it never does."""
    E, A, B, alpha, beta = theta
    left = target - E - A * np.asarray(params, np.float64) ** -alpha
    return np.where(left > 0, (B / np.where(left > 0, left, 1.0)) ** (1 / beta), np.inf)


def serving_optimum(
    fit: ParametricFit,
    *,
    served_tokens: float,
    target: float | None = None,
    training_flops: float | None = None,
    cost: ServingCost = ServingCost(),
    level: int | float = 95,
) -> ServingOptimum:
    """Return the model of least total cost at a loss: 6·N·D plus `served_tokens` times the cost of one token.

    The loss is `target`, or what `training_flops` would reach compute-optimally (Sardana & Frankle 2023, equation 3,
    with their 2·N·M the default cost). The answer reaches the same loss with a smaller model trained for longer; more
    served tokens shift it further. The interval is over bootstrap draws at the same loss. Raises `InputError` unless
    exactly one of the two is given.
    """
    if (target is None) == (training_flops is None):
        raise InputError("give either target (a loss) or training_flops (a budget), not both and not neither")
    if not served_tokens >= 0:
        raise InputError(f"served_tokens={served_tokens} must not be negative")
    if target is None:
        check_number("training_flops", float(training_flops or 0), above=0)
        target = float(fit.optimal(training_flops).loss)
    alone = compute_for_loss(fit, target, level)
    params = _cheapest(fit.theta, target, served_tokens, cost)
    tokens = float(tokens_for_loss(fit.theta, params, target))
    reaching = [theta for theta in fit.draws if log_compute(theta, target) <= LARGEST_LOG]
    if not reaching:
        raise InputError(f"none of the bootstrap's laws reaches a loss of {target:g}; ask for a higher one")
    draws = np.array([_cheapest(theta, target, served_tokens, cost) for theta in reaching])
    trained = np.array([tokens_for_loss(theta, n, target) for theta, n in zip(reaching, draws, strict=True)])

    def training(n: Any, d: Any) -> Any:
        return 6 * n * d * cost.training_unit

    def serving(n: float) -> float:
        return served_tokens * float(cost(n))

    total, total_alone = (
        training(params, tokens) + serving(params),
        training(alone.params, alone.tokens) + serving(alone.params),
    )
    return ServingOptimum(
        target=target,
        training_flops=training_flops,
        served_tokens=float(served_tokens),
        params=params,
        tokens=tokens,
        flops=6 * params * tokens,
        interval={
            name: [float(bound) for bound in percentile_interval(values, level)]
            for name, values in (("params", draws), ("tokens", trained))
        },
        unreachable_share=1 - len(reaching) / len(fit.draws),
        level=level,
        cost=cost,
        training_cost=training(params, tokens),
        serving_cost=serving(params),
        total_cost=total,
        training_optimal=TrainingOptimum(alone.params, alone.tokens, total_alone),
        saving=1 - total / total_alone,
        extrapolation=extrapolation(fit, params, tokens),
    )


def _cheapest(theta: np.ndarray, target: float, served_tokens: float, cost: ServingCost) -> float:
    """Return the N of the least training and serving cost: in ln N the zero of the total's derivative.

    With x = A·N^−α and D from the rest, d ln D / d ln N = −αx / (β·(L − E − x)); a sign change is sought between the
    smallest model that reaches the loss at all and one e^12 times the training optimum.
    """
    E, A, B, alpha, beta = theta
    start = float(np.log(optimum(theta, math.exp(log_compute(theta, target)))[0]))
    least = math.log(A / (target - E)) / alpha
    unit = cost.training_unit

    def slope(log_n: float) -> float:
        n = math.exp(log_n)
        share = A * n**-alpha
        rest = target - E - share
        training = 6 * n * (B / rest) ** (1 / beta) * unit
        serving = served_tokens * cost.exponent * float(cost(n))
        return 1 - alpha * share / (beta * rest) + serving / training

    low, high = least + 1e-9 * max(1.0, abs(least)) + 1e-7, start + LN_RANGE
    if not slope(low) < 0:
        raise InputError(
            f"to serve {served_tokens:.3g} tokens the smallest model that reaches a loss of {target:.4g} at all, of "
            f"{math.exp(least):.3g} parameters, is cheapest, and its training has no end; ask for fewer tokens"
        )
    return math.exp(brentq(slope, low, high, xtol=1e-12, rtol=1e-13))
