"""Fit the parametric law (approach 3): its exact solver and its intervals."""
