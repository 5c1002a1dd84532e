"""Runs as rows: tables from anywhere, and what counts as N, D and C."""
