"""The summary of a sweep as plain data, and the document that holds it."""

from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from experiments.sweep.analysis.executions import ExecutionComparison, ExecutionSpeed
from experiments.sweep.analysis.optimum import RateOptimum
from experiments.sweep.analysis.ranking import BY_LOSS, Ranking, ranking
from experiments.sweep.analysis.rungs import Stretch
from experiments.sweep.analysis.settings import Setting, Stopped
from experiments.sweep.objectives import LOSS

SCHEMA_VERSION = 1


@dataclass(frozen=True)
class Winner:
    """The setting with the best mean among those that were trained to the end."""

    setting: dict[str, Any]
    member: str | None
    mean: float
    seeds: int
    candidates: int
    """Settings that were trained to the end; one that lost a run to divergence or of which only a part was pruned is no
    candidate."""
    interval_95: list[float] | None
    """The interval of the mean, which allows for the choice among many. None without an estimate of the noise."""
    indistinguishable: list[dict[str, Any]] | None
    """The other candidates that cannot be told apart from it: with the winner they hold the best of the candidates with
    95 % probability (see `comparisons.py`)."""
    lineage: list[Stretch] | None
    """The settings of a winner that changed along its run, as in a population; otherwise None."""
    tied: list[dict[str, Any]] = field(default_factory=list)
    """The other candidates with the same mean of another objective than the loss: of few examples many are as accurate.
    The winner is the first one."""


@dataclass(frozen=True)
class Summary:
    """The settings of a sweep, the best of them, and the seed noise."""

    axes: dict[str, list[Any]]
    """The values tried, by name."""
    trials: list[dict[str, Any]]
    """Flat rows with every axis, seed, loss and state."""
    settings: list[Setting]
    """Runs that diverged, were pruned, failed or are pending never enter a mean."""
    counts: dict[str, int]
    """Trials by state."""
    winner: Winner | None
    seed_noise: float | None
    """The standard deviation of one run over seeds, pooled over the settings within 0.5 nats of the best, where it
    matters."""
    noise_freedom: int
    optimum: RateOptimum | None
    optimum_refused: str | None
    """The reason why there is no optimum, if the learning rate is an axis."""
    executions: ExecutionComparison | None
    """The comparison of the executions; None if no field of Execution varies."""
    warnings: list[str]
    ranking: Ranking = BY_LOSS
    """The objective of the means, of the winner, its noise and its equals."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "schema_version": SCHEMA_VERSION,
            "axes": self.axes,
            "trials": self.trials,
            "settings": [setting.to_dict() for setting in self.settings],
            "counts": self.counts,
            "winner": None if self.winner is None else asdict(self.winner),
            "seed_noise": self.seed_noise,
            "noise_freedom": self.noise_freedom,
            "optimum": None if self.optimum is None else asdict(self.optimum),
            "optimum_refused": self.optimum_refused,
            "executions": None if self.executions is None else self.executions.to_dict(),
            "warnings": self.warnings,
            "ranked_by": self.ranking.objective,
        }

    @classmethod
    def from_dict(cls, document: Mapping[str, Any]) -> "Summary":
        """Return the summary of a document that `to_dict` made, also in a version without members and executions."""
        axes, winner, executions = document["axes"], document["winner"], document.get("executions")
        if winner is not None:
            lineage = winner.get("lineage")
            parts = None if lineage is None else [Stretch(**part) for part in lineage]
            winner = {"member": None} | winner | {"lineage": parts}
        if executions is not None:
            speeds = [ExecutionSpeed(**row) for row in executions["executions"]]
            executions = ExecutionComparison(**executions | {"executions": speeds})
        return cls(
            axes=axes,
            trials=document["trials"],
            settings=[_setting(axes, row) for row in document["settings"]],
            counts=document["counts"],
            winner=None if winner is None else Winner(**winner),
            seed_noise=document["seed_noise"],
            noise_freedom=document["noise_freedom"],
            optimum=None if document["optimum"] is None else RateOptimum(**document["optimum"]),
            optimum_refused=document["optimum_refused"],
            executions=executions,
            warnings=document["warnings"],
            ranking=replace(ranking(axes), objective=document.get("ranked_by", LOSS)),
        )


def _setting(axes: Iterable[str], row: Mapping[str, Any]) -> Setting:
    """Return the setting that a row of a document has."""
    values = {name: row[name] for name in axes}
    about = {name: value for name, value in row.items() if name not in values}
    stopped = row.get("stopped")
    return Setting(values, **{"member": None} | about | {"stopped": None if stopped is None else Stopped(**stopped)})
