"""Fit scaling laws: how loss falls with parameters, tokens and compute, with uncertainties."""

from experiments.scaling.law.parametric import fit_parametric
from experiments.scaling.valleys.isoflop import fit_isoflop

__all__ = ["fit_parametric", "fit_isoflop"]
