"""Measure the time and memory of `isoflop scaling fit` for large tables.

    python -m experiments.scaling.large_tables --json large-tables.json

Tables of a known law with 0.3 % of noise, by size and kind: a ladder of ten budgets, and a random cloud of N and D that
has no budgets. Each is fitted by the command, with its page and figure, in a process of its own; its time and peak
memory are compared with limits. The exit code is 1 if one is exceeded.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.known_tables import TRUTH, law

SCHEMA_VERSION = 1
ROWS = (1_000, 5_000, 20_000, 100_000)
KINDS = ("ladder", "cloud")
SECONDS, GIGABYTES = 300.0, 2.0
"""Limits of one fit."""
NOISE = 0.003
BUDGETS = 10


def table(kind: str, rows: int, seed: int = 0) -> dict[str, np.ndarray]:
    """Return columns params, tokens and loss of `rows` runs of the known law."""
    rng = np.random.default_rng([seed, rows])
    if kind == "cloud":
        params, tokens = 10 ** rng.uniform(6, 10, rows), 10 ** rng.uniform(8, 12, rows)
    else:
        flops = np.geomspace(1e18, 1e22, BUDGETS)[np.arange(rows) % BUDGETS]
        params = 1.25 * (flops / 6) ** TRUTH["a"] * np.exp(rng.uniform(-1.6, 1.6, rows))
        tokens = flops / 6 / params
    return {"params": params, "tokens": tokens, "loss": law(params, tokens) * np.exp(rng.normal(0, NOISE, rows))}


def measure(kind: str, rows: int, bootstraps: int, extra: Sequence[str] = ()) -> dict[str, Any]:
    """Return {kind, rows, seconds, gigabytes, thinned, estimates, refused, met} of one fit by the command line."""
    with tempfile.TemporaryDirectory() as folder:
        path, document = Path(folder) / "runs.csv", Path(folder) / "fit.json"
        columns = table(kind, rows)
        np.savetxt(path, np.stack(list(columns.values()), 1), delimiter=",", header=",".join(columns), comments="")
        outputs = [
            "--json",
            document,
            "--report",
            document.with_suffix(".html"),
            "--plot",
            document.with_suffix(".svg"),
        ]
        command = [
            sys.executable,
            "-m",
            "experiments.cli",
            "scaling",
            "fit",
            path,
            "--bootstraps",
            bootstraps,
            *outputs,
        ]
        start = time.perf_counter()
        with (Path(folder) / "log.txt").open("w+") as log:
            process = subprocess.Popen([*map(str, command), *extra], stdout=log, stderr=subprocess.STDOUT)
            _, status, usage = os.wait4(process.pid, 0)
            process.returncode = os.waitstatus_to_exitcode(status)
            seconds = time.perf_counter() - start
            log.seek(0)
            said = log.read()
        row = {"kind": kind, "rows": rows, "seconds": seconds, "gigabytes": usage.ru_maxrss / 1e6}
        if process.returncode:
            return row | {"error": said[-2000:], "exit_code": process.returncode, "met": False}
        found = json.loads(document.read_text(encoding="utf-8"))
    estimates = {name: found[name] and found[name]["a"] for name in ("parametric", "isoflop")}
    met = seconds <= SECONDS and usage.ru_maxrss / 1e6 <= GIGABYTES
    return row | {"estimates_of_a": estimates, "thinned": found["thinned"], "refused": found["refused"], "met": met}


def study(rows: Sequence[int], bootstraps: int, advance: Callable[..., None]) -> dict[str, Any]:
    """Return the whole document."""
    found = []
    for kind in KINDS:
        for count in rows:
            advance(0, f"{kind} of {count:,} rows")
            found.append(measure(kind, count, bootstraps))
            advance(1)
    limits = {"seconds": SECONDS, "gigabytes": GIGABYTES}
    return {
        "schema_version": SCHEMA_VERSION,
        "bootstraps": bootstraps,
        "limits": limits,
        "cpus": os.cpu_count(),
        "tables": found,
    }


def show(document: dict[str, Any]) -> str:
    """Return a table for the terminal."""
    lines = [f"{'table':24} {'seconds':>8} {'GB':>6}  a by law, by valleys (truth {TRUTH['a']:.4f})"]
    for row in document["tables"]:
        estimates = row.get("estimates_of_a", {}).values()
        cells = ", ".join("refused" if value is None else f"{value:.4f}" for value in estimates)
        verdict = "" if row["met"] else "  exceeds the limits" if "error" not in row else f"  failed: {row['error']}"
        name = f"{row['kind']}, {row['rows']:,} rows"
        lines.append(f"{name:24} {row['seconds']:8.1f} {row['gigabytes']:6.2f}  {cells}{verdict}")
    return "\n".join(lines)


def main() -> None:
    """Run the command line."""
    from train.progress import progress_bar

    parser = argparse.ArgumentParser(description="Time and peak memory of `isoflop scaling fit` by rows.")
    parser.add_argument("--rows", type=int, nargs="+", default=list(ROWS))
    parser.add_argument("--bootstraps", type=int, default=1000)
    parser.add_argument("--json", type=Path, default=None, help="write the document to this file")
    options = parser.parse_args()
    with progress_bar("large tables", len(KINDS) * len(options.rows)) as advance:
        document = study(options.rows, options.bootstraps, advance)
    print(show(document))
    if options.json is not None:
        options.json.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")
    sys.exit(not all(row["met"] for row in document["tables"]))


if __name__ == "__main__":
    main()
