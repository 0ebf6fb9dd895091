"""Progress with an ETA for long work on the command line."""

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

PLAIN_EVERY_S = 5.0


@contextmanager
def shard_progress(title: str) -> Iterator[Callable[[int, int], None]]:
    """A function (done, total) that shows a bar on a terminal, else a line every few seconds."""
    if not sys.stderr.isatty():
        yield _plain(title)
        return
    columns = (TextColumn(title), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _plain(title: str) -> Callable[[int, int], None]:
    start = last = time.monotonic()

    def show(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < PLAIN_EVERY_S or not done:
            return
        last = now
        remaining = (now - start) / done * (total - done)
        sys.stderr.write(f"{title} {done}/{total}, {remaining:.0f} s left\n")

    return show
