"""Run a peer as a child process: one line in, one JSON line out."""

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
    """A program that writes one JSON line when it is ready, then one per line that it reads.

    Leaving the context ends it, immediately after an exception. name: for error messages; log: a file for its standard
    error.
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
        """Return the child's answer to one line. Raises InputError with its last output if it ended instead."""
        with contextlib.suppress(BrokenPipeError):  # the missing answer is reported below
            print(line, file=_open(self.process.stdin), flush=True)
        return self._answer()

    def close(self, grace_seconds: float) -> None:
        """Close the child's input, which ends it; after a grace period kill it and its children."""
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
            raise InputError(f"{self.name} failed: {lines[-1] if lines else 'it wrote no error message'}")
        return json.loads(line)


def python_has(python: str, module: str) -> bool:
    """Return whether that Python starts and can import the module."""
    look = f"import importlib.util as u, sys; sys.exit(not u.find_spec({module!r}))"
    try:
        return subprocess.run([python, "-c", look], capture_output=True).returncode == 0
    except OSError:
        return False


def _open(stream: IO[str] | None) -> IO[str]:
    assert stream is not None
    return stream
