"""Fit other forms of law, and choose between them."""
