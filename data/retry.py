"""When and how often a remote request is tried again: backoff with jitter, counted by progress."""

import logging
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from data.errors import DataError

T = TypeVar("T")
LOG = logging.getLogger("nsphere.data")


class TransientError(Exception):
    """A request failed in a way that may pass: 503, a cut body, a timeout."""

    def __init__(self, reason: str, *, wait_s: float = 0.0, progress: bool = False) -> None:
        super().__init__(reason)
        self.wait_s = wait_s
        """What the server asked for (Retry-After)."""
        self.progress = progress
        """Some of the bytes came: ask for the rest at once."""


@dataclass(frozen=True)
class Retry:
    """How remote reads are repeated."""

    attempts: int = 6
    """Tries in a row that may bring nothing before the read fails."""
    timeout_s: float = 60.0
    """From a request to its last byte; a slower one is cut and asked for again."""
    first_wait_s: float = 0.5
    """Pause after the first failure; doubles each time, with jitter."""
    max_wait_s: float = 30.0
    """Longest pause."""

    def run(self, url: str, attempt: Callable[[], T]) -> T:
        """The result of `attempt`, repeated while it raises TransientError; DataError at last."""
        # A generator of its own: the jitter must not consume draws of the program's.
        jitter, failures = random.Random(), 0
        while True:
            try:
                return attempt()
            except TransientError as error:
                if error.progress:
                    failures = 0
                    continue
                failures += 1
                if failures >= self.attempts:
                    raise DataError(f"{url}: gave up after {failures} tries: {error}") from None
                backoff = self.first_wait_s * 2 ** (failures - 1) * jitter.uniform(0.5, 1.0)
                pause = min(max(backoff, error.wait_s), self.max_wait_s)
                LOG.warning("%s: %s; trying again in %.1f s", url, error, pause)
                time.sleep(pause)
