"""Smaller models from trained ones: entries of matrices set to zero, layers removed."""

from infer.compress.depth import block_influence, drop_layers
from infer.compress.sparsity import input_norms, prune

__all__ = ["prune", "input_norms", "drop_layers", "block_influence"]
