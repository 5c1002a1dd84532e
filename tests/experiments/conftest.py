"""Shared by the tests of the experiments: the command line, called in this process."""

import sys

import pytest


@pytest.fixture
def isoflop(monkeypatch, capsys):
    """Call the command; (exit code, stdout, stderr)."""
    from experiments import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["isoflop", *map(str, arguments)])
        try:
            cli.main()
            code = 0
        except SystemExit as stop:
            code = int(stop.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run
