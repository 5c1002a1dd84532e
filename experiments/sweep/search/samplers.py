"""Create Optuna's samplers by name, and describe a space by Optuna's distributions."""

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from model.errors import InputError, UnknownNameError

if TYPE_CHECKING:
    from optuna import Trial
    from optuna.samplers import BaseSampler

    from experiments.sweep.space import Distribution

SAMPLERS = ("random", "quasirandom", "tpe", "gp", "cmaes", "nsga2")


def make_sampler(name: str, seed: int, directions: Sequence[str] = ("minimize",), drawn: int = 0) -> "BaseSampler":
    """Return the sampler of that name. directions: of the objectives.

    random; quasirandom: a scrambled Sobol sequence; tpe: multivariate, running trials counted as bad, conditional
    branches in groups (Bergstra et al. 2011); gp: a Gaussian process (needs torch); cmaes (Hansen 2016); nsga2: for
    several objectives (Deb et al. 2002). drawn: how many points the study has: two processes with one seed, or one
    that starts again, then do not draw the same points. Raises UnknownNameError or InputError.
    """
    if name not in SAMPLERS:
        raise UnknownNameError("sampler", name, SAMPLERS)
    for needing, package in (("gp", "torch"), ("cmaes", "cmaes")):
        if name == needing and importlib.util.find_spec(package) is None:
            raise InputError(f"--sampler {name} needs {package}; install the extra: pip install 'isoflop[search]'")
    if name == "cmaes" and len(directions) > 1:
        raise InputError(f"--sampler cmaes is for one objective, not {len(directions)}; take nsga2, tpe or gp")
    if name == "nsga2" and len(directions) == 1:
        raise InputError("--sampler nsga2 is for several objectives; for one take tpe, gp or cmaes")
    return _build(name, seed, drawn)


def check_axes(name: str, axes: "Mapping[str, Distribution]") -> None:
    """Raise InputError if the sampler cannot search these axes."""
    from experiments.sweep.space import Interval

    lists = [axis for axis, distribution in axes.items() if not isinstance(distribution, Interval)]
    if name == "cmaes" and lists:
        raise InputError(f"--sampler cmaes searches intervals; give {lists[0]} as loguniform:LOW:HIGH or take tpe")


def to_category(value: Any) -> bool | int | float | str | None:
    """Return a value as Optuna can store it: lists and objects are their JSON text."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else json.dumps(value, sort_keys=True)


def suggester(trial: "Trial") -> "Callable[[str, Distribution], Any]":
    """Return the `suggest` function for `Space.draw`, answered by the study's sampler."""

    def suggest(name: str, distribution: "Distribution") -> Any:
        from experiments.sweep.space import Interval

        if not isinstance(distribution, Interval):
            categories = [to_category(value) for value in distribution.values]
            return distribution.values[categories.index(trial.suggest_categorical(name, categories))]
        if distribution.integer:
            return trial.suggest_int(name, int(distribution.low), int(distribution.high), log=distribution.log)
        return trial.suggest_float(name, distribution.low, distribution.high, log=distribution.log)

    return suggest


def _build(name: str, seed: int, drawn: int) -> "BaseSampler":
    from optuna import samplers

    own = int.from_bytes(hashlib.sha256(f"{seed} {drawn}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Optuna marks options as experimental that have existed for years
        if name == "random":
            return samplers.RandomSampler(seed=own)
        if name == "quasirandom":  # continues in the study, and needs the same scrambling
            independent = samplers.RandomSampler(seed=own)
            return samplers.QMCSampler(
                scramble=True, seed=seed, independent_sampler=independent, warn_independent_sampling=False
            )
        if name == "tpe":
            return samplers.TPESampler(
                seed=own, multivariate=True, group=True, constant_liar=True, warn_independent_sampling=False
            )
        if name == "gp":
            import torch

            torch.set_num_threads(1)  # its matrices are small: threads cost it four times what they gain
            return samplers.GPSampler(seed=own, warn_independent_sampling=False)
        if name == "cmaes":
            return samplers.CmaEsSampler(seed=own, warn_independent_sampling=False)
        return samplers.NSGAIISampler(seed=own)
