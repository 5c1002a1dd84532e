"""Choose between forms of law by the error on held-out runs, not by the fit.

Two tests: the largest budgets held out (extrapolation, the purpose of laws), and cross-validation over groups of
budgets (folds). Bootstrap draws refit each form to the runs kept and score it on a draw of the runs held out, all forms
on the same draws, so that the *difference* of two forms has an interval. A form wins only if that interval excludes
zero; of indistinguishable forms the one with the fewest unknowns is chosen.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int64

from experiments.scaling.forms.fit import FormFit, fit_rows
from experiments.scaling.forms.registry import get
from experiments.scaling.forms.rows import COLUMNS, UsableRuns, frontier, reason_against, resample, usable
from experiments.scaling.law.intervals import percentile_interval
from experiments.scaling.rows.table import Table
from experiments.scaling.rows.thin import SAMPLE, sample
from experiments.scaling.valleys.valley import group_budgets
from experiments.words import counted, is_or_are
from model.errors import InputError

SIMPLE_FORMS = ("chinchilla", "shared-exponent", "no-floor", "kaplan")
TESTS = ("extrapolation", "folds")
DECIDING = "extrapolation"
FOLDS = 5
MINIMUM_BUDGETS = 3
LEVEL = 95


def forms_for(table: Table) -> tuple[str, ...]:
    """Return the default candidates: the simple forms, and those that use the table's optional columns."""
    more = () if table.unique_tokens is None else ("repeated-data", "repeated-data-params")
    return SIMPLE_FORMS + more + (() if table.active_params is None else ("experts",))


@dataclass(frozen=True)
class Score:
    """One form's record; errors are of log L̂ − log L on held-out runs, so 0.01 is one per cent of the loss."""

    form: str
    unknowns: int
    objective: float | None
    """Σ Huber_δ of the fit to all runs; None if the form was refused."""
    rms: dict[str, float]
    """By test ("extrapolation", "folds")."""
    rms_interval: dict[str, tuple[float, float]]
    mean_error: dict[str, float]
    """Signed: positive where the form predicts too high a loss."""
    mean_error_interval: dict[str, tuple[float, float]]
    excess: tuple[float, float] | None
    """Interval of this form's RMS less the best form's, in the deciding test."""
    refused: str | None = None


@dataclass(frozen=True)
class LargestBudgets:
    """The budgets that are held out in the extrapolation test."""

    flops: list[float]
    runs: int


@dataclass(frozen=True)
class HeldOut:
    """The runs and budgets on which the forms are compared."""

    extrapolation: LargestBudgets
    folds: int
    """Groups of neighbouring budgets, each held out once."""
    budgets: int
    runs: int
    of_runs: int
    """The number of runs in the table; `runs` of them are drawn where these are too many."""


@dataclass(frozen=True)
class FormChoice:
    """The form to use, and why."""

    winner: str
    best: str
    """The lowest held-out error; the winner is simpler where the two cannot be distinguished."""
    told_apart: bool
    """Whether every other form is worse beyond noise."""
    reason: str
    decided_by: str
    scores: list[Score]
    held_out: HeldOut
    bootstraps: int
    seed: int
    fits: dict[str, FormFit]

    @property
    def thinned(self) -> str | None:
        """Return what was done with fewer rows than the table has, in words; None if nothing was."""
        used, rows = self.held_out.runs, self.held_out.of_runs
        if used == rows:
            return None
        return f"the forms of law are compared on {used:,} of {rows:,} runs, drawn at random: each is fitted many times"

    def document(self) -> dict[str, Any]:
        """Return plain numbers, strings, lists and dicts."""
        plain = {name: getattr(self, name) for name in ("winner", "best", "told_apart", "reason", "decided_by")}
        scores = [asdict(score) for score in self.scores]
        for score in scores:
            for name in ("rms_interval", "mean_error_interval"):
                score[name] = {test: list(pair) for test, pair in score[name].items()}
            score["excess"] = None if score["excess"] is None else list(score["excess"])
        rest = {"level": LEVEL, "held_out": asdict(self.held_out), "bootstraps": self.bootstraps, "seed": self.seed}
        return plain | {"scores": scores} | rest


def choose(
    table: Table | Mapping[str, Any],
    forms: Sequence[str] = SIMPLE_FORMS,
    *,
    hold_out: int = 1,
    delta: float | int = 1e-3,
    bootstraps: int = 200,
    seed: int = 0,
) -> FormChoice:
    """Choose between `forms` on one set of rows: those usable by all of them.

    Budgets are runs within 5 % of one compute (6·N·D without a column `flops`); runs that share no budgets are put into
    FOLDS groups of equal count by compute. From a larger table SAMPLE rows are drawn at random. `hold_out`: the number
    of largest budgets held out in the extrapolation test, which decides; the other test is cross-validation over FOLDS
    groups of neighbouring budgets. Raises `InputError` for forms of the frontier among others, fewer than three
    budgets, or where no form can be fitted without the held-out runs.
    """
    if len(set(forms)) < 2:
        raise InputError(f"a choice needs at least two different forms, got {list(forms)}")
    known = [get(name) for name in dict.fromkeys(forms)]
    if len({form.frontier for form in known}) > 1:
        raise InputError("forms in C alone hold on the frontier only and cannot be compared with forms in N and D")
    needs = [name for name in COLUMNS[:-1] if any(name in form.needs for form in known)]
    rows = usable(table, [*needs, *([] if "flops" in needs else ["flops"])])
    if known[0].frontier:
        rows = frontier(rows)
    whole = len(rows)
    chosen = sample(whole, SAMPLE, seed)
    rows = UsableRuns({name: values[chosen] for name, values in rows.columns.items()}, rows.dropped)
    group = _budget_indices(rows.columns["flops"])
    count = int(group.max()) + 1
    if count < MINIMUM_BUDGETS:
        raise InputError(
            f"{counted(count, 'budget')} {is_or_are(count)} too few to hold any out; at least "
            f"{MINIMUM_BUDGETS} are needed"
        )
    if not 1 <= hold_out <= count - 2:
        raise InputError(f"hold_out={hold_out} must be between 1 and {count - 2}, of {counted(count, 'budget')}")
    fold = group * min(FOLDS, count) // count
    held = {
        "extrapolation": (group >= count - hold_out)[None],
        "folds": fold == np.arange(fold.max() + 1)[:, None],
    }

    rng = np.random.default_rng(seed)
    widest = max(known, key=lambda form: len(form.unknowns))
    counts = np.concatenate([np.ones((1, len(rows))), resample(widest, rows.columns, rng, bootstraps)])
    fits, errors, refused = {}, {}, {}
    for form in known:
        try:
            for mask in held["extrapolation"]:
                if reason := reason_against(form, {name: values[~mask] for name, values in rows.columns.items()}):
                    raise InputError(f"without the held-out runs {reason}")
            fits[form.name] = fit_rows(form, rows, delta=delta, bootstraps=bootstraps, seed=seed)
            errors[form.name] = {test: _errors(fits[form.name], held[test], counts) for test in TESTS}
        except InputError as error:
            refused[form.name] = str(error)
    if not fits:
        raise InputError(f"no form can be judged: {'; '.join(f'{name}: {why}' for name, why in refused.items())}")

    squared = {name: {test: _rms(errors[name][test], counts, held[test]) for test in TESTS} for name in fits}
    best = min(fits, key=lambda name: squared[name][DECIDING][0])
    scores = []
    for form in known:
        if form.name in refused:
            scores.append(Score(form.name, len(form.unknowns), None, {}, {}, {}, {}, None, refused[form.name]))
            continue
        rms = squared[form.name]
        mean = {test: _mean(errors[form.name][test], counts, held[test]) for test in TESTS}
        scores.append(
            Score(
                form=form.name,
                unknowns=len(form.unknowns),
                objective=fits[form.name].objective,
                rms={test: float(rms[test][0]) for test in TESTS},
                rms_interval={test: _interval(rms[test]) for test in TESTS},
                mean_error={test: float(mean[test][0]) for test in TESTS},
                mean_error_interval={test: _interval(mean[test]) for test in TESTS},
                excess=_interval(rms[DECIDING] - squared[best][DECIDING]),
            )
        )
    rivals = [s for s in scores if s.form != best and s.excess is not None and not s.excess[0] > 0]
    tied = [s for s in scores if s in rivals or s.form == best]
    winner = min(tied, key=lambda score: (score.unknowns, score.rms[DECIDING])).form
    if rivals:
        apart = ", ".join(score.form for score in tied)
        reason = f"{apart} cannot be distinguished by the {DECIDING} error; {winner} is the simplest of them"
    else:
        reason = f"{winner} has the lowest {DECIDING} error, and every other form is worse beyond noise"
    budgets = np.array([rows.columns["flops"][group == i].mean() for i in range(count)])
    held_out = HeldOut(
        extrapolation=LargestBudgets(budgets[count - hold_out :].tolist(), int(held["extrapolation"].sum())),
        folds=len(held["folds"]),
        budgets=count,
        runs=len(rows),
        of_runs=whole,
    )
    return FormChoice(winner, best, not rivals, reason, DECIDING, scores, held_out, bootstraps, seed, fits)


def _budget_indices(flops: Float[np.ndarray, " rows"]) -> Int64[np.ndarray, " rows"]:
    """Return the index of each run's budget, ascending in compute.

    If most budgets have a single run, the runs are divided by compute into FOLDS groups of equal size instead.
    """
    budgets = group_budgets(flops)
    index = np.empty(len(flops), np.int64)
    if len(budgets) > len(flops) / 2:
        rank = np.arange(len(flops))
        index[np.argsort(flops, kind="stable")] = rank * FOLDS // len(flops)
    else:
        for i, members in enumerate(budgets):
            index[members] = i
    return index


def _errors(
    fit: FormFit, held: Bool[np.ndarray, "tests rows"], counts: Float[np.ndarray, "draws rows"]
) -> Float[np.ndarray, "tests draws rows"]:
    """Return log L̂ − log L of all runs by the form refitted to each draw without each set of held-out runs."""
    weights = (counts[None] * ~held[:, None]).reshape(-1, counts.shape[1])
    theta = fit.problem.refit(fit.scaled, weights)
    predicted = fit.problem.log_prediction(theta, fit.rows.columns)
    return (predicted - fit.problem.log_loss).reshape(len(held), *counts.shape)


def _mean(errors: np.ndarray, counts: np.ndarray, held: np.ndarray) -> Float[np.ndarray, " draws"]:
    """Return the mean over held-out runs, each as often as it was drawn; NaN for a draw without any."""
    weights = counts[None] * held[:, None]
    with np.errstate(invalid="ignore"):
        return (weights * errors).sum((0, 2)) / weights.sum((0, 2))


def _rms(errors: np.ndarray, counts: np.ndarray, held: np.ndarray) -> Float[np.ndarray, " draws"]:
    return np.sqrt(_mean(errors**2, counts, held))


def _interval(draws: Float[np.ndarray, " draws"]) -> tuple[float, float]:
    """Return the interval of the bootstrap draws; the first entry is the table itself."""
    low, high = percentile_interval(draws[1:], LEVEL)
    return float(low), float(high)
