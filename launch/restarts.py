"""What the exit codes of ranks mean, and whether their run is started again."""

import signal
from collections.abc import Collection, Mapping
from pathlib import Path

from launch.signals import BAD_INPUT, OWN_ERROR, RANK_LOST, STOPPED, say
from trainer.events import read_events, record_event

FINAL = (0, OWN_ERROR, BAD_INPUT, STOPPED)
"""Codes after which the same command would not get further, or was asked not to go on."""


def verdict(codes: Collection[int]) -> int:
    """The job's exit code from those of its ranks; one that a signal killed has -number.

    What killed a rank comes before what its peers then ran into, and a rank's own error before
    the leaving of those that lost it.
    """
    killed = [code for code in codes if code < 0]
    if killed:
        return 128 - min(killed)
    for code in (BAD_INPUT, OWN_ERROR, STOPPED):
        if code in codes:
            return code
    others = [code for code in codes if code not in (0, RANK_LOST)]
    return max(others) if others else RANK_LOST if RANK_LOST in codes else 0


def explain(codes: Mapping[int, int]) -> str:
    """One line on how ranks ended: rank -> code of those that did not end with 0."""
    parts = []
    for rank, code in sorted(codes.items()):
        if code < 0:
            hint = " (out of memory?)" if code == -signal.SIGKILL else ""
            parts.append(f"rank {rank} was killed by {signal.Signals(-code).name}{hint}")
        elif code not in (0, RANK_LOST):
            parts.append(f"rank {rank} ended with exit code {code}")
    left = sorted(rank for rank, code in codes.items() if code == RANK_LOST)
    if left:
        names = ", ".join(map(str, left[:8])) + (", ..." if len(left) > 8 else "")
        parts.append(f"rank {names} left because a peer was lost (exit code {RANK_LOST})")
    return "; ".join(parts)


class Restarts:
    """Counts the restarts of a run that brought no newer checkpoint."""

    def __init__(self, run: Path, most: int) -> None:
        self._run, self._most = run, most
        self._in_row = 0
        self._step = self._newest()

    def allow(self, codes: Mapping[int, int], *, record: bool = True) -> bool:
        """Whether the run is started again after its ranks ended so; says and records it."""
        code = verdict(codes.values())
        if code in FINAL:
            return False
        step, why = self._newest(), explain(codes)
        if step > self._step:
            self._step, self._in_row = step, 0
        place = f"step {step}" if step else "the start"
        if self._in_row >= self._most:
            say(
                f"nsphere: {why}; not restarted: {self._in_row} restarts in a row from {place} "
                f"brought no newer checkpoint (launch.max_restarts = {self._most})"
            )
            return False
        self._in_row += 1
        say(f"nsphere: {why}; restart {self._in_row} of {self._most} from {place}")
        if record:
            record_event(self._run, "restart", {"code": code, "why": why})
        return True

    def note(self, why: str, *, record: bool) -> None:
        """A restart that nobody's failure brought about: it is not counted."""
        say(f"nsphere: {why}; starting all ranks again")
        if record:
            record_event(self._run, "restart", {"code": 0, "why": why})

    def _newest(self) -> int:
        """Step of the newest checkpoint folder; their renaming into place makes them count."""
        names = (path.name.removeprefix("step-") for path in self._run.glob("checkpoints/step-*"))
        return max((int(name) for name in names if name.isdigit()), default=0)

    def ended(self) -> str:
        """How rank 0 says that the run ended: "done", "stopped", "failed"; "" where it did not."""
        ends = [event for event in read_events(self._run) if event["event"] in ("start", "end")]
        return str(ends[-1].get("how", "")) if ends else ""
