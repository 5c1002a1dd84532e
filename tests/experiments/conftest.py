"""Shared by the tests of the experiments: the command line, called in this process."""

import contextlib
import io
import sys

import pytest


@pytest.fixture(scope="session")
def isoflop():
    """Call the command; (exit code, stdout, stderr)."""
    from experiments import cli

    def run(*arguments: object) -> tuple[int, str, str]:
        out, err, code = io.StringIO(), io.StringIO(), 0
        with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            patch.setattr(sys, "argv", ["isoflop", *map(str, arguments)])
            try:
                cli.main()
            except SystemExit as stop:
                code = int(stop.code or 0)
        return code, out.getvalue(), err.getvalue()

    return run
