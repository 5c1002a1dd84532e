"""Read loss curves of runs from their metrics: smoothed, thinned out, with gaps marked."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int

from model.errors import InputError
from train.run.metrics import open_metrics

SMOOTHING = 0.1  # a point of a loss curve is the mean over the steps within this share of its own step
TRAINING_LOSS = "training loss (nats)"


@dataclass(frozen=True)
class LossCurve:
    """A run's training loss, smoothed and thinned out. flops: 6·N·D spent so far. hole: steps before it are missing."""

    steps: Float[np.ndarray, " points"]
    tokens: Float[np.ndarray, " points"]
    flops: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    diverged: bool
    hole: Bool[np.ndarray, " points"]


def read_curve(run: Path, points: int = 200) -> LossCurve | None:
    """Return a run's curve at about `points` steps, evenly spread in log steps; None if none can be read.

    Each point is the mean over the steps within ±10 % of its own, so that curves of any length look equally smooth on
    a log axis. Steps after the first loss that is not finite are left out.
    """
    try:
        lines = open_metrics(run).lines
    except InputError:  # `train.run.metrics.troubles` says why
        return None
    holes = holes_before(lines)
    known = [index for index, line in enumerate(lines) if line["loss"] is not None]
    records = [lines[index] for index in known]
    loss = np.array([record["loss"] for record in records], np.float64)
    finite = len(loss) if np.isfinite(loss).all() else int(np.argmin(np.isfinite(loss)))
    if finite == 0:
        return None
    steps, tokens, flops = (
        np.array([record[name] for record in records[:finite]], np.float64) for name in ("step", "tokens", "flops_6nd")
    )
    chosen = np.unique(np.round(np.geomspace(1, finite, points)).astype(int)) - 1
    smooth = smoothed(steps, loss[:finite])
    hole = np.diff(holes[known][chosen], prepend=0) > 0
    return LossCurve(steps[chosen], tokens[chosen], flops[chosen], smooth[chosen], finite < len(loss), hole)


def holes_before(lines: Sequence[dict[str, Any]]) -> Int[np.ndarray, " lines"]:
    """Return the number of gaps in the steps up to each line of a run's metrics."""
    steps = np.array([line["step"] for line in lines], int)
    return np.cumsum(np.diff(steps, prepend=steps[:1] - 1) > 1)


def interrupted(
    x: Float[np.ndarray, " points"], y: Float[np.ndarray, " points"], hole: Bool[np.ndarray, " points"]
) -> tuple[Float[np.ndarray, " drawn"], Float[np.ndarray, " drawn"]]:
    """Return the points of a line with a NaN in each hole, across which the line is then not drawn."""
    places = np.flatnonzero(hole)
    return np.insert(x, places, x[places]), np.insert(y, places, np.nan)


def smoothed(at: Float[np.ndarray, " points"], values: Float[np.ndarray, " points"]) -> Float[np.ndarray, " points"]:
    """Return the mean of `values` over the points within ±10 % of each point's own place; `at` rises."""
    total = np.concatenate([[0.0], np.cumsum(values)])
    low = np.searchsorted(at, at * (1 - SMOOTHING))
    high = np.searchsorted(at, at * (1 + SMOOTHING), side="right")
    return (total[high] - total[low]) / (high - low)
