"""Run a scaling study, from its design to the test of its prediction."""
