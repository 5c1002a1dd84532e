"""Approach 2: valleys of equal compute and their minima."""
