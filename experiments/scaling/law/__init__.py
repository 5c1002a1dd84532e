"""Approach 3: the parametric law, its exact solver and its intervals."""
