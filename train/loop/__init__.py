"""Run the training loop around the pure step: its entry points, the members of a population, their data."""
