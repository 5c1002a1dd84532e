"""Both fits of one table, and the JSON document that `isoflop scaling fit --json` writes."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from experiments.scaling.intervals import LEVELS, Intervals
from experiments.scaling.isoflop import IsoflopFit, fit_isoflop
from experiments.scaling.parametric import NAMES, ParametricFit, check_settings, fit_parametric
from experiments.scaling.table import Table
from model.errors import InputError

SCHEMA_VERSION = 1
CONVENTION = (
    "L = E + A·N^-alpha + B·D^-beta in nats per token; N parameters and D tokens as the table counts them; "
    "C = {flops} FLOPs; N* ∝ C^a, D* ∝ C^b; parametric a = beta/(alpha+beta); "
    "the parametric objective is the sum over runs of Huber_delta of natural-log residuals; "
    "intervals are percentile bootstrap, in per cent"
)


@dataclass(frozen=True)
class Fits:
    """Both estimators of one table. One that the table cannot carry is None, with its reason in `refused`."""

    table: Table
    parametric: ParametricFit | None
    isoflop: IsoflopFit | None
    refused: dict[str, str]

    def document(self, levels: Sequence[int | float] = LEVELS) -> dict[str, Any]:
        """The JSON contract of `isoflop scaling fit`: plain numbers, strings, lists and dicts, no NaN."""
        flops = "6·N·D" if self.table.flops is None else "the table's"
        parametric = isoflop = None
        if self.parametric is not None:
            fit = self.parametric
            parametric = {name: getattr(fit, name) for name in (*NAMES, "a", "b", "objective")} | {
                "starts": fit.starts,
                "starts_at_best": fit.starts_at_best,
                "gradient": fit.gradient,
                "delta": fit.delta,
                "rows": len(fit.table),
                "bootstraps": fit.bootstraps,
                "seed": fit.seed,
                "intervals": _intervals(fit.intervals_at(levels)),
            }
        if self.isoflop is not None:
            iso = self.isoflop
            refused = "isoflop.intervals" in self.refused
            isoflop = {
                "a": iso.a,
                "b": iso.b,
                "params_coefficient": iso.params_coefficient,
                "tokens_coefficient": iso.tokens_coefficient,
                "optima": iso.optima,
                "rejected": iso.rejected,
                "bootstraps": iso.bootstraps,
                "broken_draws": None if refused else iso.broken_draws,
                "seed": iso.seed,
                "intervals": {} if refused else _intervals(iso.intervals_at(levels)),
            }
        return {
            "schema_version": SCHEMA_VERSION,
            "convention": CONVENTION.format(flops=flops),
            "parametric": parametric,
            "isoflop": isoflop,
            "dropped": self.table.dropped,
            "refused": self.refused,
        }


def _intervals(intervals: Intervals) -> dict[str, dict[str, list[float | None]]]:
    """Levels as strings; a bound that no draw gave (infinite, NaN) is null, which JSON can hold."""
    return {
        name: {f"{level:g}": [bound if np.isfinite(bound) else None for bound in pair] for level, pair in by.items()}
        for name, by in intervals.items()
    }


def fit_both(
    table: Table,
    *,
    delta: float | int = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
) -> Fits:
    """Both fits with their bootstraps done, calling `advance(number of draws)` as they go."""
    check_settings(delta, bootstraps)
    parametric = isoflop = None
    refused = {}
    try:
        parametric = fit_parametric(
            table.params, table.tokens, table.loss, delta=delta, bootstraps=bootstraps, seed=seed
        )
        parametric.bootstrap(advance or (lambda *_, **__: None))
    except InputError as error:
        refused["parametric"] = str(error)
    try:
        isoflop = fit_isoflop(
            params=table.params,
            tokens=table.tokens,
            loss=table.loss,
            flops=table.flops,
            bootstraps=bootstraps,
            seed=seed,
        )
    except InputError as error:
        refused["isoflop"] = str(error)
    if isoflop is not None:
        try:
            _ = isoflop.draws
        except InputError as error:
            refused["isoflop.intervals"] = str(error)
    return Fits(table, parametric, isoflop, refused)


def fit_table(
    table: Table,
    *,
    delta: float | int = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    levels: Sequence[int | float] = LEVELS,
) -> dict[str, Any]:
    """Fit a table of runs both ways and return the JSON document; see `Fits.document`."""
    return fit_both(table, delta=delta, bootstraps=bootstraps, seed=seed).document(levels)
