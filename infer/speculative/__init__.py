"""Speculative decoding (Leviathan et al. 2023; Chen et al. 2023)."""

from infer.speculative.generate import Speculated, generate_speculative

__all__ = ["Speculated", "generate_speculative"]
