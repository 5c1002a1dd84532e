"""Whether known laws come back: bias, coverage and robustness of every estimator, on simulated tables.

    python -m experiments.scaling.known_laws --seeds 400 --json docs/bench/known-laws.json

Each table is drawn from one published law (Hoffmann et al. 2022, approach 3) on a ladder of budgets × sizes. The cases:
windows centred on the optimum; windows that drift from one side of it to the other as the budget grows, so that a
biased minimum becomes a biased exponent; 5 % of the runs repeated as gross outliers, with rows that are not
numbers among them; few runs. Clean tables must come back to 1e-4 relative.
"""

import argparse
import json
import math
import multiprocessing
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.fit import fit_parametric_screened, isoflop_warnings, parametric_warnings
from experiments.scaling.isoflop import fit_isoflop
from model.errors import InputError

SCHEMA_VERSION = 1
TRUTH = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28, "a": 0.28 / 0.62, "b": 0.34 / 0.62}
EXPONENTS = {
    "parametric": ("alpha", "beta", "a", "b"),
    "parabola": ("a", "b"),
    "skewed": ("a", "b"),
    "spline": ("a", "b"),
}
OUTLIER_SHARE = 0.05
CLEAN_TOLERANCE = 1e-4
BIAS_LIMIT, COVERAGE_LIMITS, SHIFT_LIMIT = 0.2, (0.91, 0.98), 0.5
FEW_VALID = 2  # fewer accepted fits have no spread


@dataclass(frozen=True)
class Case:
    """One kind of table. noise: standard deviation of ln L; span: largest over middle size of a budget; drift: ln of
    the factor by which the windows of the first and last budget miss the optimum, to either side.
    """

    name: str
    budgets: int = 6
    sizes: int = 9
    noise: float = 0.003
    span: float = 4.0
    drift: float = 0.0
    outliers: bool = False
    required: bool = True
    """Whether the limits must be met; else the numbers are only reported."""


CASES = (
    Case("centred"),
    Case("off centre", drift=math.log(1.8)),
    Case("outliers", outliers=True),
    Case("few", budgets=3, sizes=4, required=False),
)
CLEAN = (Case("clean", noise=0.0), Case("clean, off centre", noise=0.0, drift=math.log(1.8)))


def law(params: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    """The true loss in nats per token."""
    return TRUTH["E"] + TRUTH["A"] * params ** -TRUTH["alpha"] + TRUTH["B"] * tokens ** -TRUTH["beta"]


def simulate(case: Case, seed: int) -> tuple[dict[str, Any], dict[str, Any]]:
    """(The honest runs, the same with whatever the case adds to them), as columns params, tokens, loss."""
    rng = np.random.default_rng([seed, 7])
    budgets = np.geomspace(1e18, 1e21, case.budgets)
    rate = TRUTH["alpha"] + TRUTH["beta"]
    g = (TRUTH["alpha"] * TRUTH["A"] / (TRUTH["beta"] * TRUTH["B"])) ** (1 / rate)
    centre = g * (budgets / 6) ** TRUTH["a"] * np.exp(case.drift * np.linspace(-1, 1, case.budgets))
    params = (centre[:, None] * np.geomspace(1 / case.span, case.span, case.sizes)).ravel()
    tokens = np.repeat(budgets, case.sizes) / (6 * params)
    loss = law(params, tokens) * np.exp(rng.normal(0, case.noise, len(params)))
    honest = {"params": params, "tokens": tokens, "loss": loss}
    if not case.outliers:
        return honest, honest
    wrong = rng.choice(len(loss), size=max(1, round(OUTLIER_SHARE * len(loss))), replace=False)
    lost = rng.choice(len(loss), size=2, replace=False)
    extra = {"params": params, "tokens": tokens, "loss": loss * rng.uniform(1.1, 2.0, len(loss))}
    with_all = {
        name: np.concatenate([column, extra[name][wrong], np.full(2, np.nan) if name == "loss" else column[lost]])
        for name, column in honest.items()
    }
    return honest, with_all


def estimate(name: str, table: dict[str, Any], bootstraps: int) -> Any:
    """One estimator's fit of a table; raises `InputError` where it refuses."""
    if name == "parametric":
        return fit_parametric_screened(**table, bootstraps=bootstraps)[0]
    return fit_isoflop(**table, method=name, bootstraps=bootstraps)  # type: ignore[arg-type]


def trial(case: Case, name: str, seed: int, bootstraps: int) -> dict[str, Any]:
    """{value, inside, shift} per exponent, or {refused}; shift is in the honest table's bootstrap standard errors."""
    honest, table = simulate(case, seed)
    try:
        fit = estimate(name, table, bootstraps)
        intervals = fit.intervals
        result: dict[str, Any] = {
            "warned": bool(parametric_warnings(fit) if name == "parametric" else isoflop_warnings(fit))
        }
        reference = estimate(name, honest, bootstraps) if case.outliers else None
        errors = {} if reference is None else _standard_errors(reference, name)
    except InputError as error:
        return {"refused": str(error)}
    for exponent in EXPONENTS[name]:
        value = getattr(fit, exponent)
        low, high = intervals[exponent][95]
        result[exponent] = {"value": value, "inside": bool(low <= TRUTH[exponent] <= high), "width": high - low}
        if reference is not None:
            result[exponent]["shift"] = abs(value - getattr(reference, exponent)) / errors[exponent]
    return result


def _standard_errors(fit: Any, name: str) -> dict[str, float]:
    if name != "parametric":
        return {"a": float(np.nanstd(fit.draws[:, 1])), "b": float(np.nanstd(fit.draws[:, 3]))}
    alpha, beta = fit.draws[:, 3], fit.draws[:, 4]
    share = beta / (alpha + beta)
    return {"alpha": alpha.std(), "beta": beta.std(), "a": share.std(), "b": share.std()}


def summarise(case: Case, name: str, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Bias over spread, coverage and shift per exponent, with whether each meets its limit."""
    valid = [one for one in trials if "refused" not in one]
    row: dict[str, Any] = {"case": case.name, "estimator": name, "tables": len(trials)}
    row["refused"] = len(trials) - len(valid)
    row["warned"] = sum(one["warned"] for one in valid)
    row["exponents"] = {}
    if len(valid) < FEW_VALID:
        return row
    for exponent in EXPONENTS[name]:
        values = np.array([one[exponent]["value"] for one in valid])
        spread = float(values.std(ddof=1))
        coverage = float(np.mean([one[exponent]["inside"] for one in valid]))
        summary = {
            "truth": TRUTH[exponent],
            "mean": float(values.mean()),
            "spread": spread,
            "bias_over_spread": float(values.mean() - TRUTH[exponent]) / spread,
            "coverage_95": coverage,
            "coverage_standard_error": math.sqrt(max(coverage * (1 - coverage), 1e-9) / len(valid)),
            "median_width_95": float(np.median([one[exponent]["width"] for one in valid])),
        }
        met = abs(summary["bias_over_spread"]) < BIAS_LIMIT and COVERAGE_LIMITS[0] <= coverage <= COVERAGE_LIMITS[1]
        if case.outliers:
            shifts = np.array([one[exponent]["shift"] for one in valid])
            summary |= {"shift_median": float(np.median(shifts)), "shift_largest": float(shifts.max())}
            summary["shifted_beyond_limit"] = float((shifts > SHIFT_LIMIT).mean())
            met = met and shifts.max() <= SHIFT_LIMIT
        row["exponents"][exponent] = summary | {"met": bool(met), "required": case.required}
    return row


def clean_errors() -> list[dict[str, Any]]:
    """The largest relative error per estimator on tables without noise."""
    rows = []
    for case in CLEAN:
        table, _ = simulate(case, 0)
        for name in EXPONENTS:
            fit = estimate(name, table, 1)
            errors = {
                key: abs(getattr(fit, key) / TRUTH[key] - 1) for key in (TRUTH if name == "parametric" else ("a", "b"))
            }
            largest = max(errors.values())
            rows.append(
                {"case": case.name, "estimator": name, "errors": errors, "met": largest < CLEAN_TOLERANCE}
                # A valley of finite width is no parabola, so that drifting windows leave a trace without any noise.
                | {"required": name == "parametric" or not case.drift}
            )
    return rows


def _job(arguments: tuple[Case, str, int, int]) -> tuple[str, str, dict[str, Any]]:
    case, name, seed, bootstraps = arguments
    return case.name, name, trial(case, name, seed, bootstraps)


def study(
    seeds: int, bootstraps: int = 200, processes: int = 1, advance: Callable[..., None] | None = None
) -> dict[str, Any]:
    """The whole document; `advance()` is called after every trial."""
    jobs = [(case, name, seed, bootstraps) for seed in range(seeds) for case in CASES for name in EXPONENTS]
    found: dict[tuple[str, str], list[dict[str, Any]]] = {(case.name, name): [] for case in CASES for name in EXPONENTS}

    def collect(results: Any) -> None:
        for case_name, name, result in results:
            found[case_name, name].append(result)
            if advance is not None:
                advance()

    if processes == 1:
        collect(map(_job, jobs))
    else:
        with multiprocessing.get_context("spawn").Pool(processes) as pool:
            collect(pool.imap_unordered(_job, jobs, chunksize=8))
    return {
        "schema_version": SCHEMA_VERSION,
        "law": TRUTH,
        "seeds": seeds,
        "bootstraps": bootstraps,
        "limits": {"clean": CLEAN_TOLERANCE, "bias_over_spread": BIAS_LIMIT, "coverage_95": COVERAGE_LIMITS}
        | {"shift_in_standard_errors": SHIFT_LIMIT},
        "cases": [asdict(case) for case in CASES],
        "clean": clean_errors(),
        "noisy": [summarise(case, name, found[case.name, name]) for case in CASES for name in EXPONENTS],
    }


def show(document: dict[str, Any]) -> str:
    """A table for the terminal."""
    lines = [f"{'clean':34} largest relative error"]
    for row in document["clean"]:
        missed = "" if row["met"] or not row["required"] else "  misses"
        lines.append(f"{row['case'] + ', ' + row['estimator']:34} {max(row['errors'].values()):.1e}{missed}")
    lines.append(f"{'noisy':34} {'bias/spread':>11} {'coverage':>9} {'shift (worst)':>14} {'refused':>8} {'warned':>7}")
    for row in document["noisy"]:
        for exponent, found in row["exponents"].items():
            shift = f"{found['shift_median']:.2f} ({found['shift_largest']:.2f})" if "shift_median" in found else ""
            lines.append(
                f"{row['case'] + ', ' + row['estimator'] + ', ' + exponent:34} {found['bias_over_spread']:11.2f} "
                f"{100 * found['coverage_95']:7.1f} % {shift:>14} {row['refused']:8} {row['warned']:7}"
                + ("" if found["met"] or not found["required"] else "  misses")
            )
        if not row["exponents"]:
            lines.append(f"{row['case'] + ', ' + row['estimator']:34} {'':36} {row['refused']:8} {row['warned']:7}")
    return "\n".join(lines)


def main() -> None:
    """The command line."""
    from train.progress import progress_bar

    parser = argparse.ArgumentParser(description="Whether known scaling laws come back from simulated tables.")
    parser.add_argument("--seeds", type=int, default=400, help="tables per case")
    parser.add_argument("--bootstraps", type=int, default=200, help="resamples behind each interval")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="write the document to this file")
    options = parser.parse_args()
    with progress_bar("known laws", options.seeds * len(CASES) * len(EXPONENTS)) as advance:
        document = study(options.seeds, options.bootstraps, options.processes, advance)
    print(show(document))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
