"""Worker processes: pieces of work in, what they load out, in order, whoever dies meanwhile."""

import ctypes
import logging
import multiprocessing
import os
import signal
import sys
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import chain
from multiprocessing.util import Finalize
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from data.config import DataConfig
from data.errors import DataError

MOST_DEATHS = 3
"""Times in a row, with nothing loaded between, that workers may die before it is an error."""

_PR_SET_PDEATHSIG = 1  # man 2 prctl

_log = logging.getLogger("nsphere.data")


class Pool:
    """Pieces of work through a torch DataLoader: in order, read ahead, errors as raised.

    When a worker is killed, all are started anew and load again what was under way: a piece says
    all about what is loaded, so what comes out is the same.
    """

    def __init__(self, load: Callable[[Any], Any], config: DataConfig, *, pin: bool) -> None:
        self._work = _Work()
        self._ending = torch.zeros(1, dtype=torch.bool).share_memory_()
        workers = config.workers
        # Forked workers start in 0.1 s and share the index's memory; they never touch a device,
        # and torch gives them one thread, so no thread pool of the parent's is missed.
        self._new_loader = partial(
            DataLoader,
            _Loading(load),
            batch_size=None,
            sampler=self._work,
            collate_fn=_as_it_is,
            pin_memory=pin,
            num_workers=workers,
            prefetch_factor=config.prefetch if workers else None,
            persistent_workers=workers > 0,
            multiprocessing_context=multiprocessing.get_context("fork") if workers else None,
            worker_init_fn=partial(_start_worker, self._ending),
        )
        self._loader: DataLoader[Any] | None = None
        Finalize(self, _set, args=(self._ending,), exitpriority=100)

    def run(self, work: Iterable[Any]) -> Iterator[Any]:
        """The loaded item of each piece of work.

        Raises DataError when workers die again and again over the same piece.
        """
        rest, under_way, deaths = iter(work), deque[Any](), 0
        while True:
            again = list(under_way)
            under_way.clear()
            self._work.pieces = _noted(chain(again, rest), under_way)
            death = ""
            try:
                for loaded in self._start():
                    under_way.popleft()
                    deaths = 0
                    if isinstance(loaded, DataError):
                        raise loaded
                    yield loaded
            except (RuntimeError, EOFError, OSError) as error:
                death = _death(error)
                if not death:
                    raise
            if not death:
                return
            deaths += 1
            if deaths > MOST_DEATHS:
                raise DataError(
                    f"data workers died {deaths} times in a row (killed, often for lack of memory "
                    "or of /dev/shm, or a sample crashes its decoder): lower data.workers or "
                    f"data.prefetch; they were at {_named(under_way)}; {death}"
                )
            _log.warning(
                "%s; starting workers anew, %d pieces are loaded again", death, len(under_way)
            )
            self.close()

    def close(self) -> None:
        """End the workers."""
        _set(self._ending)
        self._loader = None

    def _start(self) -> Iterator[Any]:
        with warnings.catch_warnings():  # more workers than cores is the user's choice
            warnings.filterwarnings("ignore", "This DataLoader will create")
            if self._loader is None:
                self._ending.fill_(False)
                self._loader = self._new_loader()
            # torch's handler would raise wherever the training process happens to be, in the
            # middle of a step; without it the death is found where the next item is waited for.
            handler = signal.getsignal(signal.SIGCHLD)
            loading = iter(self._loader)
            if threading.current_thread() is threading.main_thread():
                signal.signal(signal.SIGCHLD, handler)
            return loading


class _Work:
    """Hands the DataLoader whatever pieces of work were set last."""

    pieces: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.pieces


class _Loading(Dataset[Any]):
    """A user's error travels as a value: torch would wrap it in the worker's traceback."""

    def __init__(self, load: Callable[[Any], Any]) -> None:
        self._load = load

    def __getitem__(self, piece: Any) -> Any:
        try:
            return self._load(piece)
        except DataError as error:
            return error


def _death(error: Exception) -> str:
    """What tells of a worker's death; empty: the error is something else.

    A worker that is killed while it hands an item over is seen as a connection that breaks, maybe
    before the system says that it is dead. What goes wrong inside a worker comes as "Caught ...".
    """
    text = str(error)
    if text.startswith("Caught "):
        return ""
    if isinstance(error, EOFError | ConnectionError | FileNotFoundError):
        return f"a data worker was lost while it handed an item over ({error!r})"
    return text if "DataLoader worker" in text else ""


def _noted(pieces: Iterator[Any], under_way: deque[Any]) -> Iterator[Any]:
    """The pieces, each put down before it is handed out."""
    for piece in pieces:
        under_way.append(piece)
        yield piece


def _named(under_way: deque[Any]) -> str:
    """The first piece that had not come back, in a few words."""
    return f"{under_way[0]!s:.120}" if under_way else "their start"


def _start_worker(ending: Tensor, _worker: int) -> None:
    # It holds copies of its parent's sockets: until it ends, the other ranks do not see that the
    # parent was killed, and torch's own watching takes up to 5 s.
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    # Ctrl-C, and a scheduler that signals every process of a job, are for the training process:
    # it saves and stops, and needs its workers until then. SIGTERM counts once it is leaving.
    for name in (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(name, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0) if ending.item() else None)


def _set(flag: Tensor) -> None:
    flag.fill_(True)


def _as_it_is(loaded: Any) -> Any:
    return loaded
