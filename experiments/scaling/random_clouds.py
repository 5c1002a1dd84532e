"""Test random clouds of runs: no crash, no invented budgets, and correct coverage of the law's intervals.

    python -m experiments.scaling.random_clouds --clouds 200 --json random-clouds.json

Each cloud has its own law, number of runs, noise and ranges, with N and D drawn independently, so that no two runs
share a budget but by chance. Everything that `isoflop scaling fit` does is run, with numerical warnings as errors. The
limits: no exception except InputError, no valleys, and 95 % intervals of the parametric law with a coverage of 90 to 99
%. The exit code is 1 if a limit is missed.
"""

import argparse
import json
import multiprocessing
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.analysis import analyse
from experiments.scaling.rows.table import clean
from model.errors import InputError

SCHEMA_VERSION = 1
COVERAGE_LIMITS = (0.90, 0.99)
NAMES = ("E", "alpha", "beta", "a")


def simulate(seed: int) -> tuple[dict[str, Any], dict[str, float]]:
    """Return (columns params, tokens, loss, the law behind them) of one cloud of 30 to 300 runs."""
    rng = np.random.default_rng([seed, 11])
    rows = int(10 ** rng.uniform(1.5, 2.5))
    truth = {"E": rng.uniform(1.4, 2.2), "alpha": rng.uniform(0.25, 0.45), "beta": rng.uniform(0.25, 0.45)}
    params, tokens = 10 ** rng.uniform(6.5, 10, rows), 10 ** rng.uniform(8.5, 12, rows)
    # In the middle of the cloud N and D each cost between a quarter and a half of a nat.
    terms = [rng.uniform(0.25, 0.5) * (values / middle) ** -truth[rate]
             for values, middle, rate in ((params, 10**8.25, "alpha"), (tokens, 10**10.25, "beta"))]  # fmt: skip
    loss = (truth["E"] + terms[0] + terms[1]) * np.exp(rng.normal(0, 10 ** rng.uniform(-3, -2), rows))
    truth["a"] = truth["beta"] / (truth["alpha"] + truth["beta"])
    return {"params": params, "tokens": tokens, "loss": loss}, truth


def trial(seed: int, bootstraps: int) -> dict[str, Any]:
    """Return {rows, crash, budgets, refused, inside: {name: bool}} of one cloud."""
    columns, truth = simulate(seed)
    found: dict[str, Any] = {"seed": seed, "rows": len(columns["loss"]), "crash": None, "budgets": 0, "refused": {}}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            analysis = analyse(clean(**columns), bootstraps=bootstraps)
            analysis.document()
    except InputError as error:
        return found | {"refused": {"all": str(error)}}
    except Exception:  # counted, shown, and the program fails for it
        return found | {"crash": traceback.format_exc()}
    fits = analysis.fits
    found |= {"budgets": 0 if fits.isoflop is None else len(fits.isoflop.accepted), "refused": analysis.refused}
    if fits.parametric is not None:
        intervals = fits.parametric.intervals
        found["inside"] = {
            name: bool(intervals[name][95][0] <= truth[name] <= intervals[name][95][1]) for name in NAMES
        }
    return found


def summarise(trials: Sequence[dict[str, Any]], bootstraps: int) -> dict[str, Any]:
    """Return the document of these clouds, with whether each limit is met."""
    fitted = [one["inside"] for one in trials if "inside" in one]
    coverage = {name: float(np.mean([one[name] for one in fitted])) for name in NAMES} if fitted else {}
    crashes = [one for one in trials if one["crash"] is not None]
    invented = [{"seed": one["seed"], "budgets": one["budgets"]} for one in trials if one["budgets"]]
    low, high = COVERAGE_LIMITS
    return {
        "schema_version": SCHEMA_VERSION,
        "clouds": len(trials),
        "bootstraps": bootstraps,
        "fitted": len(fitted),
        "crashes": [{"seed": one["seed"], "error": one["crash"]} for one in crashes],
        "invented_budgets": invented,
        "refused": [{"seed": one["seed"]} | one["refused"] for one in trials if "parametric" in one["refused"]],
        "coverage_95": coverage,
        "limits": {"coverage_95": COVERAGE_LIMITS, "crashes": 0, "invented_budgets": 0},
        "met": {
            "crashes": not crashes,
            "invented_budgets": not invented,
            "coverage_95": bool(coverage) and all(low <= value <= high for value in coverage.values()),
        },
    }


def _job(arguments: tuple[int, int]) -> dict[str, Any]:
    return trial(*arguments)


def study(clouds: int, bootstraps: int, processes: int, advance: Callable[..., None]) -> dict[str, Any]:
    """Return the whole document; `advance()` is called after every cloud."""
    jobs = [(seed, bootstraps) for seed in range(clouds)]
    trials = []
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for one in pool.imap(_job, jobs):
            trials.append(one)
            advance()
    return summarise(trials, bootstraps)


def show(document: dict[str, Any]) -> str:
    """Return a few lines for the terminal."""
    word = {True: "", False: "  misses"}
    met = document["met"]
    coverage = ", ".join(f"{name} {100 * value:.1f} %" for name, value in document["coverage_95"].items())
    lines = [
        f"random clouds           {document['clouds']}, of which {document['fitted']} determine a law",
        f"crashes                 {len(document['crashes'])}{word[met['crashes']]}",
        f"clouds with budgets     {len(document['invented_budgets'])}{word[met['invented_budgets']]}",
        f"intervals hold truth    {coverage}{word[met['coverage_95']]}",
    ]
    return "\n".join([*lines, *(one["error"] for one in document["crashes"][:3])])


def main() -> None:
    """Run the command line."""
    from train.progress import progress_bar

    parser = argparse.ArgumentParser(description="Laws, intervals and refusals on random clouds of runs.")
    parser.add_argument("--clouds", type=int, default=200)
    parser.add_argument("--bootstraps", type=int, default=200, help="resamples behind each interval")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, default=None, help="write the document to this file")
    options = parser.parse_args()
    with progress_bar("random clouds", options.clouds) as advance:
        document = study(options.clouds, options.bootstraps, options.processes, advance)
    print(show(document))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(document["met"].values()))


if __name__ == "__main__":
    main()
