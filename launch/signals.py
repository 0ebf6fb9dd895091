"""SIGTERM, SIGUSR1, SIGINT -> "save and stop after this step"; a second one leaves at once.

Imports nothing heavy: the handlers must stand before torch is imported, or a signal in those
seconds kills the rank.
"""

import ctypes
import os
import signal
import sys
from types import FrameType

STOPPED = 85
"""Exit code of a run that saved and stopped because it was asked to: start it again to go on."""

BAD_INPUT = 2
"""Exit code when the command line, the configuration or the data must be mended first."""

RANK_LOST = 86
"""Exit code of a rank that left because another one died or fell silent: start again to go on."""

_PR_SET_PDEATHSIG = 1


class StopRequest:
    """True once a signal has asked this process to stop; called without arguments."""

    def __init__(self) -> None:
        self._received: int | None = None

    def __call__(self) -> bool:
        return self._received is not None

    def install(self) -> None:
        """Catch the three signals in this process from now on."""
        for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT):
            signal.signal(number, self._receive)

    def _receive(self, number: int, _: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
            return
        self._received = number
        name = signal.Signals(number).name
        sys.stderr.write(f"{name}: saving and stopping after this step (again: at once)\n")


def die_with_parent() -> None:
    """Let the kernel kill this rank when its launcher dies, even by SIGKILL (Linux).

    Ranks that outlive their launcher would go on writing into a run folder that a new start reads.
    """
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
