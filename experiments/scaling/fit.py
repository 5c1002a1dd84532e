"""Fit one table by all estimators, and build the JSON document of `isoflop scaling fit --json`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import numpy as np

from experiments.scaling.forms.choose import SIMPLE_FORMS, FormChoice, choose
from experiments.scaling.forms.fit import fit_form
from experiments.scaling.law.intervals import Intervals, own_interval_warnings
from experiments.scaling.law.outliers import LEVEL, Outlier, screen_residuals
from experiments.scaling.law.parametric import ParametricFit, check_settings, fit_parametric
from experiments.scaling.law.problem import NAMES
from experiments.scaling.rows.table import Table
from experiments.scaling.valleys.isoflop import DEFAULT, METHODS, MINIMUM_VALID_DRAWS, IsoflopFit, fit_isoflop
from experiments.scaling.valleys.valley import group_budgets
from experiments.words import counted, is_or_are
from model.errors import InputError

SCHEMA_VERSION = 1
MANY_OUTLIERS = 0.1  # of the rows
FEW_ROWS = 20  # four per unknown
SMALL_FLOPS = 1e8  # of the largest run: 100 steps of a model that no one would fit
FAR_FROM_6ND = 100.0  # times: conventions of N and attention make less than ten
LARGE_LOSS = 15.0  # nats per token: a guess among 3 million tokens
FEW_BUDGETS = 4
FEW_FREEDOM = 8
HELD_OUT_SHARE = 0.1  # of the runs, by which forms are judged
CONVENTION = (
    "L = E + A·N^-alpha + B·D^-beta in nats per token; N parameters and D tokens as the table counts them; "
    "C = {flops} FLOPs; N* ∝ C^a, D* ∝ C^b; parametric a = beta/(alpha+beta); "
    "the parametric objective is the sum over runs of Huber_delta of natural-log residuals; "
    "intervals are percentile bootstrap, in per cent"
)


@dataclass(frozen=True)
class Fits:
    """Both estimators of one table. An unsupported one is None, with its reason in `refused`."""

    table: Table
    parametric: ParametricFit | None
    isoflop: IsoflopFit | None
    refused: dict[str, str]
    valleys: dict[str, IsoflopFit] = field(default_factory=dict)
    """The other ways to find a valley's minimum, "skewed" and "parabola"; `refused` calls them "isoflop.skewed" …"""

    @property
    def methods(self) -> dict[str, IsoflopFit]:
        """The fits by method of finding a valley's minimum, the default first, without refused ones."""
        return ({} if self.isoflop is None else {self.isoflop.method: self.isoflop}) | self.valleys

    @property
    def parametric_outliers(self) -> list[Outlier]:
        """The runs that screening left out of the parametric fit."""
        return [] if self.parametric is None else self.parametric.outliers

    def document(self) -> dict[str, Any]:
        """Return the JSON contract of `isoflop scaling fit`: plain numbers, strings, lists and dicts, no NaN."""
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
                "intervals": _intervals(fit.intervals),
            }
            outliers = self.parametric_outliers
            parametric["outliers"] = [run.to_dict() for run in outliers]
            parametric["warnings"] = parametric_warnings(fit, outliers)
        if self.isoflop is not None:
            isoflop = self._isoflop(self.isoflop, "isoflop.intervals")
            isoflop["methods"] = {
                name: self._isoflop(fit, "isoflop.intervals" if fit is self.isoflop else f"isoflop.{name}.intervals")
                for name, fit in self.methods.items()
            }
        return {
            "schema_version": SCHEMA_VERSION,
            "convention": CONVENTION.format(flops=flops),
            "parametric": parametric,
            "isoflop": isoflop,
            "dropped": [row.to_dict() for row in self.table.dropped],
            "refused": self.refused,
        }

    def _isoflop(self, iso: IsoflopFit, refusal: str) -> dict[str, Any]:
        refused = refusal in self.refused
        return {
            "a": iso.a,
            "b": iso.b,
            "params_coefficient": iso.params_coefficient,
            "tokens_coefficient": iso.tokens_coefficient,
            "optima": [best.to_dict() for best in iso.optima],
            "rejected": [budget.to_dict() for budget in iso.rejected],
            "bootstraps": iso.bootstraps,
            "broken_draws": None if refused else iso.broken_draws,
            "seed": iso.seed,
            "intervals": {} if refused else _intervals(iso.intervals),
            "method": iso.method,
            "outliers": [run.to_dict() for run in iso.outliers],
            "warnings": isoflop_warnings(iso, intervals=not refused),
        }


def _intervals(intervals: Intervals) -> dict[str, dict[str, list[float | None]]]:
    """Return levels as strings; a bound that no draw gave (infinite, NaN) is null, which JSON can hold."""
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
    screen: bool = False,
    advance: Callable[..., None] | None = None,
) -> Fits:
    """Return both fits with their bootstraps done; `advance(share, what)` reports progress.

    screen: leave gross outliers out and list them; by default every usable run enters.
    """
    check_settings(delta, bootstraps)
    tell = advance or (lambda *_: None)
    parametric = None
    refused = {}
    try:
        parametric = fit_parametric(
            table.params, table.tokens, table.loss, delta=delta, bootstraps=bootstraps, seed=seed, screen=screen
        )
        parametric.bootstrap(lambda draws: tell(draws / bootstraps, "the law's bootstrap"))
    except InputError as error:
        refused["parametric"] = str(error)
    found: dict[str, IsoflopFit] = {}
    for method in (DEFAULT, *(other for other in METHODS if other != DEFAULT)):
        key = "isoflop" if method == DEFAULT else f"isoflop.{method}"
        tell(1 / len(METHODS), f"valleys, {method}")
        try:
            found[method] = fit_isoflop(
                params=table.params,
                tokens=table.tokens,
                loss=table.loss,
                flops=table.flops,
                bootstraps=bootstraps,
                seed=seed,
                method=method,
                screen=screen,
            )
        except InputError as error:
            refused[key] = str(error)
            if method == DEFAULT:  # the other methods fail for the same reasons
                break
            continue
        try:
            _ = found[method].draws
        except InputError as error:
            refused[f"{key}.intervals"] = str(error)
    isoflop = found.pop(DEFAULT, None)
    return Fits(table, parametric, isoflop, refused, found)


def choose_form(
    fits: Fits, forms: Sequence[str] = SIMPLE_FORMS, *, delta: float = 1e-3, bootstraps: int = 100, seed: int = 0
) -> FormChoice:
    """Choose between forms, without the gross outliers of the best-fitting one.

    Outliers would dominate a mean square; but runs that only some forms cannot explain (with repeated data, say) are
    evidence and stay. As many of the largest budgets are held out as make a tenth of the runs: the error of one run is
    too little evidence on a form. Raises InputError as `choose` does.
    """
    table, out = fits.table, _outliers(fits, forms, delta)
    runs = zip(table.params.tolist(), table.tokens.tolist(), table.loss.tolist(), strict=True)
    keep = np.array([run not in out for run in runs])
    kept = {column.name: getattr(table, column.name) for column in fields(table)}
    kept = {name: values[keep] for name, values in kept.items() if isinstance(values, np.ndarray)}
    flops = kept["flops"] if "flops" in kept else 6 * kept["params"] * kept["tokens"]
    sizes = [len(group) for group in group_budgets(flops)]
    hold_out = 1
    if len(sizes) <= len(flops) / 2:  # else the runs share no budgets, and `choose` forms groups
        enough = np.cumsum(sizes[::-1]) >= HELD_OUT_SHARE * len(flops)
        hold_out = min(int(enough.argmax()) + 1, max(len(sizes) - 2, 1))
    return choose(kept, forms, hold_out=hold_out, delta=delta, bootstraps=bootstraps, seed=seed)


def _outliers(fits: Fits, forms: Sequence[str], delta: float) -> set[tuple[float, ...]]:
    """Return (params, tokens, loss) of the outliers of the law, or of the form with the lowest objective."""
    out: set[tuple[float, ...]] = {(run.params, run.tokens, run.loss) for run in fits.parametric_outliers}
    if not out:
        return out
    found = []
    for name in forms:
        try:
            found.append(fit_form(name, fits.table, delta=delta, bootstraps=1))
        except InputError:  # `choose` raises again, with the reason
            continue
    best = min(found, key=lambda fit: fit.objective, default=None)
    if best is None or best.form.frontier or best.form.name == "chinchilla":
        return out
    columns = best.rows.columns
    keep = screen_residuals(best.residuals, np.ones(len(best.rows), bool), len(best.form.unknowns))
    return set(zip(*(columns[name][~keep].tolist() for name in ("params", "tokens", "loss")), strict=True))


def table_warnings(table: Table) -> list[str]:
    """Return warnings about numbers that seem to be in other units than counts and nats."""
    found = []
    compute = 6 * table.params * table.tokens
    if len(table) and compute.max() < SMALL_FLOPS:
        found.append(f"the largest run has 6·N·D = {compute.max():.3g} FLOPs: are N and D in millions or billions?")
    if len(table) and table.flops is not None:
        ratio = float(np.median(table.flops / compute))
        if not 1 / FAR_FROM_6ND < ratio < FAR_FROM_6ND:
            found.append(f"C is {ratio:.3g} times 6·N·D: is one of the three in millions or billions?")
    if len(table) and table.loss.max() > LARGE_LOSS:
        found.append(f"losses reach {table.loss.max():.3g} nats per token: is it perplexity, or a sum?")
    return found


def parametric_warnings(fit: ParametricFit, outliers: Sequence[Outlier] = ()) -> list[str]:
    """Return the caveats of its numbers if `outliers` were left out."""
    found = []
    rows = len(fit.table) + len(outliers)
    if len(outliers) > MANY_OUTLIERS * rows:
        found.append(
            f"{len(outliers)} of {counted(rows, 'run')} {is_or_are(len(outliers))} left out as "
            "outliers: so many speak against the law rather than "
            "against themselves; another form may hold"
        )
    largest = 6 * max(fit.table.params * fit.table.tokens)
    beyond = [6 * run.params * run.tokens for run in outliers if 6 * run.params * run.tokens > largest]
    if beyond:
        found.append(
            f"the law is fitted up to {largest:.3g} FLOPs: {len(beyond)} larger, up to {max(beyond):.3g}, "
            f"{is_or_are(len(beyond))} left out as off it, which speaks against it there"
        )
    if not fit.screened:
        found += _count_outliers(fit)
    if len(fit.table) < FEW_ROWS:
        found.append(
            f"{counted(len(fit.table), 'run')} for five unknowns: with fewer than {FEW_ROWS} "
            "the intervals' coverage is uncertain"
        )
    if fit.E == 0:
        found.append("the floor E faded to zero: these runs do not show one")
    if fit.bootstraps >= MINIMUM_VALID_DRAWS:
        found += own_interval_warnings({name: getattr(fit, name) for name in (*NAMES, "a", "b")}, fit.intervals)
    return found


def _count_outliers(fit: ParametricFit) -> list[str]:
    """Return the number of fitted runs that screening would call outliers, if chance alone would give fewer."""
    rows = len(fit.table)
    far = ~screen_residuals(fit.residuals, np.ones(rows, bool), len(NAMES))
    if far.sum() <= 10 * LEVEL * rows:
        return []
    error = 100 * np.expm1(-fit.residuals[far])
    worst = error[np.abs(error).argmax()]
    which = f"{far.sum():,} of {counted(rows, 'run')} {is_or_are(far.sum())}"
    return [
        f"{which} off the law by more than noise explains, by up to {worst:+.1f} %; every run is in "
        "the fit, and --screen leaves such runs out and shows both answers"
    ]


def isoflop_warnings(fit: IsoflopFit, intervals: bool = True) -> list[str]:
    """Return the caveats of its numbers. intervals: whether it has any."""
    found = []
    budgets = len(fit.accepted)
    if budgets < FEW_BUDGETS:
        found.append(f"{counted(budgets, 'budget')}: a straight line through so few hides how far from straight it is")
    runs = sum(len(valley.loss) for valley in fit.accepted)
    if runs - 3 * budgets < FEW_FREEDOM:
        found.append(
            f"{counted(runs - 3 * budgets, 'run')} more than the curves of "
            f"{counted(budgets, 'budget')} use up: too few to know the noise, "
            "so the intervals are uncertain"
        )
    if intervals and fit.bootstraps >= MINIMUM_VALID_DRAWS:
        found += own_interval_warnings({"a": fit.a, "b": fit.b}, fit.intervals)
    return found
