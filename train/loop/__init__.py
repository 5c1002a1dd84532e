"""The training loop around the pure step: what a caller asks for, the members of a population, their data."""
