"""Write the numbers of an analysis as CSV tables, for further plots."""

import csv
import io
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.scaling.analysis import Analysis
from train.files import write_atomically


def write_tables(folder: Path, analysis: Analysis) -> list[Path]:
    """Write fitted.csv (runs and what the law says of them), left_out (which, of what, and why), optima, exponents,
    draws (of the law) and valley_draws, forms, form_values, conventions, held_out.

    Tables that the analysis does not have are not written. Returns the files.
    """
    fits = analysis.fits
    found: dict[str, list[dict[str, Any]]] = {"exponents": [_flat(row.to_dict()) for row in analysis.exponents]}
    if fits.parametric is not None:
        fit = fits.parametric
        names = ("params", "tokens", "loss", "predicted", "residual")
        columns = (*(getattr(fit.table, n) for n in names[:3]), fit.predict(fit.table.params, fit.table.tokens))
        found["fitted"] = [dict(zip(names, row, strict=True)) for row in _rows(*columns, -fit.residuals)]
        found["draws"] = [dict(zip(("E", "A", "B", "alpha", "beta"), row, strict=True)) for row in fit.draws.tolist()]
    found["optima"] = [{"method": name} | best.to_dict() for name, fit in fits.methods.items() for best in fit.optima]
    found["valley_draws"] = [
        {"method": name, "a": row[1], "b": row[3]}
        for name, fit in analysis.valleys.items()
        for row in fit.draws.tolist()
    ]
    found["left_out"] = [row.to_dict() for row in analysis.left_out]
    if analysis.choice is not None:
        found["forms"] = [_flat(row) for row in analysis.choice.document()["scores"]]
        found["form_values"] = [
            _flat({"form": name, "unknown": unknown, "value": fit.values[unknown]} | {"interval_95": by[95]})
            for name, fit in analysis.choice.fits.items()
            for unknown, by in fit.intervals.items()
        ]
    if analysis.conventions is not None:
        found["conventions"] = [_flat(row.to_dict()) for row in analysis.conventions.rows]
    if analysis.held_out is not None:
        found["held_out"] = [_flat(run) for run in analysis.held_out["runs"]]
    paths = []
    for name, rows in found.items():
        if rows:
            paths.append(folder / f"{name}.csv")
            write_csv(paths[-1], rows)
    return paths


def write_csv(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Write the rows under the union of their names; None is an empty cell."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_atomically(path, text.getvalue())


def _flat(row: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return nested names joined by dots; a pair becomes .low and .high."""
    found: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        elif isinstance(value, (list, tuple)) and len(value) == 2:
            found |= {f"{prefix}{name}.low": value[0], f"{prefix}{name}.high": value[1]}
        else:
            found[prefix + name] = value
    return found


def _rows(*columns: np.ndarray) -> Iterable[tuple[float, ...]]:
    return zip(*(column.tolist() for column in columns), strict=True)
