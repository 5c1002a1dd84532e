"""Estimate which hyperparameters matter, by published estimators, each with its uncertainty."""

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from experiments.sweep.analysis.ranking import BY_LOSS, Ranking
from experiments.sweep.analysis.scales import distinct, is_number, scale_of
from experiments.sweep.analysis.settings import by_setting
from experiments.words import counted

FEWEST = 10  # finished trials
_COST = "cost"  # what ranks, so that lower is better
WIDE = 0.5  # width of a share's interval from which the data carry almost no information on that axis
Rows = Sequence[Mapping[str, Any]]
Evaluate = Callable[[Any, int], dict[str, float]]


@dataclass(frozen=True)
class Importance:
    """The share of one axis in what an estimator measures; the shares of all axes add up to 1."""

    share: float
    interval_95: list[float]


@dataclass(frozen=True)
class Importances:
    """The importance of each axis by each estimator, or why that was refused."""

    ped_anova: dict[str, Importance] | str
    fanova: dict[str, Importance] | str

    @property
    def refused(self) -> dict[str, str]:
        """The reasons of the estimators that were refused, by name."""
        return {name: found for name, found in vars(self).items() if isinstance(found, str)}

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            name: {"refused": found} if isinstance(found, str) else {axis: asdict(one) for axis, one in found.items()}
            for name, found in vars(self).items()
        }


def importances(names: Sequence[str], rows: Rows, ranked: Ranking = BY_LOSS, *, draws: int = 25) -> Importances:
    """Return how much each axis matters for the loss, or for what ranks: shares that add up to 1, by estimator.

    rows: flat; those that were trained to the end count. PED-ANOVA (Watanabe et al. 2023) measures what distinguishes
    the best trials, here the best tenth but at least five. fANOVA (Hutter et al. 2014) explains the variance of
    the loss everywhere by a random forest; it needs scikit-learn and uses only axes that every trial has. Intervals:
    percentiles over bootstrap draws of settings, whose seeds stay together, since trials that differ only by seed
    are not independent. An estimator is refused if an interval is wider than 0.5 and no axis is clearly more important
    than all others.
    """
    found = [row for row in rows if row["state"] == "finished" and row[ranked.objective] is not None]
    finished = [{**row, _COST: ranked.cost(row[ranked.objective])} for row in found]
    refused = None
    if len(names) < 2:
        refused = "with fewer than two axes there is nothing to weigh"
    elif len(finished) < FEWEST:
        were = "was" if len(finished) == 1 else "were"
        refused = f"{counted(len(finished), 'trial')} {were} trained to the end; the estimators need at least {FEWEST}"
    elif any(row.get("member") is not None for row in finished):
        refused = "the members of a population changed their settings along their runs"
    elif len({row[_COST] for row in finished}) < 2:
        refused = "all losses are the same" if ranked.by_loss else f"{ranked.words} is the same in all trials"
    if refused:
        return Importances(refused, refused)
    distributions = _distributions(names, finished)
    everywhere = [name for name in names if all(row[name] is not None for row in finished)]
    ped_anova = _with_interval(names, finished, distributions, _ped_anova, draws)
    try:
        import sklearn  # noqa: F401 – Optuna's fANOVA imports it when it is used
    except ImportError:
        return Importances(ped_anova, "scikit-learn is not installed: pip install 'isoflop[search]'")
    if len(everywhere) < 2:
        return Importances(ped_anova, "fewer than two axes have a value in every trial")
    few = min(8, draws)  # a forest takes many times as long as PED-ANOVA
    return Importances(ped_anova, _with_interval(everywhere, finished, distributions, _fanova, few))


def _distributions(names: Sequence[str], rows: Rows) -> dict[str, Any]:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    found: dict[str, Any] = {}
    for name in names:
        values = distinct(row[name] for row in rows)
        if all(map(is_number, values)) and len(values) > 1:
            found[name] = FloatDistribution(float(values[0]), float(values[-1]), log=scale_of(values) == "log")
        else:
            found[name] = CategoricalDistribution(values)
    return found


def _with_interval(
    names: Sequence[str], rows: Rows, distributions: Mapping[str, Any], evaluate: Evaluate, draws: int
) -> dict[str, Importance] | str:
    groups = by_setting(names, rows).values()
    settings = [[_frozen(names, row, distributions) for row in members] for members in groups]
    share = _shares(names, evaluate(_study([trial for group in settings for trial in group]), 0))
    rng = np.random.default_rng(0)
    seen = []
    for draw in range(draws):
        picked = rng.integers(0, len(settings), len(settings))
        trials = [trial for i in picked for trial in settings[i]]
        seen.append(_shares(names, evaluate(_study(trials), draw + 1)))
    low, high = np.percentile([[drawn[name] for name in names] for drawn in seen], [2.5, 97.5], axis=0)
    found = {name: Importance(share[name], [float(low[i]), float(high[i])]) for i, name in enumerate(names)}
    return _nothing_told(found, len(settings)) if _is_vague(found) else found


def _is_vague(found: Mapping[str, Importance]) -> bool:
    """Return whether an interval is wide and the most important axis is uncertain."""
    bounds = sorted((axis.interval_95 for axis in found.values()), key=lambda interval: -interval[0])
    leads = all(bounds[0][0] > high for _, high in bounds[1:])
    return not leads and any(high - low > WIDE for low, high in bounds)


def _nothing_told(found: Mapping[str, Importance], settings: int) -> str:
    name, axis = max(found.items(), key=lambda item: item[1].interval_95[1] - item[1].interval_95[0])
    low, high = axis.interval_95
    return (
        f"{settings} settings do not tell: the share of {name} may be anything from {low:.2f} to {high:.2f} (95 %), "
        "and no axis is clearly more important than all others; more settings would narrow that, more seeds hardly"
    )


def _frozen(names: Sequence[str], row: Mapping[str, Any], distributions: Mapping[str, Any]) -> Any:
    from optuna.trial import create_trial

    has = [name for name in names if row[name] is not None]

    def number(value: Any) -> Any:
        return float(value) if is_number(value) else value

    def categorical(name: str) -> bool:
        return hasattr(distributions[name], "choices")

    return create_trial(
        params={name: row[name] if categorical(name) else number(row[name]) for name in has},
        distributions={name: distributions[name] for name in has},
        value=row[_COST],
    )


def _study(trials: Sequence[Any]) -> Any:
    import optuna

    optuna.logging.set_verbosity(optuna.logging.ERROR)
    study = optuna.create_study()
    study.add_trials(trials)
    return study


def _ped_anova(study: Any, seed: int) -> dict[str, float]:
    from optuna.importance import PedAnovaImportanceEvaluator

    count = len(study.get_trials(deepcopy=False))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the estimator is marked as experimental
        return PedAnovaImportanceEvaluator(target_quantile=min(0.5, max(0.1, 5 / count))).evaluate(study)


def _fanova(study: Any, seed: int) -> dict[str, float]:
    from optuna.importance import FanovaImportanceEvaluator

    return FanovaImportanceEvaluator(n_trees=16, max_depth=6, seed=seed).evaluate(study)


def _shares(names: Sequence[str], raw: Mapping[str, float]) -> dict[str, float]:
    total = sum(raw.get(name, 0.0) for name in names)
    return {name: float(raw.get(name, 0.0) / total) if total > 0 else 0.0 for name in names}
