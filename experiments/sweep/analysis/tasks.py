"""Compare the settings of a sweep by the metric of a task, with the noise of its questions and of the seeds."""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float, Int

from experiments.evaluate.statistics.signal_to_noise import TaskScores, TaskSignal, rank_tasks
from experiments.evaluate.statistics.variance import variance_parts
from experiments.sweep.analysis.comparisons import best_of_many
from experiments.sweep.analysis.scales import setting_text
from experiments.sweep.analysis.settings import by_setting, candidates_of, group
from experiments.sweep.objectives import direction
from experiments.words import counted
from train.clusters import cluster_ids, standard_error
from train.task_sets import ERROR, answers_path, task_of


@dataclass(frozen=True)
class TaskComparison:
    """The best setting by a task's metric, and which others its noise does not tell apart from it."""

    objective: str
    direction: str
    setting: dict[str, Any]
    mean: float
    """Of the best setting, over its seeds."""
    seeds: int
    candidates: int
    questions: int
    """Number of questions; 0 if no run has kept its answers."""
    clusters: int
    """Number of clusters of questions; questions in different clusters are independent."""
    item_error: float | None
    """Standard error of the best setting's value by the choice of questions, the mean over its runs."""
    seed_noise: float | None
    """Standard deviation of one run over seeds, pooled over settings; None without a second seed."""
    noise_freedom: int
    indistinguishable: list[dict[str, Any]] | None
    """Settings within the noise of the best; None if neither a second seed nor the answers are there."""
    signal_to_noise: float | None = None
    """The spread of the settings over the noise of the seeds; None of fewer than three settings or two seeds each."""
    signal_to_noise_interval: tuple[float, float] | None = None
    """95 %, from resampled settings."""
    variance_shares: dict[str, float | None] | None = None
    """The shares of seeds, questions and both in the variance of the best setting; None without a second seed."""

    @property
    def sentence(self) -> str:
        """The comparison in a few sentences."""
        best = "highest" if self.direction == "maximize" else "lowest"
        where = setting_text(self.setting) or "the only setting"
        said = f"The {best} {self.objective}, {self.mean:.4f}, is that of {where}"
        others = self.candidates - 1
        if others and self.indistinguishable is None:
            said += "; without a second seed it is not known how sure that is"
        elif others and self.indistinguishable is not None:
            equal = len(self.indistinguishable)
            if equal == others:
                said += f"; the {'other one' if equal == 1 else f'{equal} others'} cannot be distinguished from it"
            elif equal:
                said += f"; {equal} of {others} others cannot be distinguished from it"
            else:
                said += "; every other is worse by more than the noise"
        noise = []
        if self.item_error is not None:
            noise.append(f"{self.item_error:.4f} by its {counted(self.questions, 'question')} (standard error)")
        if self.seed_noise is not None:
            noise.append(f"{self.seed_noise:.4f} by the seed of one run")
        said = f"{said}. Its noise: {', '.join(noise)}." if noise else f"{said}."
        if self.signal_to_noise is not None and self.signal_to_noise_interval is not None:
            low, high = self.signal_to_noise_interval
            said += (
                f" Signal-to-noise over {self.candidates} settings: {self.signal_to_noise:.1f} (95 %: {low:.1f} … "
                f"{high:.1f})."
            )
        return said

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True, eq=False)
class _Answers:
    """Values of the questions in the runs of one setting, and the questions' clusters (`cluster_ids`)."""

    ids: list[str]
    by_run: Float[np.ndarray, "runs questions"]
    clusters: Int[np.ndarray, " questions"] | None

    @property
    def values(self) -> Float[np.ndarray, " questions"]:
        """Means over the runs."""
        return self.by_run.mean(axis=0)

    @property
    def independent(self) -> int:
        """The number of clusters, or of questions without any."""
        return len(self.values) if self.clusters is None else len(np.unique(self.clusters))


def compare_by_task(
    folder: Path, names: Sequence[str], rows: Sequence[dict[str, Any]], objective: str
) -> TaskComparison | None:
    """Return the comparison of the settings by TASK/METRIC; None if no candidate has a value.

    folder: of the sweep, whose runs keep their answers. A setting cannot be distinguished from the best one if its mean
    is within `best_of_many` standard errors of the difference. Its variance adds that of the seeds, pooled over
    settings, and that of the questions: all runs answer the same ones, so that differences are taken question by
    question (Miller 2024, "Adding Error Bars to Evals"), and questions of a cluster count as dependent. Part of the
    seeds' variance is in both, which makes the comparison cautious.
    """
    allowed = {setting.key for setting in candidates_of(group(names, rows))}
    settings = {}
    for key, members in by_setting(names, rows).items():
        finished = [row for row in members if row["state"] == "finished"]
        if key in allowed and all(row[objective] is not None for row in finished):
            settings[key] = finished
    if not settings:
        return None
    runs = {key: np.array([row[objective] for row in members], float) for key, members in settings.items()}
    means = {key: float(values.mean()) for key, values in runs.items()}
    way = direction(objective)
    best = (max if way == "maximize" else min)(means, key=lambda key: means[key])
    noise, freedom = _pooled(list(runs.values()))
    answers = {key: _answers(folder, members, objective) for key, members in settings.items()}
    own = answers[best]
    signal = _signal(objective, list(runs.values()))
    errors = [row[f"{objective}{ERROR}"] for row in settings[best] if row.get(f"{objective}{ERROR}") is not None]
    near = [
        dict(zip(names, key, strict=False))
        for key in settings
        if key != best
        and _is_near(
            abs(means[key] - means[best]),
            0.0 if noise is None else noise**2 * (1 / len(runs[key]) + 1 / len(runs[best])),
            freedom,
            answers[key],
            own,
            len(settings) - 1,
        )
    ]
    return TaskComparison(
        objective=objective,
        direction=way,
        setting=dict(zip(names, best, strict=False)),
        mean=means[best],
        seeds=len(runs[best]),
        candidates=len(settings),
        questions=0 if own is None else len(own.values),
        clusters=0 if own is None else own.independent,
        item_error=float(np.mean(errors)) if errors else None,
        seed_noise=noise,
        noise_freedom=freedom,
        indistinguishable=None if noise is None and own is None else near,
        signal_to_noise=None if signal is None else signal.ratio,
        signal_to_noise_interval=None if signal is None else signal.ratio_interval,
        variance_shares=None if own is None else _variance_shares(own),
    )


def _signal(objective: str, runs: Sequence[Float[np.ndarray, " seeds"]]) -> TaskSignal | None:
    """Return the signal-to-noise ratio of the settings; a setting's final score is the mean over its seeds."""
    seeds = min(map(len, runs))
    if len(runs) < 3 or seeds < 2:
        return None
    repeated = np.stack([values[:seeds] for values in runs])
    return rank_tasks({objective: TaskScores(repeated.mean(1), repeated)})[0]


def _variance_shares(answers: _Answers) -> dict[str, float | None] | None:
    """Return the shares of seeds, questions and both in the variance of one answer."""
    seeds, questions = answers.by_run.shape
    if seeds < 2 or questions < 2 or not answers.by_run.var():
        return None
    return variance_parts(answers.by_run[:, :, None]).shares()


def _is_near(
    difference: float, seeds: float, freedom: int, answers: _Answers | None, best: _Answers | None, others: int
) -> bool:
    """Return whether a difference is within the noise.

    seeds: its variance by the seeds, of `freedom` degrees of freedom. others: number of settings beside the best.
    """
    questions, degrees = 0.0, freedom
    if answers is not None and best is not None and answers.ids == best.ids:
        error, own = standard_error(answers.values - best.values, best.clusters)
        if math.isfinite(error):
            questions = float(error) ** 2
            # Degrees of freedom of a sum of two estimated variances (Satterthwaite 1946).
            parts = (seeds**2 / freedom if freedom else 0.0) + questions**2 / own
            degrees = int((seeds + questions) ** 2 / parts) if parts else int(own)
    return difference <= best_of_many(others, max(1, min(degrees, 1000))) * math.sqrt(seeds + questions)


def _pooled(runs: Sequence[Float[np.ndarray, " seeds"]]) -> tuple[float | None, int]:
    """Return (standard deviation over seeds, degrees of freedom), pooled over settings."""
    freedom = sum(len(values) - 1 for values in runs)
    if not freedom:
        return None, 0
    return math.sqrt(sum(float(((values - values.mean()) ** 2).sum()) for values in runs) / freedom), freedom


def _answers(folder: Path, members: Sequence[Mapping[str, Any]], objective: str) -> _Answers | None:
    """Return the values of a setting's questions; None if a run has not kept its answers, or has other questions."""
    task, metric = task_of(objective), objective.rpartition("/")[2]
    documents = []
    for row in members:
        try:
            documents.append(json.loads(answers_path(folder / row["run"], task).read_text(encoding="utf-8")))
        except (OSError, ValueError):
            return None
    first = documents[0]
    if any(other["ids"] != first["ids"] for other in documents):
        return None
    values = np.array([document["metrics"][metric] for document in documents], float)
    return _Answers(first["ids"], values, cluster_ids(first["clusters"]))
