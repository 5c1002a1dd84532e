"""Describe the points of a grid as Optuna parameters, so that its dashboard and importances can read a sweep.

Optuna lets the bounds of a number differ between trials of a study, but neither its kind nor its scale, nor the choices
of a category: a value that does not fit what the study has of that name is stored in the trial only.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from experiments.sweep.search.samplers import to_category


class Known:
    """The distributions of a study's parameters, and of those that `points` bring.

    trials: Optuna's, of the study. Numbers are logarithmic where all are positive and span a factor of ten.
    """

    def __init__(self, trials: Iterable[Any], points: Iterable[Mapping[str, Any]]):
        self._distributions: dict[str, Any] = {}
        for trial in trials:
            self._distributions |= trial.distributions
        values: dict[str, list[Any]] = {}
        for point in points:
            for name, value in point.items():
                if name != "seed":
                    values.setdefault(name, []).append(to_category(value))
        for name, own in values.items():
            self._distributions[name] = _widened(self._distributions.get(name), own)

    def describe(self, point: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        """Return the parameters of a point, and their distributions. Seeds are not parameters: they give replicates."""
        params = {
            name: to_category(value)
            for name, value in point.items()
            if name != "seed" and _fits(self._distributions[name], to_category(value))
        }
        return params, {name: self._distributions[name] for name in params}


def _widened(known: Any, values: list[Any]) -> Any:
    """Return a distribution that holds the values, and is compatible with the known one."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if isinstance(known, CategoricalDistribution):
        return known
    if not all(_is_number(value) for value in values):
        return known or CategoricalDistribution(list({(type(value), value): value for value in values}.values()))
    low, high = min(values), max(values)
    whole, log = all(isinstance(value, int) for value in values), low > 0 and high >= 10 * low
    if known is not None:
        whole, log = isinstance(known, IntDistribution), known.log
        fitting = [value for value in values if not (log and value <= 0) and not (whole and value != int(value))]
        low, high = min([known.low, *fitting]), max([known.high, *fitting])
    return IntDistribution(int(low), int(high), log=log) if whole else FloatDistribution(low, high, log=log)


def _fits(distribution: Any, value: Any) -> bool:
    from optuna.distributions import CategoricalDistribution, IntDistribution

    if isinstance(distribution, CategoricalDistribution):
        return any(type(value) is type(choice) and value == choice for choice in distribution.choices)
    if not _is_number(value) or (isinstance(distribution, IntDistribution) and value != int(value)):
        return False
    return distribution.low <= value <= distribution.high


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
