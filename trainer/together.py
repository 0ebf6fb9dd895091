"""Work on threads that all ranks wait for together, by short collectives of their main threads.

No collective lasts as long as the work: what is slow on one rank holds nobody in a call that could
time out, what fails on any rank is known to all at once, and a rank that dies breaks the next call.
"""

import errno
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
import torch.distributed as dist

from trainer.checkpoint import CheckpointError
from trainer.config import ConfigError
from trainer.ranks import Ranks

T = TypeVar("T")
_LONGEST_PAUSE_S = 0.1  # between two looks at whether every rank is done
_TELL_EVERY_S = 60.0
_ADVICE = {
    errno.ENOSPC: ": make room on that disk, or lower checkpoint.keep_last",
    errno.EDQUOT: ": your quota there is used up",
    errno.EFBIG: ": the file system or a limit (ulimit -f) allows no larger file",
    errno.EROFS: ": that file system is mounted read-only",
    errno.EACCES: ": this user may not write there",
    errno.EIO: ": the disk is failing",
    errno.ESTALE: ": the file server has lost that folder",
}

logger = logging.getLogger("nsphere.checkpoint")


@dataclass(frozen=True)
class Failure:
    """Why a rank could not do its part."""

    reason: str
    refused: bool = False  # by the disk: it may take the next save
    bad_input: bool = False  # a ConfigError: for the user to mend

    @classmethod
    def of(cls, error: Exception) -> "Failure":
        """What the system said, of which file, and what to do about it."""
        if isinstance(error, OSError):
            place = f" ({error.filename})" if error.filename else ""
            advice = _ADVICE.get(error.errno or 0, "")
            return cls(f"{error.strerror or error}{place}{advice}", refused=True)
        known = isinstance(error, (ConfigError, CheckpointError))
        bad_input = isinstance(error, ConfigError)
        return cls(str(error) if known else repr(error), bad_input=bad_input)


@dataclass(frozen=True)
class Outcome(Generic[T]):
    """What a job returned, or why it failed."""

    value: T | None = None
    failure: Failure | None = None


class Job(Generic[T]):
    """Work on a thread, which must not use collectives; its end is asked for by the main thread."""

    def __init__(self, work: Callable[[], T]) -> None:
        self._work = work
        self._outcome: Outcome[T] = Outcome()
        self._thread = threading.Thread(target=self._run, name="nsphere-save", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self._outcome = Outcome(self._work())
        except Exception as error:  # noqa: BLE001 - told to every rank's main thread
            self._outcome = Outcome(failure=Failure.of(error))

    def is_done(self) -> bool:
        """Whether it has ended, well or not."""
        return not self._thread.is_alive()

    def outcome(self) -> Outcome[T]:
        """How it ended; waits for that."""
        self._thread.join()
        return self._outcome


@dataclass(frozen=True)
class Together:
    """The ranks of a run as one that waits; every rank calls each method."""

    ranks: Ranks
    beat: Callable[[], None]  # called again and again while this rank waits

    def all(self, here: bool) -> bool:  # noqa: FBT001
        """Whether it is true on every rank."""
        if self.ranks.world_size == 1:
            return here
        flag = torch.tensor([here], dtype=torch.int64, device=self.ranks.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.ranks.group)
        return bool(flag.item())

    def gather(self, item: Any) -> list[Any]:
        """Each rank's item, in order."""
        if self.ranks.world_size == 1:
            return [item]
        items: list[Any] = [None] * self.ranks.world_size
        dist.all_gather_object(items, item, group=self.ranks.group)
        return items

    def wait_until(self, is_done: Callable[[], bool], what: str) -> None:
        """Return when it is true on every rank; `what` is named to people if it takes long here."""
        pause, started, told = 0.001, time.monotonic(), 0.0
        while not self.all(done := is_done()):
            self.beat()
            time.sleep(pause)
            pause = min(pause * 1.5, _LONGEST_PAUSE_S)
            waited = time.monotonic() - started
            if not done and waited - told > _TELL_EVERY_S:
                told = waited
                logger.warning("%s takes long: %.0f s so far", what, waited)

    def run(self, work: Callable[[], T], what: str) -> list[T | None]:
        """What `work` returned on each rank, run on a thread however long it takes.

        Raises ConfigError or CheckpointError, on all ranks, with the first failure's words.
        """
        job = Job(work)
        self.wait_until(job.is_done, what)
        outcomes: list[Outcome[T]] = self.gather(job.outcome())
        for outcome in outcomes:
            if outcome.failure is not None:
                kind = ConfigError if outcome.failure.bad_input else CheckpointError
                raise kind(outcome.failure.reason)
        return [outcome.value for outcome in outcomes]
