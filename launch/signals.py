"""SIGTERM, SIGUSR1, SIGINT -> "save and stop after this step"; a second one leaves at once.

Imports nothing heavy: the handlers must stand before torch is imported, or a signal in those
seconds kills the rank.
"""

import ctypes
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import NoReturn

STOPPED = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again to go on."""

OWN_ERROR = 1
"""Exit code of a run that went wrong by itself: the same command would not get further."""

BAD_INPUT = 2
"""Exit code when the command line, the configuration or the data must be mended first."""

RANK_LOST = 86
"""Exit code of a rank that left because another one died or fell silent: start again to go on."""

STOP_SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
SAME_REQUEST_S = 1.0
"""A request may come over two ways (a scheduler signals the steps and the batch script, which hands
it on): what comes so soon after the first signal is not a second one."""

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """True once a signal has asked this process to stop; called without arguments.

    Python's own handlers run in the main thread between two bytecodes: not while it waits in a
    collective for a peer that is gone. So a thread reads the signals from a pipe. Until somebody
    asks for the first time there is nothing to save, and a signal ends the process with STOPPED.
    """

    def __init__(self) -> None:
        self.times: list[float] = []
        """When a signal came, of each request."""
        self._asked = False
        self._handed_over = False
        self._first = 0  # signal; SIGTERM from its first time on
        self._pipe: tuple[int, int] | None = None

    def __call__(self) -> bool:
        self._asked = True
        return bool(self.times)

    def install(self) -> None:
        """Catch the three signals in this process from now on; in the main thread."""
        if self._pipe is not None:
            return
        self._pipe = os.pipe()
        os.set_blocking(self._pipe[1], False)
        for number in STOP_SIGNALS:
            signal.signal(number, _interrupt_nothing)
        signal.set_wakeup_fd(self._pipe[1], warn_on_full_buffer=False)
        # Blocked by the launcher or batch script (`env --block-signal`) while Python started: now
        # they come.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, STOP_SIGNALS)
        # A forked worker that is ended by SIGTERM would tell this process through the pipe.
        os.register_at_fork(after_in_child=_forget_pipe)
        threading.Thread(target=self._listen, name="nsphere-signals", daemon=True).start()

    def hand_over(self) -> None:
        """Only note the time of requests from now on: others in this process act on them."""
        self._handed_over = True

    def _listen(self) -> None:
        while self._pipe is not None:
            for number in os.read(self._pipe[0], 64):
                if number not in STOP_SIGNALS:
                    continue
                now = time.monotonic()
                if self.times and now - self.times[-1] < SAME_REQUEST_S:
                    continue
                if self._is_time_up(number):
                    continue
                self.times.append(now)
                if not self._handed_over:
                    self._save_or_leave(number)

    def _is_time_up(self, number: int) -> bool:
        """SLURM's SIGTERM at a time limit whose SIGUSR1 came before it.

        What is left until SIGKILL (KillWait, half a minute) is for the save that is under way.
        """
        if number != signal.SIGTERM or "SLURM_JOB_ID" not in os.environ:
            self._first = self._first or number
            return False
        before, self._first = self._first, number
        return before == signal.SIGUSR1

    def _save_or_leave(self, number: int) -> None:
        name, first = signal.Signals(number).name, os.environ.get("RANK", "0") == "0"
        if len(self.times) > 1:
            leave(128 + number, f"{name} again: leaving at once" if first else "")
        if not self._asked:
            leave(STOPPED, f"{name}: stopped before the first step" if first else "")
        if first:
            say(f"{name}: saving and stopping after this step (again: at once)")


def leave(code: int, text: str) -> NoReturn:
    """End this process at once, from any thread, with a line or without."""
    if text:
        say(text)
    os._exit(code)


def say(text: str) -> None:
    """One line on stderr, whole."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()


def _interrupt_nothing(_number: int, _frame: FrameType | None) -> None:
    """The pipe has it already; system calls under way are taken up again."""


def _forget_pipe() -> None:
    signal.set_wakeup_fd(-1)


def die_with_parent() -> None:
    """Let the kernel kill this rank when its launcher dies, even by SIGKILL (Linux).

    Ranks that outlive their launcher would go on writing into a run folder that a new start reads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def dies_of_usr1(pid: int) -> bool:
    """Whether a process neither catches nor ignores SIGUSR1, as torchrun by default (Linux)."""
    try:
        with open(f"/proc/{pid}/status", encoding="ascii", errors="replace") as file:
            masks = dict(
                line.split(":", 1) for line in file if line.startswith(("SigCgt", "SigIgn"))
            )
    except OSError:
        return False
    handled = int(masks.get("SigCgt", "0"), 16) | int(masks.get("SigIgn", "0"), 16)
    return not handled & 1 << (signal.SIGUSR1 - 1)
