"""A peer as a child process: one line in, one JSON line out."""

import contextlib
import json
import os
import signal
import subprocess
from pathlib import Path
from typing import IO, Any, Self

from model.errors import InputError

GRACE_SECONDS = 5.0


class Child:
    """A program that says one JSON line when it is ready, then one per line it is told.

    Leaving the context ends it, by an exception at once. name: for what goes wrong; log: a file for what it writes to
    its standard error.
    """

    def __init__(self, command: list[str], name: str, log: Path):
        self.name, self.log = name, log
        with log.open("w") as errors:
            self.process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                text=True,
                start_new_session=True,  # Ctrl-C reaches this process alone, which then ends the child
            )
        self.ready: dict[str, Any] = {}

    def __enter__(self) -> Self:
        try:
            self.ready = self._answer()
        except BaseException:
            self.close(0)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.close(GRACE_SECONDS if kind is None else 0)

    def ask(self, line: str) -> dict[str, Any]:
        """Return the child's answer to one line. Raises InputError with its last words where it ended instead."""
        with contextlib.suppress(BrokenPipeError):  # the missing answer says why
            print(line, file=_open(self.process.stdin), flush=True)
        return self._answer()

    def close(self, grace_seconds: float) -> None:
        """End the child by the end of its input; past the grace by force, with the compilers that it started."""
        with contextlib.suppress(BrokenPipeError):
            _open(self.process.stdin).close()
        try:
            self.process.wait(timeout=grace_seconds)
        except subprocess.TimeoutExpired:
            os.killpg(self.process.pid, signal.SIGKILL)  # its own group: it was started as a session's leader
            self.process.wait()
        _open(self.process.stdout).close()

    def _answer(self) -> dict[str, Any]:
        line = _open(self.process.stdout).readline()
        if not line:
            lines = self.log.read_text(errors="replace").strip().splitlines()
            raise InputError(f"{self.name} failed: {lines[-1] if lines else 'it said nothing'}")
        return json.loads(line)


def python_has(python: str, module: str) -> bool:
    """Return whether that Python can be started and finds the module."""
    look = f"import importlib.util as u, sys; sys.exit(not u.find_spec({module!r}))"
    try:
        return subprocess.run([python, "-c", look], capture_output=True).returncode == 0
    except OSError:
        return False


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
