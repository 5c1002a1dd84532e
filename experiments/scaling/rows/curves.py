"""Read training curves: loss over tokens of one run, from a table with one row per (run, step)."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from experiments.scaling.rows.columns import require
from experiments.scaling.rows.files import column_names, read_records
from experiments.scaling.rows.numerals import read_numbers
from model.errors import InputError

SMOOTHING = 0.05  # width of the smoothing kernel in ln D


@dataclass(frozen=True)
class TrainingCurve:
    """One run's training curve: N parameters, D tokens seen (ascending) and the loss then, in nats per token."""

    name: str
    params: float
    tokens: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    schedule: str = "unknown"

    def smoothed(self) -> Float[np.ndarray, " points"]:
        """Smooth by local linear regression in ln D (Gaussian kernel), which keeps slopes at the ends."""
        x = np.log(self.tokens)
        result = np.empty(len(x))
        for i, at in enumerate(x):
            near = slice(np.searchsorted(x, at - 3 * SMOOTHING), np.searchsorted(x, at + 3 * SMOOTHING, side="right"))
            u = x[near] - at
            weight = np.exp(-0.5 * (u / SMOOTHING) ** 2)
            m0, m1, m2 = weight.sum(), weight @ u, weight @ u**2
            determinant = m0 * m2 - m1**2
            weight = weight * (m2 - m1 * u) / determinant if determinant > 1e-12 * m0**2 * SMOOTHING**2 else weight / m0
            result[i] = weight @ self.loss[near]
        return result


def curves_of_table(path: str | Path, schedule: str = "unknown") -> list[TrainingCurve]:
    """Read training curves from a table with the columns run, params, tokens and loss, one row per (run, step).

    Raises `InputError` for a table that cannot be read and for a run of several sizes.
    """
    path = Path(path)
    records = read_records(path)
    if not records:
        raise InputError(f"{path} has no rows")
    require(path, ["run", "params", "tokens", "loss"], column_names(records))
    numbers, _ = read_numbers(path, records, {"params": True, "tokens": True, "loss": False})
    groups: dict[str, list[tuple[float, ...]]] = {}
    rows = zip(numbers["params"], numbers["tokens"], numbers["loss"], strict=True)
    for (_, record), values in zip(records, rows, strict=True):
        groups.setdefault(str(record.get("run")), []).append(values)
    curves = []
    for name, points in groups.items():
        sizes, seen, losses = np.array(points).T
        if len(np.unique(sizes)) > 1:
            raise InputError(
                f"{path}: run {name!r} has {len(np.unique(sizes))} different values of 'params'; a run has one"
            )
        curves.append(TrainingCurve(name, float(sizes[0]), seen, losses, schedule))
    return curves
