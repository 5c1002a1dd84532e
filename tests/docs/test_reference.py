"""docs/reference.md is what its program writes, and names every flag that the commands have."""

import re
from pathlib import Path

import pytest
import tyro

from experiments import cli, reference

PAGE = Path(__file__).parents[2] / "docs" / "reference.md"
COMMANDS = dict(reference.leaves(cli.COMMANDS))


def test_the_page_is_up_to_date():
    written = PAGE.read_text(encoding="utf-8")
    assert written == reference.page(), "run: python -m experiments.reference > docs/reference.md"


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_s_flags_are_those_of_its_help(name, capsys):
    with pytest.raises(SystemExit):
        tyro.cli(COMMANDS[name], prog=name, args=["--help"], config=cli.CONFIG)
    shown = set(re.findall(r"^. (?:-h, )?(--[a-z][\w.-]*)", capsys.readouterr().out, re.MULTILINE))
    rows = [argument.usage.split()[0] for argument in reference.arguments(COMMANDS[name])]
    assert {row for row in rows if row.startswith("--")} == shown - {"--help"}
