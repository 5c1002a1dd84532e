"""A progress bar with ETA for everything that takes more than two seconds. It writes to stderr only."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Advance = Callable[..., None]


@contextmanager
def progress_bar(description: str, total: float) -> Iterator[Advance]:
    """Show a bar until the block ends; the block calls `advance(amount=1, note="")`.

    On a terminal the bar is live; elsewhere (a log file, a pipe) a line is printed at most every tenth of
    the way and every five seconds, so that a log stays readable. Nested bars are allowed: the inner one is shown below.
    """
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

    console = Console(stderr=True)
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
            print(
                f"{description}: {10 * tenth} % {note} ({now - start:.0f} s, {left:.0f} s left)",
                file=sys.stderr,
            )

    return advance
