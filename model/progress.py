"""Progress bars with ETA on stderr, for work that takes more than two seconds."""

import select
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from typing import Any

Advance = Callable[..., None]
_PIECE = 1000  # characters; a pipe that poll reports as writable takes 4,096 bytes without blocking


class Patient:
    """A stream that never raises or blocks: text that a closed pipe or a stopped terminal does not take is lost.

    stream: sys.stderr, or None in a process without one.
    """

    def __init__(self, stream: Any):
        self._stream = stream

    def write(self, text: str) -> int:
        """Write as much as the stream takes now."""
        with suppress(OSError, ValueError):  # the stream is closed
            for start in range(0, len(text), _PIECE):
                if self._takes_more():
                    self._stream.write(text[start : start + _PIECE])
                    self._stream.flush()
        return len(text)

    def flush(self) -> None:
        """Do nothing: every write is flushed."""

    def isatty(self) -> bool:
        """Return whether the stream is a terminal."""
        with suppress(OSError, ValueError):
            return self._stream is not None and self._stream.isatty()
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def _takes_more(self) -> bool:
        if self._stream is None:
            return False
        try:
            descriptor = self._stream.fileno()
        except (OSError, ValueError, AttributeError):  # not a file of the operating system, such as a StringIO
            return True
        ready = select.poll()
        ready.register(descriptor, select.POLLOUT)
        return bool(ready.poll(0))


def patient(stream: Any) -> Any:
    """Return the stream as a `Patient`, or unchanged if it already writes to one."""
    through = getattr(stream, "rich_proxied_file", stream)  # rich wraps the stream while a bar is shown
    return stream if isinstance(through, Patient) else Patient(stream)


def say(text: str) -> None:
    """Print a line on stderr, without raising where that fails."""
    print(text, file=patient(sys.stderr))


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Advance]:
    """Show a bar until the block ends; the block calls `advance(amount=1, note="")`.

    On a terminal the bar is live; elsewhere (a log file, a pipe) lines are printed at least a tenth of the work and
    five seconds apart, so that a log stays readable. Bars can be nested: the inner one is shown below.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(file=patient(sys.stderr))
    if not console.is_terminal:
        yield _plain_lines(description, total)
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f} %"),
        TextColumn("{task.fields[note]}"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=False, refresh_per_second=4) as bar:
        task = bar.add_task(description, total=total, note="")
        yield lambda amount=1, note="": bar.update(task, advance=amount, note=note)


def progress_bar_if(shown: bool, description: str, total: float) -> AbstractContextManager[Advance]:
    """Show a bar as `progress_bar` does if `shown`, otherwise nothing."""
    return progress_bar(description, total) if shown else nullcontext(lambda amount=1, note="": None)


def _plain_lines(description: str, total: float) -> Advance:
    start = printed_at = time.perf_counter()
    done, printed = 0.0, 0

    def advance(amount: float = 1, note: str = "") -> None:
        nonlocal done, printed, printed_at
        done += amount
        now, tenth = time.perf_counter(), int(10 * done / total) if total else 10
        if tenth > printed and now - printed_at > 5:
            printed, printed_at = tenth, now
            left = (now - start) * (total - done) / max(done, 1e-9)
            say(f"{description}: {10 * tenth} % {note} ({now - start:.0f} s, {left:.0f} s left)")

    return advance
