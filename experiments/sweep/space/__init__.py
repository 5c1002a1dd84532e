"""Define what a sweep varies: the algebra of spaces, the values of an axis, space files, and the overlay on a base."""

from experiments.sweep.space.build import *  # noqa: F403 – its __all__ is the list
