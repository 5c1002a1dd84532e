"""README.md and docs/ hold: links resolve, command lines parse, and every block of code runs as it stands.

A block whose first line is a comment with a file's name is written to that file. A block below `<!-- not run: why -->`
is not run; its command lines are only parsed. The blocks of a page run in order, in the page's own copy of the code.
"""

import functools
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
import tyro

from experiments import cli

ROOT = Path(__file__).parents[2]
CONFIGS = ROOT / "experiments/configs"
PAGES = [ROOT / "README.md", CONFIGS / "README.md", *CONFIGS.glob("*.sh")]
PAGES += sorted(path for path in (ROOT / "docs").glob("*.md") if path.name != "LOG.md")
QUICK = ("isoflop model list", "isoflop model show", "isoflop completion", "isoflop doctor")
"""Commands in a page's text that are run as well."""
_BLOCK = re.compile(
    r"^(?:<!-- not run: (?P<why>[^>]+) -->\n)?```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL
)
_FILE = re.compile(r"# ([\w./-]+\.\w+)\n")
_CLONE = ("model", "train", "infer", "experiments", "tests", "pyproject.toml", "docs")
pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: f"{page.parent.name}-{page.stem}")


class Block(NamedTuple):
    """A fenced block; file: where it is written to; why: it is not run."""

    language: str
    text: str
    file: str | None
    why: str | None


def blocks(page: Path) -> Iterator[Block]:
    text = page.read_text(encoding="utf-8")
    if page.suffix == ".sh":
        yield Block("sh", text, None, "an example of something larger")
    for found in _BLOCK.finditer(text):
        file = _FILE.match(found["text"])
        yield Block(found["language"], found["text"], file[1] if file else None, found["why"])


def spoken(page: Path) -> list[list[str]]:
    """Return the commands of `isoflop` in a page's text."""
    if page.name == "reference.md":  # docstrings, which name parts of commands
        return []
    text = _BLOCK.sub("", page.read_text(encoding="utf-8"))
    return [shlex.split(code) for code in re.findall(r"`(isoflop\s[^`]+)`", text)]


def typed(block: Block) -> Iterator[list[str]]:
    """Yield the commands of `isoflop` in a block of shell, without what redirects, joins or precedes them."""
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.shlex(line, posix=True, punctuation_chars=True)
        words.whitespace_split = True
        command: list[str] = []
        for word in [*words, ";"]:
            if word.strip("();<>|&"):
                command.append(word)
                continue
            if "isoflop" in command:
                yield command[command.index("isoflop") :]
            command = []


def parse(words: list[str]) -> None:
    """Fail unless `isoflop` takes the command line; a bare name must be that of a command or a group."""
    program, called, left = cli.find(words[1:])
    if isinstance(called, tuple):
        assert not left, f"{program} has no {left[0]}"
        return
    if left:
        stub = functools.wraps(called)(lambda *_, **__: None)
        tyro.cli(stub, prog=program, args=left, config=cli.CONFIG)


@pages
def test_every_command_line_parses(page, capsys):
    lines = [words for block in blocks(page) if block.language == "sh" for words in typed(block)]
    for words in [*lines, *spoken(page)]:
        try:
            parse(words)
        except SystemExit as stop:
            if stop.code:  # 0: it is a call for help
                pytest.fail(f"{page.name}: {shlex.join(words)}\n{capsys.readouterr().err}")


@pages
def test_every_link_and_picture_is_there(page):
    targets = re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text(encoding="utf-8"))
    assert not [name for name in targets if "://" not in name and not (page.parent / name).exists()]


def test_every_page_is_linked_from_the_readme():
    readme = PAGES[0].read_text(encoding="utf-8")
    assert not [page for page in PAGES[1:] if page.suffix == ".md" and f"({page.relative_to(ROOT)})" not in readme]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory) -> Path:
    """One folder of data for all pages: to prepare it a second time does nothing."""
    return tmp_path_factory.mktemp("data")


@pytest.mark.long
@pages
def test_every_block_runs(page, tmp_path, monkeypatch, prepared):
    subprocess.run(["cp", "-r", *(ROOT / name for name in _CLONE), tmp_path], check=True)
    (tmp_path / "data").symlink_to(prepared)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    names: dict[str, object] = {}
    for block in blocks(page):
        if block.why:
            continue
        if block.file:
            Path(block.file).write_text(block.text, encoding="utf-8")
        elif block.language == "sh":
            _shell(block.text)
        elif block.language == "python":
            exec(compile(block.text, page.name, "exec"), names)
    for words in spoken(page):
        if shlex.join(words).startswith(QUICK):
            _shell(shlex.join(words))


def _shell(script: str) -> None:
    done = subprocess.run(["bash", "-euo", "pipefail", "-c", script], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, f"{script}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
