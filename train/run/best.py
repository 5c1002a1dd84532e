"""Track the best value of a validation metric over the lines of a run's record."""

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any, Self

DEFAULT_METRIC = "validation_loss"


def metric_of(keep_best: bool | str) -> str:
    """Return the name of the metric by which a run's validations are compared."""
    return keep_best if isinstance(keep_best, str) else DEFAULT_METRIC


def improves(value: float | None, best: float | None, *, higher_is_better: bool = False) -> bool:
    """Return whether a value is better than the best so far; None and values that are not finite never are.

    best: None if there is none yet.
    """
    if value is None or not math.isfinite(value):
        return False
    if best is None:
        return True
    return value > best if higher_is_better else value < best


@dataclasses.dataclass(frozen=True)
class Best:
    """Best validation of a run up to a step.

    value, step: of the best validation; None and 0 while no value was finite. validated: the step of the latest
    validation. without: the number of validations since the best one, none of which improved on it.
    """

    metric: str
    higher_is_better: bool = False
    value: float | None = None
    step: int = 0
    validated: int = 0
    without: int = 0

    @classmethod
    def of(cls, metric: str, lines: Iterable[Mapping[str, Any]], *, higher_is_better: bool = False) -> Self:
        """Return the best validation among the lines of a record."""
        best = cls(metric, higher_is_better)
        for line in lines:
            best = best.after(line)
        return best

    def after(self, line: Mapping[str, Any]) -> Self:
        """Return the best validation after one more line."""
        if self.metric not in line:
            return self
        step, value = line["step"], line[self.metric]
        if improves(value, self.value, higher_is_better=self.higher_is_better):
            return dataclasses.replace(self, value=value, step=step, validated=step, without=0)
        return dataclasses.replace(self, validated=step, without=self.without + 1)
