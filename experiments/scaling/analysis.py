"""All that a table of runs says of its scaling laws: every estimator, a choice of form, and what to beware of."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from experiments.scaling.choose import SIMPLE_FORMS, Choice, choose
from experiments.scaling.conventions import Counts, conventions
from experiments.scaling.curves import Curve
from experiments.scaling.envelope import EnvelopeFit, fit_envelope
from experiments.scaling.fit import Fits, fit_both, isoflop_warnings, parametric_warnings
from experiments.scaling.table import Table
from model.errors import InputError

_FEWER = 100  # resamples behind the choice between forms and the table of conventions, which fit many times as often
_LEVEL = 95


@dataclass(frozen=True)
class Analysis:
    """The fits of one table. What was refused is None, with its reason in `refused`; what was not asked for, too.

    conventions: the document of `conventions.conventions`. held_out: of `held_out.compare`.
    """

    fits: Fits
    envelope: EnvelopeFit | None
    choice: Choice | None
    conventions: dict[str, Any] | None
    held_out: dict[str, Any] | None
    refused: dict[str, str]

    @property
    def exponents(self) -> list[dict[str, Any]]:
        """[{estimator, a, b, intervals, runs}] of all that answer; intervals {"a": (low, high) …} at 95 %, or None."""
        found: list[dict[str, Any]] = []
        fits = self.fits
        if fits.parametric is not None:
            found.append(
                _exponents("parametric", fits.parametric, fits.parametric.intervals, len(fits.parametric.table))
            )
        names = {"isoflop": fits.isoflop} | {f"isoflop.{name}": fit for name, fit in fits.valleys.items()}
        for name, fit in names.items():
            if fit is not None:
                known = f"{name}.intervals" not in self.refused
                runs = sum(len(valley.loss) for valley in fit.accepted)
                found.append(_exponents(name, fit, fit.intervals if known else None, runs))
        if self.envelope is not None:
            try:
                intervals = self.envelope.intervals
            except InputError:
                intervals = None
            found.append(_exponents("envelope", self.envelope, intervals, len(self.envelope.crossings)))
        return found

    @property
    def warnings(self) -> list[dict[str, str]]:
        """[{about, text}] of what the numbers should be read with."""
        found: list[tuple[str, str]] = []
        fits = self.fits
        if fits.parametric is not None:
            found += [("parametric", text) for text in parametric_warnings(fits.parametric)]
        if fits.isoflop is not None:
            found += [("isoflop", text) for text in isoflop_warnings(fits.isoflop)]
        if self.envelope is not None:
            found += [("envelope", text) for text in self.envelope.warnings]
        found += [("estimators", text) for text in self._disagreements()]
        if self.choice is not None and fits.parametric is not None:
            scores = {score.form: score for score in self.choice.scores}
            excess = scores["chinchilla"].excess if "chinchilla" in scores else None
            if excess is not None and excess[0] > 0:
                text = f"{self.choice.winner} predicts held-out budgets better than this law, beyond noise"
                found.append(("parametric", text))
        return [{"about": about, "text": text} for about, text in found]

    def _disagreements(self) -> list[str]:
        rows = [row for row in self.exponents if row["intervals"] is not None]
        apart = []
        for i, one in enumerate(rows):
            for other in rows[i + 1 :]:
                (low, high), (bottom, top) = one["intervals"]["a"], other["intervals"]["a"]
                if high < bottom or top < low:
                    apart.append(
                        f"{one['estimator']} has a = {one['a']:.3f} ({low:.3f} … {high:.3f}), {other['estimator']} "
                        f"{other['a']:.3f} ({bottom:.3f} … {top:.3f}): their {_LEVEL} % intervals do not meet"
                    )
        return apart

    def document(self) -> dict[str, Any]:
        """Plain values: what `Fits.document` has, and envelope, forms, conventions, held_out, warnings."""
        return self.fits.document() | {
            "envelope": None if self.envelope is None else self.envelope.document(),
            "forms": None if self.choice is None else self.choice.document(),
            "conventions": self.conventions,
            "held_out": self.held_out,
            "warnings": self.warnings,
            "refused": self.refused,
        }


def analyse(
    table: Table,
    *,
    counts: Counts | None = None,
    curves: Sequence[Curve] = (),
    held_out: dict[str, Any] | None = None,
    forms: Sequence[str] = SIMPLE_FORMS,
    delta: float = 1e-3,
    bootstraps: int = 1000,
    seed: int = 0,
    advance: Callable[..., None] | None = None,
) -> Analysis:
    """Fit a table by every estimator that it can carry.

    counts: the same runs under other conventions of N and C; curves: their training curves, for approach 1; forms: to
    choose between, none to skip that. Raises InputError where no estimator answers.
    """
    if not len(table):
        first = f", such as row {table.dropped[0]['row']}: {table.dropped[0]['reason']}" if table.dropped else ""
        raise InputError(f"no run is left to fit; {len(table.dropped)} rows were dropped{first}")
    fits = fit_both(table, delta=delta, bootstraps=bootstraps, seed=seed, advance=advance)
    refused = dict(fits.refused)

    def attempt(name: str, wanted: bool, fit: Callable[[], Any]) -> Any:
        if not wanted:
            return None
        try:
            return fit()
        except InputError as error:
            refused[name] = str(error)
            return None

    few = min(_FEWER, bootstraps)
    envelope = attempt("envelope", bool(curves), lambda: fit_envelope(curves, bootstraps=bootstraps, seed=seed))
    if fits.parametric is None and fits.isoflop is None and envelope is None:
        raise InputError("; ".join(f"{name}: {reason}" for name, reason in refused.items()))
    return Analysis(
        fits,
        envelope,
        attempt("forms", bool(forms), lambda: choose(table, forms, delta=delta, bootstraps=few, seed=seed)),
        attempt("conventions", counts is not None, lambda: conventions(counts, bootstraps=few, seed=seed)),  # type: ignore[arg-type]
        held_out,
        refused,
    )


def _exponents(name: str, fit: Any, intervals: Any, runs: int) -> dict[str, Any]:
    row = {"estimator": name, "a": fit.a, "b": fit.b, "runs": runs, "intervals": None}
    if intervals is not None:
        row["intervals"] = {key: tuple(map(float, intervals[key][_LEVEL])) for key in ("a", "b")}
    return row
