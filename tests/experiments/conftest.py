"""Shared by the tests of the experiments: the command line, called in this process; pages of reports."""

import contextlib
import html
import io
import json
import re
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


@pytest.fixture(scope="session")
def words():
    """page → what a reader sees of it, with plain spaces."""

    def visible(page: str) -> str:
        page = re.sub(r"<(style|svg|script).*?</\1>", " ", page, flags=re.DOTALL)
        return re.sub(r"\s+", " ", html.unescape(re.sub(r"<[^>]+>", "", page)))

    return visible


@pytest.fixture
def phone_figures(monkeypatch):
    """Collect the figures of a page that a phone shows, each checked: its text has ten CSS pixels or more.

    A phone of 390 pixels leaves 350 of them to a page.
    """
    from matplotlib.figure import Figure
    from matplotlib.text import Text

    found: list[Figure] = []

    def checked(figure, label):
        if figure.get_figwidth() < 6:
            found.append(figure)
            texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
            assert min(text.get_fontsize() for text in texts) * 350 / figure.get_figwidth() / 72 >= 10, label
        return "[figure]"

    monkeypatch.setattr("experiments.report.page.inline", checked)
    return found


@pytest.fixture
def no_svg(monkeypatch):
    """Figures are made but not turned into SVG, which takes most of the time."""
    monkeypatch.setattr("experiments.report.page.inline", lambda figure, label: "[figure]")


@pytest.fixture(scope="session")
def write_metrics():
    """Leave a run's learning curve in its folder: 1024 tokens and 1e8 FLOPs a step."""

    def write(run, losses):
        run.mkdir(parents=True)
        with (run / "metrics.jsonl").open("w") as file:
            for step, loss in enumerate(losses, start=1):
                line = {"step": step, "tokens": 1024 * step, "flops_6nd": 1e8 * step, "loss": loss}
                file.write(json.dumps(line) + "\n")

    return write
