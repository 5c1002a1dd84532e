"""Scaling laws: how loss falls with parameters, tokens and compute, and how sure that is."""

from experiments.scaling.isoflop import fit_isoflop
from experiments.scaling.parametric import fit_parametric

__all__ = ["fit_parametric", "fit_isoflop"]
