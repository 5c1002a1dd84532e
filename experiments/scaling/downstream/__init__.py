"""Predict benchmarks of larger models: laws of bits per byte, links to accuracy, and their hold-outs."""
