"""A thread in every rank that notices when this rank, or another one, makes no progress any more.

Ranks tell each other that they live (`trainer/beats.py`). The first to give up calls the others:
every living rank writes its stacks and its last collective to its log, and leaves with exit code
86. The caller says in one line who was lost, and records it.

A rank that waits for a busy one does not leave: busy is who moves on, or works in one of the long
phases (start, evaluation, save, plan), where the use of processor time counts as moving too.
"""

import faulthandler
import logging
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import NoReturn

from trainer.beats import Beat, BeatFile
from trainer.events import record_event
from trainer.flight import is_lost_peer, is_waiting, recent_collectives, shorten
from trainer.ranks import Ranks
from trainer.sections import LaunchConfig

RANK_LOST = 86  # launch/signals.py: another rank was lost, start again to go on
CPU_SHARE = 0.02  # of one core: less is the watching itself

logger = logging.getLogger("nsphere.watch")


class Progress:
    """Where this rank is: told by training, read by its watcher. A call costs 0.2 us."""

    def __init__(self) -> None:
        self.step = 0
        self.phase = "start"  # a long one, or "": steps
        self.last = (time.monotonic(), "start")

    def mark(self, part: str) -> None:
        """A part of the step (data_wait, towers, loss, ...) is done."""
        self.last = (time.monotonic(), part)

    def reached(self, step: int) -> None:
        """So many steps are done; the first ends the start."""
        self.step, self.phase = step, ""
        self.last = (time.monotonic(), "step")

    @contextmanager
    def long(self, phase: str) -> Iterator[None]:
        """Inside, the rank is busy as long as it computes, or reads and writes."""
        before, self.phase = self.phase, phase
        self.mark(f"begin of {phase}")
        try:
            yield
        finally:
            self.phase = before
            self.mark(phase)


@contextmanager
def watching(run: Path, ranks: Ranks, config: LaunchConfig) -> Iterator[Progress]:
    """Inside, this rank is watched and watches the others; every rank calls it together.

    An error that comes of a lost peer does not come out: this process leaves with exit code 86.
    """
    beats = BeatFile.open_together(run / "log" / ".beats", ranks)
    watcher = Watcher(run, ranks, config, beats)
    watcher.start()
    try:
        yield watcher.progress
    except BaseException as error:
        watcher.leave_if_lost(error)
        watcher.close(f"failed: {type(error).__name__}: {str(error)[:1000]}")
        raise
    watcher.close("done")


class Watcher:
    """One rank's watching thread."""

    def __init__(self, run: Path, ranks: Ranks, config: LaunchConfig, beats: BeatFile) -> None:
        self.progress = Progress()
        self._run, self._ranks, self._config, self._beats = run, ranks, config, beats
        self._log = run / "log" / f"rank-{ranks.rank:04d}.log"
        rare = min(5.0, max(1.0, 0.02 * ranks.world_size))  # one file serves all ranks
        self._interval = min(rare, max(0.1, config.timeout / 20))
        self._beat = Beat(ranks.rank, os.uname().nodename, os.getpid())
        self._heard: dict[int, tuple[Beat, float]] = {}  # each peer's last beat, when it was new
        self._looked = 0.0
        self._cpu = (0.0, 0.0)  # processor time so far, when it last grew
        self._closed = threading.Event()
        self._leaving = threading.Lock()
        self._thread = threading.Thread(target=self._watch, name="nsphere-watch", daemon=True)

    def start(self) -> None:
        """Begin to watch."""
        self._put()
        self._thread.start()

    def close(self, left: str) -> None:
        """End the watching; the peers know that this rank has gone, and why."""
        with self._leaving:  # for ever, if the thread is leaving
            self._closed.set()
        self._thread.join()
        self._beat = replace(self._beat, left=left)
        self._put()

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._closed.wait(self._interval):
            now = time.monotonic()
            if now - before > self._interval + 0.5 * self._config.timeout:
                self._wake(now)
            before = now
            try:
                self._take_pulse(now)
                self._put()
                if self._beats.called():
                    self._leave("", [])
                self._judge(now)
            except FileNotFoundError:
                self._leave("the run has been started anew without this rank", [])
            except OSError as error:  # a full or slow disk is no proof of anything
                logger.info("beat not written or read: %s", error)

    def _wake(self, now: float) -> None:
        """The whole job was suspended, perhaps: nobody is late yet."""
        self.progress.mark(self.progress.last[1])
        self._heard = {rank: (beat, now) for rank, (beat, _) in self._heard.items()}

    def _take_pulse(self, now: float) -> None:
        at, part = self.progress.last
        phase, cpu = self.progress.phase, time.process_time()
        if cpu - self._cpu[0] > CPU_SHARE * self._interval:
            self._cpu = (cpu, now)
        else:
            self._cpu = (cpu, self._cpu[1])
        idle = now - (max(at, self._cpu[1]) if phase else at)
        waiting = idle > 0.2 * self._config.timeout and is_waiting(recent_collectives())
        patient = phase == "start" or (phase and not waiting)
        limit = self._config.start_timeout if patient else self._config.timeout
        self._beat = replace(
            self._beat,
            count=self._beat.count + 1,
            part=part,
            step=self.progress.step,
            idle_s=round(idle, 1),
            silent=idle > limit,
            waiting=waiting,
        )

    def _put(self) -> None:
        try:
            self._beats.write(self._beat)
        except FileNotFoundError:
            if not self._closed.is_set():
                raise

    def _judge(self, now: float) -> None:
        """Leave if a peer is silent, or if this rank is and no other one is busy."""
        timeout, beat = self._config.timeout, self._beat
        idle = beat.idle_s > 0.2 * timeout or self.progress.phase
        if not idle or now - self._looked < 0.02 * self._ranks.world_size:
            return
        self._looked = now
        peers = self._hear(now)
        enough = (0.75 if beat.silent else 1.0) * timeout
        gone = [peer for peer, since in peers if now - since > enough]
        if gone:
            self._leave(f"no sign of life for {timeout:g} s", gone)
        if not beat.silent:
            return
        if not beat.waiting:
            self._leave(f"no progress for {beat.idle_s:.0f} s, in its own code", [beat])
        if all(peer.silent and peer.waiting for peer, _ in peers):
            apart = [peer for peer, _ in peers if peer.node != beat.node]
            self._leave(
                f"every rank has waited for the others for {beat.idle_s:.0f} s (is the network "
                "between the hosts down?)",
                apart or [peer for peer, _ in peers],
            )

    def _hear(self, now: float) -> list[tuple[Beat, float]]:
        """The peers that have not left, and when each was last new."""
        for beat in self._beats.read():
            known = self._heard.get(beat.rank)
            if known is None or known[0].count != beat.count or beat.left:
                self._heard[beat.rank] = (beat, now)
        others = (pair for rank, pair in self._heard.items() if rank != self._ranks.rank)
        return [(beat, since) for beat, since in others if not beat.left]

    def leave_if_lost(self, error: BaseException) -> None:
        """Leave if `error` comes of a peer that is gone; else return."""
        if self._ranks.world_size == 1 or not isinstance(error, RuntimeError):
            return
        try:
            dead = [peer for peer in self._beats.read() if not peer.left and self._is_dead(peer)]
        except OSError:
            dead = []
        if dead or is_lost_peer(error):
            self._leave(f"the connection to a peer broke ({shorten(error)})", [], error)

    def _is_dead(self, peer: Beat) -> bool:
        """Whether a process of this very host has ended."""
        if peer.node != self._beat.node or peer.rank == self._ranks.rank:
            return False
        try:
            state = Path(f"/proc/{peer.pid}/stat").read_text().rpartition(")")[2].split()[0]
        except OSError:
            return True
        return state in "ZX"

    def _leave(
        self, why: str, gone: Sequence[Beat], error: BaseException | None = None
    ) -> NoReturn:
        """Write stacks and last collective to the log, tell people, end this process."""
        self._leaving.acquire()  # never let go
        first = False
        try:
            first = self._beats.call(self._ranks.rank, why) if why else False
            call = self._beats.called() or {"rank": self._ranks.rank, "why": why}
            why = why or f"called by rank {call['rank']}: {call['why']}"
            self._dump(why, error)
            self._beat = replace(self._beat, left="lost")
            self._beats.write(self._beat)
            if first:
                self._tell(why, *self._roll_call(gone))
        except OSError:
            self._dump(why, error)
        finally:
            sys.stderr.flush()
            os._exit(RANK_LOST)

    def _dump(self, why: str, error: BaseException | None) -> None:
        recent = recent_collectives()
        with self._log.open("a") as log:
            log.write(f"--- leaving: {why}; {self._beat}, {self._beat.place}\n")
            last = [str(collective) for collective in recent[-3:]] or ["none"]
            log.write("--- last collectives: " + "; ".join(last) + "\n")
            if error is not None:
                log.writelines(traceback.format_exception(error))
            log.write("--- stacks of all threads\n")
            log.flush()
            faulthandler.dump_traceback(log, all_threads=True)

    def _roll_call(self, gone: Sequence[Beat]) -> tuple[list[Beat], list[Beat]]:
        """(ranks that are gone, ranks that failed by themselves), once the living have answered."""
        known = {peer.rank for peer in gone}
        until = time.monotonic() + 2 * self._interval + 1.0
        while True:
            peers = [peer for peer in self._beats.read() if peer.rank != self._ranks.rank]
            open_ = [peer for peer in peers if not peer.left and peer.rank not in known]
            failed = [peer for peer in peers if peer.left.startswith("failed")]
            late = [peer for peer in open_ if not self._is_dead(peer)]
            ending = [peer for peer in failed if not self._is_dead(peer)]
            if (not late and not ending) or time.monotonic() > until:
                return [*gone, *open_], failed
            time.sleep(0.05)

    def _tell(self, why: str, gone: Sequence[Beat], failed: Sequence[Beat]) -> None:
        """One line to people, and the event."""
        if failed and not gone:
            text = f"{failed[0]} ended by its own error ({failed[0].left}); this rank leaves"
            sys.stderr.write(f"nsphere, rank {self._ranks.rank}: {text}\n")
            details = {"step": self.progress.step, "how": "failed", "why": str(failed[0].left)}
            if failed[0].rank != 0:  # it has told so itself
                record_event(self._run, "end", details)
            return
        names = ", ".join(f"{peer}, last heard {peer.place}" for peer in gone)
        sys.stderr.write(
            f"nsphere, rank {self._ranks.rank}: lost {names or 'no rank by name'}: {why}; "
            f"stacks in {self._log.parent}/rank-*.log\n"
        )
        recent = recent_collectives()
        details = {
            "ranks": [peer.rank for peer in gone],
            "nodes": sorted({peer.node for peer in gone}),
            "why": why,
            "step": self.progress.step,
            "last_heard": {str(peer.rank): peer.place for peer in gone},
            "last_collective": recent[-1].to_json() if recent else None,
        }
        record_event(self._run, "lost", details)
