"""Choose the objective that ranks the settings of a sweep: the loss, unless losses cannot be compared."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.sweep.analysis.scales import distinct
from experiments.sweep.objectives import FORGETTING, LOSS, direction
from train.config import LOSS_SHAPING
from train.task_sets import is_task_metric

_OF_OBJECTIVES = (
    "objective",
    *(f"objective.{name}" for name in ("name", "kind", "divergence", "weighting", "margins")),
    *(f"objective.{name}" for name in ("masked", "random", "evaluation_rate", "rate", "mean_span")),
)
"""Axes that define what the loss is, and of masks and spans what a validation predicts."""
_COMPARABLE = ("accuracy", FORGETTING)
_OF_REWARDS = ("margin", "chosen_reward")
_SCALES_REWARDS = ("beta", "ld_alpha", *_OF_OBJECTIVES)


@dataclass(frozen=True)
class Ranking:
    """The objective by which settings are compared. Its values are compared as `cost`, where lower is better."""

    objective: str = LOSS
    shaping: tuple[str, ...] = ()
    """The axes at whose values losses are different functions."""

    @property
    def by_loss(self) -> bool:
        """Whether the loss ranks."""
        return self.objective == LOSS

    @property
    def highest(self) -> bool:
        """Whether higher values are better."""
        return direction(self.objective) == "maximize"

    @property
    def best(self) -> str:
        """The word for the best value: lowest or highest."""
        return "highest" if self.highest else "lowest"

    @property
    def words(self) -> str:
        """The name of the objective as text."""
        return self.objective.replace("_", " ")

    def cost(self, value: float) -> float:
        """Return a value so that lower is better."""
        return -value if self.highest else value

    def reason(self) -> str:
        """Return why another objective than the loss ranks; "" if the loss does."""
        if self.by_loss:
            return ""
        return (
            f"Losses at different {' or '.join(self.shaping)} are different functions: settings are ranked by "
            f"{self.words}."
        )

    def warning(self) -> str:
        """Return a warning if the loss ranks settings whose losses are different functions, otherwise ""."""
        if not (self.by_loss and self.shaping):
            return ""
        return (
            f"losses at different {' or '.join(self.shaping)} are different functions: compare these settings by an "
            "objective such as accuracy"
        )


BY_LOSS = Ranking()


def ranking(axes: Mapping[str, Iterable[Any]], objectives: Sequence[str] = (LOSS,)) -> Ranking:
    """Return what ranks settings: the loss, or the first objective that is comparable where losses are not.

    axes: name → the values tried. objectives: of the sweep, in the user's order. Accuracy, forgetting and the metrics
    of tasks are comparable everywhere, rewards and their margin only where nothing varies that scales them, such as β.
    Speeds never rank.
    """
    varied = [name for name, values in axes.items() if len(distinct(values)) > 1]
    shaping = tuple(name for name in varied if name in LOSS_SHAPING or name in _OF_OBJECTIVES)
    if not shaping:
        return BY_LOSS
    comparable = _COMPARABLE if set(varied) & set(_SCALES_REWARDS) else (*_COMPARABLE, *_OF_REWARDS)
    compares = (name for name in objectives if name in comparable or is_task_metric(name))
    return Ranking(next(compares, LOSS), shaping)
