"""Training curves: loss over tokens of one run, from run directories or from a table with one row per (run, step)."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float

from experiments.scaling.rows.columns import number, require
from experiments.scaling.rows.table import _records
from model.errors import InputError

SMOOTHING = 0.05  # width of the smoothing kernel in ln D


@dataclass(frozen=True)
class Curve:
    """One run's training curve: N parameters, D tokens seen (ascending) and the loss then, in nats per token."""

    name: str
    params: float
    tokens: Float[np.ndarray, " points"]
    loss: Float[np.ndarray, " points"]
    schedule: str = "unknown"

    def smoothed(self, width: float = SMOOTHING) -> Float[np.ndarray, " points"]:
        """Local straight lines in ln D under a Gaussian kernel: a falling curve keeps its slope, also at its ends."""
        x = np.log(self.tokens)
        result = np.empty(len(x))
        for i, at in enumerate(x):
            near = slice(np.searchsorted(x, at - 3 * width), np.searchsorted(x, at + 3 * width, side="right"))
            u = x[near] - at
            weight = np.exp(-0.5 * (u / width) ** 2)
            m0, m1, m2 = weight.sum(), weight @ u, weight @ u**2
            determinant = m0 * m2 - m1**2
            weight = weight * (m2 - m1 * u) / determinant if determinant > 1e-12 * m0**2 * width**2 else weight / m0
            result[i] = weight @ self.loss[near]
        return result


def curves_of_table(
    path: str | Path,
    *,
    run: str = "run",
    params: str = "params",
    tokens: str = "tokens",
    loss: str = "loss",
    schedule: str = "unknown",
) -> list[Curve]:
    """Training curves from a table with one row per (run, step)."""
    path = Path(path)
    records = _records(path)
    if not records:
        raise InputError(f"{path} has no rows")
    require(path, [run, params, tokens, loss], list(dict.fromkeys(key for _, record in records for key in record)))
    groups: dict[str, list[tuple[float, ...]]] = {}
    for row, record in records:
        values = tuple(number(path, row, name, record.get(name)) for name in (params, tokens, loss))
        groups.setdefault(str(record.get(run)), []).append(values)
    curves = []
    for name, points in groups.items():
        sizes, seen, losses = np.array(points).T
        if len(np.unique(sizes)) > 1:
            raise InputError(
                f"{path}: run {name!r} has {len(np.unique(sizes))} different values of {params!r}; a run has one"
            )
        curves.append(Curve(name, float(sizes[0]), seen, losses, schedule))
    return curves


def curves_of_runs(folders: Sequence[str | Path]) -> list[Curve]:
    """Training curves from run directories: their `metrics.jsonl`, with N of the config (embeddings included)."""
    from model import ModelConfig, accounting

    curves = []
    for folder in map(Path, folders):
        try:
            identity = json.loads((folder / "run.json").read_text(encoding="utf-8"))["identity"]
            lines = (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
            points = [json.loads(line) for line in lines if line.strip()]
        except (OSError, KeyError, ValueError) as error:
            raise InputError(f"{folder} is no run directory with run.json and metrics.jsonl ({error})") from error
        points = [point for point in points if "loss" in point and "tokens" in point]
        total = accounting.parameters(ModelConfig.from_dict(identity["config"])).total
        schedule = str(identity.get("train_config", identity.get("train", {})).get("schedule", "unknown"))
        tokens, loss = (np.array([point[name] for point in points], np.float64) for name in ("tokens", "loss"))
        curves.append(Curve(folder.name, float(total), tokens, loss, schedule))
    return curves
