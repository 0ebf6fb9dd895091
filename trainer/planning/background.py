"""One plan at a time, made beside training on a thread of the first rank."""

import contextlib
import os
import threading
import time
from collections.abc import Callable
from typing import Generic, TypeVar

from data.errors import DataError

T = TypeVar("T")
_NICE = 10  # of the thread: training's own threads go first


class Job(Generic[T]):
    """Work on a thread of low priority; numpy and torch let the trainer's thread run meanwhile."""

    def __init__(self, work: Callable[[], T]) -> None:
        self.seconds = 0.0
        """What it took, once it is done."""
        self._work = work
        self._results: list[T] = []
        self._error = ""
        self._thread = threading.Thread(target=self._run, name="nsphere-plan", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):  # Linux alone gives a thread a priority of its own
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)
        started = time.monotonic()
        try:
            self._results.append(self._work())
        except Exception as error:  # noqa: BLE001 - told to the trainer's thread, which stops
            self._error = str(error) if isinstance(error, DataError | OSError) else repr(error)
        self.seconds = time.monotonic() - started

    def is_done(self, timeout_s: float = 0.0) -> bool:
        """Whether it has ended, after waiting so long at most."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def result(self) -> T:
        """What `work` returned; DataError with its reason where it failed. Waits for the end."""
        self._thread.join()
        if not self._results:
            raise DataError(f"a plan could not be made: {self._error}")
        return self._results[0]
