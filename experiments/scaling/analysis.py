"""Analyse the scaling laws of a table of runs: every estimator, a choice of form, and warnings."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from experiments.scaling.envelope import EnvelopeFit, fit_envelope
from experiments.scaling.fit import Fits, choose_form, fit_both, isoflop_warnings, parametric_warnings, table_warnings
from experiments.scaling.forms.choose import FormChoice, forms_for
from experiments.scaling.law.intervals import Intervals, own_interval_warnings
from experiments.scaling.law.outliers import Outlier
from experiments.scaling.law.parametric import ParametricFit
from experiments.scaling.rows.conventions import ConventionTable, Counts, conventions
from experiments.scaling.rows.curves import TrainingCurve
from experiments.scaling.rows.table import Table
from experiments.scaling.valleys.isoflop import DEFAULT, METHODS, MINIMUM_VALID_DRAWS, IsoflopFit
from experiments.words import counted
from model.errors import InputError

_FEWER = 100  # resamples for the choice between forms and for the table of conventions, which refit many times as often
_LEVEL = 95
STAGES = 6  # the law with its bootstrap, the valleys, the envelope, the forms (2: the longest), conventions

NAMES = {
    "parametric": "parametric law",
    "isoflop": f"IsoFLOP valleys, {DEFAULT}",
    **{f"isoflop.{name}": f"IsoFLOP valleys, {name}" for name in METHODS},
    "envelope": "envelope of training curves",
}
"""Names of estimators in text."""


Interval = tuple[float, float]


@dataclass(frozen=True)
class Exponents:
    """An estimator's exponents, N* ∝ C^a and D* ∝ C^b."""

    estimator: str
    """A key of `NAMES`."""
    a: float
    b: float
    runs: int
    """The number of runs in the fit, or of crossings for the envelope."""
    intervals: dict[str, Interval] | None
    """{"a": (low, high), "b": (low, high)} at 95 %; None if they are not known."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a table."""
        return asdict(self)


@dataclass(frozen=True)
class LeftOut:
    """A row that no estimator saw, or a run that one estimator took for a gross outlier."""

    row: int | None
    """Its number in the table, where that is known."""
    run: Outlier | None
    """None for a row that no estimator saw."""
    estimator: str
    """A key of `NAMES`, or "all"."""
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for a table: the numbers of a row that no estimator saw are None."""
        numbers = {name: getattr(self.run, name, None) for name in ("params", "tokens", "loss")}
        return {"row": self.row} | numbers | {"estimator": self.estimator, "reason": self.reason}


@dataclass(frozen=True)
class Remark:
    """A warning that belongs to the numbers."""

    about: str
    """A key of `NAMES`, or another name."""
    text: str

    def to_dict(self) -> dict[str, str]:
        """Return plain values for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class Analysis:
    """The fits of one table. A refused fit is None, with its reason in `refused`; one that was not requested is None.

    held_out: the document of `held_out.compare`. notes: on the runs.
    """

    fits: Fits
    envelope: EnvelopeFit | None
    choice: FormChoice | None
    conventions: ConventionTable | None
    held_out: dict[str, Any] | None
    refused: dict[str, str]
    notes: Sequence[str] = ()
    unscreened: Fits | None = None
    """The fits to all runs, for comparison with the screened fits; None if nothing was screened."""

    @property
    def exponents(self) -> list[Exponents]:
        """The exponents of every estimator that answers."""
        found = _exponents_of(self.fits)
        if self.envelope is not None:
            try:
                intervals = self.envelope.intervals
            except InputError:
                intervals = None
            found.append(_exponents("envelope", self.envelope, intervals, len(self.envelope.crossings)))
        return found

    @property
    def unscreened_exponents(self) -> list[Exponents]:
        """The `exponents` of the law and the valleys with every run; empty if nothing was screened."""
        return [] if self.unscreened is None else _exponents_of(self.unscreened)

    @property
    def valleys(self) -> dict[str, IsoflopFit]:
        """By method ("spline", "skewed", "parabola"), those that have resamples."""
        names = {"isoflop": self.fits.isoflop} | {f"isoflop.{name}": fit for name, fit in self.fits.valleys.items()}
        return {
            fit.method: fit
            for name, fit in names.items()
            if fit is not None and f"{name}.intervals" not in self.refused
        }

    @property
    def left_out(self) -> list[LeftOut]:
        """The rows that were dropped before fitting (without numbers), and gross outliers of single estimators."""
        fits, table = self.fits, self.fits.table
        found = [LeftOut(drop.row, None, "all", drop.reason) for drop in table.dropped]
        runs = zip(table.params.tolist(), table.tokens.tolist(), table.loss.tolist(), strict=True)
        rows = dict(zip(runs, table.rows, strict=True))
        outliers = {"parametric": fits.parametric_outliers}
        outliers |= {"isoflop": fits.isoflop.outliers} if fits.isoflop is not None else {}
        outliers |= {f"isoflop.{name}": fit.outliers for name, fit in fits.valleys.items()}
        for estimator, runs_out in outliers.items():
            for run in runs_out:
                row = rows.get((run.params, run.tokens, run.loss))
                found.append(LeftOut(row, run, estimator, run.reason))
        return found

    @property
    def thinned(self) -> list[str]:
        """Return what was done with fewer rows than the table has, and why, in words."""
        fits = (self.fits.parametric, self.fits.isoflop, *self.fits.valleys.values(), self.choice)
        found = [fit.thinned for fit in fits if fit is not None]
        return list(dict.fromkeys(text for text in found if text is not None))

    @property
    def warnings(self) -> list[Remark]:
        """The caveats of the numbers."""
        fits = self.fits
        found = [("table", text) for text in (*table_warnings(fits.table), *self.notes)]
        if fits.parametric is not None:
            found += [("parametric", text) for text in parametric_warnings(fits.parametric, fits.parametric_outliers)]
            found += [("parametric", text) for text in _outside(fits.parametric)]
        if fits.isoflop is not None:
            known = "isoflop.intervals" not in self.refused
            found += [("isoflop", text) for text in isoflop_warnings(fits.isoflop, known)]
        if self.envelope is not None:
            found += [("envelope", text) for text in self.envelope.warnings]
        found += self._outside_own_intervals()
        found += [("estimators", text) for text in self._disagreements()]
        if self.choice is not None and fits.parametric is not None:
            scores = {score.form: score for score in self.choice.scores}
            excess = scores["chinchilla"].excess if "chinchilla" in scores else None
            if excess is not None and excess[0] > 0:
                text = f"{self.choice.winner} predicts held-out budgets better than this law, beyond noise"
                found.append(("parametric", text))
        return [Remark(about, text) for about, text in found]

    def _outside_own_intervals(self) -> list[tuple[str, str]]:
        """Return (about, text) of estimates outside their own intervals, except the law and the default valleys."""
        fits = [fit for fit in (self.fits.parametric, self.fits.isoflop, self.envelope) if fit is not None]
        if min(fit.bootstraps for fit in fits) < MINIMUM_VALID_DRAWS:
            return []
        found = []
        for row in self.exponents:
            if row.estimator not in {"parametric", "isoflop"} and row.intervals is not None:
                intervals: Intervals = {name: {_LEVEL: pair} for name, pair in row.intervals.items()}
                if row.estimator != "envelope":
                    intervals = self.fits.valleys[row.estimator.removeprefix("isoflop.")].intervals
                values = {"a": row.a, "b": row.b}
                found += [(row.estimator, text) for text in own_interval_warnings(values, intervals)]
        for name, fit in ({} if self.choice is None else self.choice.fits).items():
            found += [(f"form {name}", text) for text in own_interval_warnings(fit.values, fit.intervals)]
        for convention in [] if self.conventions is None else self.conventions.rows:
            for estimator, law in (("parametric", convention.parametric), ("isoflop", convention.isoflop)):
                if law is not None and law.intervals is not None:
                    about = f"{estimator}, N {convention.params}, C {convention.flops}"
                    texts = own_interval_warnings({"a": law.a, "b": law.b}, law.intervals)
                    found += [(about, text) for text in texts]
        return found

    def _disagreements(self) -> list[str]:
        rows = [(row, row.intervals["a"]) for row in self.exponents if row.intervals is not None]
        apart = []
        for i, (one, (low, high)) in enumerate(rows):
            for other, (bottom, top) in rows[i + 1 :]:
                if high < bottom or top < low:
                    apart.append(
                        f"{one.estimator} has a = {one.a:.3f} ({low:.3f} … {high:.3f}), {other.estimator} "
                        f"{other.a:.3f} ({bottom:.3f} … {top:.3f}): their {_LEVEL} % intervals do not meet"
                    )
        return apart

    def _laws(self) -> dict[str, Any]:
        fits = {} if self.choice is None else self.choice.fits
        return {name: fit.document() for name, fit in fits.items()}

    def document(self) -> dict[str, Any]:
        """Return plain values: `Fits.document`, and envelope, forms, conventions, held_out, warnings."""
        return self.fits.document() | {
            "envelope": None if self.envelope is None else self.envelope.document(),
            "forms": None if self.choice is None else self.choice.document() | {"fits": self._laws()},
            "conventions": None if self.conventions is None else self.conventions.to_dict(),
            "held_out": self.held_out,
            "warnings": [remark.to_dict() for remark in self.warnings],
            "refused": self.refused,
            "thinned": self.thinned,
            "unscreened": None if self.unscreened is None else self.unscreened.document(),
        }


def analyse(
    table: Table,
    *,
    counts: Counts | None = None,
    curves: Sequence[TrainingCurve] = (),
    held_out: dict[str, Any] | None = None,
    notes: Sequence[str] = (),
    forms: Sequence[str] | None = None,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    screen: bool = False,
    advance: Callable[..., None] | None = None,
) -> Analysis:
    """Fit a table by every estimator that it supports.

    counts: the same runs under other conventions of N and C; curves: their training curves, for approach 1; forms: to
    choose between, by default those of `forms_for`, () to skip that; screen: leave gross outliers out, and also fit all
    runs (by default every usable run enters); notes: warnings of the runs. advance(amount, note): called as stages
    finish; the amounts add up to `STAGES`.
    Raises InputError if no estimator answers.
    """
    if not len(table):
        count = len(table.dropped)
        first = f", such as row {table.dropped[0].row}: {table.dropped[0].reason}" if count else ""
        raise InputError(f"no run is left to fit; {counted(count, 'row was', 'rows were')} dropped{first}")
    forms = forms_for(table) if forms is None else forms
    tell = advance or (lambda *_, **__: None)
    tell(0, "the law")
    settings: dict[str, Any] = {"delta": delta, "bootstraps": bootstraps, "seed": seed}
    fits = fit_both(table, **settings, screen=screen, advance=tell)
    unscreened = fit_both(table, **settings) if screen else None
    refused = dict(fits.refused)

    def attempt(name: str, wanted: bool, fit: Callable[[], Any]) -> Any:
        tell(0, name)
        try:
            return fit() if wanted else None
        except InputError as error:
            refused[name] = str(error)
            return None
        finally:
            tell(2 if name == "forms" else 1, name)

    few = min(_FEWER, bootstraps)
    envelope = attempt("envelope", bool(curves), lambda: fit_envelope(curves, bootstraps=bootstraps, seed=seed))
    if fits.parametric is None and fits.isoflop is None and envelope is None:
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return Analysis(
        fits,
        envelope,
        attempt("forms", bool(forms), lambda: choose_form(fits, forms, delta=delta, bootstraps=few, seed=seed)),
        attempt("conventions", counts is not None, lambda: conventions(counts, bootstraps=few, seed=seed)),  # type: ignore[arg-type]
        held_out,
        refused,
        notes,
        unscreened,
    )


def _outside(fit: ParametricFit) -> list[str]:
    """Return warnings if the law's optimum at the smallest or largest compute is outside the runs' range of N or D."""
    found = []
    flops = 6 * fit.table.params * fit.table.tokens
    for which, budget in (("smallest", float(flops.min())), ("largest", float(flops.max()))):
        best = fit.optimal(budget)
        for letter, value, seen in (("N", best.params, fit.table.params), ("D", best.tokens, fit.table.tokens)):
            if not seen.min() <= value <= seen.max():
                found.append(
                    f"at the {which} compute, {budget:.3g} FLOPs, the optimum {letter}* = {value:.3g} is outside the "
                    f"runs' {seen.min():.3g} … {seen.max():.3g}: it is extrapolated"
                )
    return found


def _exponents_of(fits: Fits) -> list[Exponents]:
    """Return `Analysis.exponents` of the law and the valleys."""
    found: list[Exponents] = []
    if fits.parametric is not None:
        found.append(_exponents("parametric", fits.parametric, fits.parametric.intervals, len(fits.parametric.table)))
    names = {"isoflop": fits.isoflop} | {f"isoflop.{name}": fit for name, fit in fits.valleys.items()}
    for name, fit in names.items():
        if fit is not None:
            known = f"{name}.intervals" not in fits.refused
            runs = sum(len(valley.loss) for valley in fit.accepted)
            found.append(_exponents(name, fit, fit.intervals if known else None, runs))
    return found


def _exponents(name: str, fit: Any, intervals: Intervals | None, runs: int) -> Exponents:
    pairs: dict[str, Interval] | None = None
    if intervals is not None:
        pairs = {key: (float(low), float(high)) for key in ("a", "b") for low, high in [intervals[key][_LEVEL]]}
    return Exponents(name, fit.a, fit.b, runs, pairs)
