"""Fit valleys of equal compute and their minima (approach 2)."""
