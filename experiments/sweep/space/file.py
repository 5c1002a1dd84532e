"""A space written in Python: a file that defines `space` with `experiments.sweep.space`."""

import traceback
from pathlib import Path

from experiments.sweep.space import Space
from model.errors import InputError


def load_space(source: str, path: Path) -> Space:
    """The `space` of a file's text, which must stand alone: the sweep keeps a copy of it.

    Raises InputError, with file and line, where it fails or has none.
    """
    names: dict[str, object] = {"__name__": "space", "__file__": str(path)}
    try:
        exec(compile(source, str(path), "exec"), names)
    except SyntaxError as error:
        raise InputError(f"{path}, line {error.lineno}: {error.msg}") from None
    except (Exception, SystemExit) as error:
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == str(path)]
        kind = "" if isinstance(error, InputError) else f"{type(error).__name__}: "
        raise InputError(f"{path}, line {lines[-1] if lines else '?'}: {kind}{error}") from error
    space = names.get("space")
    if not isinstance(space, Space):
        found = "has no `space`" if space is None else f"has a {type(space).__name__} as its `space`"
        raise InputError(f"{path} {found}; end it with, for example, space = grid(learning_rate=[1e-3, 3e-3])")
    return space
