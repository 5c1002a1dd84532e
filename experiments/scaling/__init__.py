"""Fit scaling laws: how loss and benchmarks change with parameters, tokens and compute, with uncertainties."""

from experiments.scaling.downstream.fit import fit_downstream
from experiments.scaling.downstream.table import read_downstream
from experiments.scaling.law.parametric import fit_parametric
from experiments.scaling.valleys.isoflop import fit_isoflop

__all__ = ["fit_downstream", "fit_parametric", "fit_isoflop", "read_downstream"]
