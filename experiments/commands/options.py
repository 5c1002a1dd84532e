"""Share flags, console and output files between commands."""

import errno
import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import tyro

from experiments.words import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from rich.console import Console
    from rich.table import Table

    from train.data.manifest import Manifest


def _metric_or_flag(words: list[str]) -> bool | str:
    """Return the one name behind a flag, or True if the flag has no value."""
    if len(words) > 1:
        raise ValueError(f"takes one metric at most, not {' '.join(words)}")
    return words[0] if words else True


JsonFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
PlotFile = Annotated[Path | None, tyro.conf.arg(metavar="FILE")]
OptionalMetric = Annotated[
    bool | str,
    tyro.constructors.PrimitiveConstructorSpec(
        nargs="*",
        metavar="[METRIC]",
        instance_from_str=_metric_or_flag,
        is_instance=lambda value: isinstance(value, (bool, str)),
        str_from_instance=lambda value: [] if value is True else [str(value)],
    ),
]
BasePath = Annotated[Path | None, tyro.conf.arg(metavar="PATH")]
"""The new place of the weights that a run started from, for a run that stores only its trained parameters."""
Overrides = Annotated[tuple[str, ...], tyro.conf.arg(metavar="NAME=VALUE ...")]
_FIGURES = (".svg", ".png", ".pdf")


def data_file(name: str) -> Path:
    """Return the path of a file that is kept for this user: in $XDG_DATA_HOME/isoflop (~/.local/share/isoflop)."""
    import os

    home = Path(os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share")
    return home / "isoflop" / name


def need_serving(command: str) -> None:
    """Raise InputError unless the packages of the extra `serve` are installed. command: that needs them."""
    import importlib.util

    from model.errors import InputError

    missing = [name for name in ("starlette", "uvicorn", "msgspec") if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"isoflop {command} needs {', '.join(missing)}; install the extra: pip install 'isoflop[serve]'"
        )


def console() -> "Console":
    """Return a console on standard output; wide enough for tables if that is a file or a pipe."""
    from rich.console import Console

    return Console() if Console().is_terminal else Console(width=160)


def new_table(*columns: str, title: str | None = None, padding: int = 1) -> "Table":
    """Return an empty table: words in the first column to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    look = {"box": box.SIMPLE_HEAD, "show_edge": False, "pad_edge": False, "padding": (0, padding, 0, 0)}
    table = Table(title=title, title_justify="left", title_style="bold", **look)  # type: ignore[arg-type]
    for index, name in enumerate(columns):
        table.add_column(name, justify="right" if index else "left", no_wrap=index > 0)
    return table


def origin() -> dict[str, Any]:
    """Return the fields of a document that describe its origin: the command, the device, versions."""
    import shlex

    from train.run import describe_device, versions

    return {"command": shlex.join(["isoflop", *sys.argv[1:]]), "device": describe_device(), "versions": versions()}


def write_document(path: Path | None, document: dict[str, Any]) -> None:
    """Write a command's numbers to `--json FILE` atomically; if that fails, print them."""
    from train.files import json_text, write_json

    if path is not None:
        document = {"schema_version": 1} | document
        try:
            with output(path):
                write_json(path, document)
        except Exception:
            print(json_text(document), flush=True)
            raise


@contextmanager
def output(path: Path) -> Iterator[None]:
    """Turn an OSError on writing to a path of the command line into an InputError."""
    from model.errors import InputError

    try:
        yield
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise InputError(f"cannot write {path}: {error.strerror or error}") from error


def say_fewer_tokens(requested: int, manifest: "Manifest") -> None:
    """Warn if --evaluate-tokens exceeds the tokens of the validation split.

    The default may exceed a small split without a warning.
    """
    there = manifest.splits["validation"].tokens - 1  # the first one is not predicted
    names = ("--evaluate-tokens", "--eval-tokens", "--max-tokens")  # the present one and former ones
    is_given = any(word.partition("=")[0].replace("_", "-") in names for word in sys.argv)
    if is_given and requested > there:
        say(
            f"--evaluate-tokens {requested:,} is more than the {there:,} tokens of the validation split;"
            " all of those are read"
        )


def say_unused(where: str, command: Callable[..., Any], **given: Any) -> None:
    """Warn about given flags that have no effect, such as a flag that needs --beams."""
    for name, value in given.items():
        if value != inspect.signature(command).parameters[name].default:
            flag = f"--{name.replace('_', '-')}"
            words = " ".join(map(str, value)) if isinstance(value, tuple) else value
            say(f"{flag} {words} does nothing {where}")


def check_plot(path: Path | None) -> None:
    """Raise InputError unless a figure can be written to a file of that suffix, before anything is computed."""
    from model.errors import InputError

    if path is not None and path.suffix.lower() not in _FIGURES:
        raise InputError(f"--plot {path}: the suffix should be one of {', '.join(_FIGURES)}")


def write_plot(path: Path, figure: "Figure", label: str) -> None:
    """Write `--plot FILE` atomically; label: alt text of an SVG, for screen readers."""
    import io

    from experiments.report.style import svg
    from train.files import write_atomically

    suffix, buffer = path.suffix.lower(), io.BytesIO()
    if suffix == ".svg":
        buffer.write(svg(figure, label).encode())
    else:
        figure.savefig(buffer, format=suffix[1:], dpi=150)
    with output(path):
        write_atomically(path, buffer.getvalue())
