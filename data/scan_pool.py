"""Processes that scan shards: plain children that take one line a shard and answer with one.

Not multiprocessing: its spawned children import the caller's main script again, so a script
without an `if __name__ == "__main__"` would start itself over when it opens a large set.
"""

import json
import os
import queue
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Self

from data.errors import DataError
from data.rows import Keys


class ScanPool:
    """`num_processes` children of the module `data.scan`; a `with` block ends them."""

    def __init__(self, num_processes: int) -> None:
        self._children: queue.SimpleQueue[subprocess.Popen[str]] = queue.SimpleQueue()
        self._all = [_start() for _ in range(num_processes)]
        for child in self._all:
            self._children.put(child)
        self.threads = ThreadPoolExecutor(num_processes)
        """One thread a child, to call `scan` from."""

    def scan(self, url: str, keys: Keys) -> None:
        """Write the index of a shard in a free child. Raises the child's DataError."""
        child = self._children.get()
        try:
            reply = _ask(child, json.dumps([url, *keys]))
        finally:
            self._children.put(child)
        if reply is None:
            raise DataError(f"{url}: the process that indexed it ended with {child.poll()}")
        if reply:
            raise DataError(reply)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if error is not None:
            for child in self._all:
                child.kill()
        self.threads.shutdown(cancel_futures=True)
        for child in self._all:
            child.communicate()


def _start() -> subprocess.Popen[str]:
    # The house lies in a checkout or in site-packages; no other `data` may come first.
    house = str(Path(__file__).resolve().parents[1])
    paths = [house, *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "data.scan"],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
    )


def _ask(child: subprocess.Popen[str], question: str) -> str | None:
    """The child's answer: empty, or what went wrong; None if it is dead."""
    if child.stdin is None or child.stdout is None:
        return None
    try:
        child.stdin.write(question + "\n")
        child.stdin.flush()
        line = child.stdout.readline()
    except OSError:
        return None
    return str(json.loads(line)) if line else None
