"""Write the reference page of the `isoflop` command from its docstrings: python -m experiments.reference > FILE."""

import ast
import dataclasses
import inspect
import re
import shlex
import textwrap
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import tyro

from experiments.cli import COMMANDS, Tree

_HEAD = """# Every command

`--help` after any command prints the same in the terminal. A flag marked `...` takes several values with spaces
between them (`--batch 1 8`). A default of `–` means that the command does without the flag. Exit codes: 0 success, 1 a
failure, 2 a wrong call or input (one sentence on stderr), 130 Ctrl-C.

`python -m experiments.reference > docs/reference.md` writes this page from the docstrings of the commands.
"""
_WIDTH = 116
_REQUIRED = inspect.Parameter.empty


class Argument(NamedTuple):
    """A row of a command's table: the argument as it is typed, its default, what it means."""

    usage: str
    default: str
    meaning: str


def page() -> str:
    """Return the page: a table of all commands, then a section for each."""
    commands = list(leaves(COMMANDS))
    index = [
        f"| [`{name}`](#{name.replace(' ', '-')}) | {_cell(_paragraphs(command)[0])} |" for name, command in commands
    ]
    table = "\n".join(["| command | what it does |", "|---|---|", *index])
    return "\n".join([_HEAD, table + "\n", *(_section(name, command) for name, command in commands)])


def leaves(tree: Tree, prefix: str = "isoflop") -> Iterator[tuple[str, Callable[..., None]]]:
    """Yield each command of a tree with its whole name, in the order of the help."""
    for name, entry in tree.items():
        if isinstance(entry, tuple):
            yield from leaves(entry[1], f"{prefix} {name}")
        else:
            yield f"{prefix} {name}", entry


def arguments(command: Callable[..., None]) -> Iterator[Argument]:
    """Yield the arguments of a command, those of a group of options in the group's place."""
    meanings = _documented(command)
    for name, parameter in inspect.signature(command).parameters.items():
        kind, notes = _unwrapped(parameter.annotation)
        if dataclasses.is_dataclass(kind) and isinstance(kind, type):
            yield from _options(kind, next(note.name for note in notes if hasattr(note, "name")))
        else:
            yield _argument(name, kind, notes, parameter.default, meanings[name])


def _options(group: type, prefix: str) -> Iterator[Argument]:
    meanings, annotations = _attribute_docstrings(group), typing.get_type_hints(group, include_extras=True)
    for field in dataclasses.fields(group):
        default = _REQUIRED if field.default is dataclasses.MISSING else field.default
        name = f"{prefix}.{field.name}" if prefix else field.name
        yield _argument(name, *_unwrapped(annotations[field.name]), default, meanings[field.name])


def _argument(name: str, kind: Any, notes: tuple[Any, ...], default: Any, meaning: str) -> Argument:
    metavar = next((note.metavar for note in notes if getattr(note, "metavar", None)), None)
    if tyro.conf.Positional in notes:
        usage = (metavar or name.upper()).strip("[]")
        if metavar is None and typing.get_origin(kind) is typing.Literal:
            usage = _placeholder(kind)
    else:
        prefix = "--no-" if default is True else "--"
        usage = prefix + name.replace("_", "-") + ("" if kind is bool else f" {metavar or _placeholder(kind)}")
    return Argument(usage, _default(default), meaning)


def _unwrapped(annotation: Any) -> tuple[Any, tuple[Any, ...]]:
    """Return (the type behind Annotated, its annotations)."""
    if typing.get_origin(annotation) is typing.Annotated:
        kind, *notes = typing.get_args(annotation)
        return kind, tuple(notes)
    return annotation, ()


def _placeholder(kind: Any) -> str:
    """Return what stands for a value of a type in the usage: INT, {a,b}, PATH ... for a tuple of paths."""
    origin, inner = typing.get_origin(kind), [part for part in typing.get_args(kind) if part is not types.NoneType]
    if origin is tuple:
        return f"{_placeholder(inner[0])} ..."
    if origin is typing.Literal:
        return "{" + ",".join(map(str, inner)) + "}"
    if origin in (typing.Union, types.UnionType):
        return _placeholder(inner[0])
    return {str: "TEXT", bool: "{True,False}"}.get(kind, kind.__name__.upper())


def _default(value: Any) -> str:
    if value is _REQUIRED:
        return "required"
    if value is None or isinstance(value, bool) or value == ():
        return "–"
    words = value if isinstance(value, tuple) else (value,)
    return "`" + " ".join(f"{word:.4g}" if isinstance(word, float) else str(word) for word in words) + "`"


def _documented(command: Callable[..., None]) -> dict[str, str]:
    """Return the meaning of each argument in the docstring's section Args."""
    _, _, section = (inspect.getdoc(command) or "").partition("\nArgs:\n")
    found = re.findall(r"^    (\w+): (.*(?:\n     .*)*)", section, re.MULTILINE)
    return {name: " ".join(text.split()) for name, text in found}


def _attribute_docstrings(group: type) -> dict[str, str]:
    """Return the string below each field of a dataclass."""
    body = ast.parse(textwrap.dedent(inspect.getsource(group))).body[0]
    assert isinstance(body, ast.ClassDef)
    found = {}
    for field, below in zip(body.body, body.body[1:], strict=False):
        if isinstance(field, ast.AnnAssign) and isinstance(below, ast.Expr) and isinstance(below.value, ast.Constant):
            found[ast.unparse(field.target)] = " ".join(str(below.value.value).split())
    return found


def _section(name: str, command: Callable[..., None]) -> str:
    paragraphs = _paragraphs(command)
    prose = [textwrap.fill(text, _WIDTH) for text in paragraphs if not text.startswith("Example: ")]
    examples = [_broken(text.removeprefix("Example: ")) for text in paragraphs if text.startswith("Example: ")]
    block = ["<!-- not run: examples, with placeholder names -->", "```sh", *examples, "```"]
    rows = [f"| `{usage}` | {default} | {_cell(meaning)} |" for usage, default, meaning in arguments(command)]
    table = ["| argument | default | meaning |", "|---|---|---|", *rows]
    return "\n\n".join([f"## {name}", *prose, "\n".join(block), "\n".join(table)]) + "\n"


def _paragraphs(command: Callable[..., None]) -> list[str]:
    """Return the paragraphs of a docstring above its arguments, each as one line."""
    prose = (inspect.getdoc(command) or "").partition("\nArgs:\n")[0]
    return [" ".join(text.split()) for text in prose.strip().split("\n\n")]


def _broken(line: str) -> str:
    """Return a command line, continued on further lines where it is longer than a line of code."""
    words = shlex.shlex(line, posix=False)  # quotes stay, and what they hold is one word
    words.whitespace_split, words.commenters = True, ""
    lines = [""]
    for word in words:
        if len(lines[-1]) + len(word) > _WIDTH - 3:
            lines.append(" ")
        lines[-1] += f" {word}" if lines[-1] else word
    return " \\\n".join(lines)


def _cell(text: str) -> str:
    """Return text for a cell of a table, in which a bar would end the cell and a star begin emphasis."""
    return re.sub(r"([|*<])", r"\\\1", text)


if __name__ == "__main__":
    print(page(), end="")
