"""Ranks that meet over a store which an earlier attempt has used, as torchrun's agent keeps it.

The agent's store lives through its restarts, with the addresses under which the dead ranks of the
last attempt could be reached, and torch (2.15) puts nothing between the attempts (pytorch #167288).
The agents' restart counts are no help: they differ from node to node. So rank 0 draws a name for
this attempt and gives it to those that are alive now.
"""

import json
import threading
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]

ANSWER_S = 20.0  # a store that is there answers at once
_POLL_S = 0.02
T = TypeVar("T")


def within(seconds: float, call: Callable[[], T]) -> T:
    """What `call` returns or raises; TimeoutError if it does neither in so many seconds.

    A client of torch's store (2.15) waits without end for the greeting of what listens at its
    address and is no store, whatever its time limit.
    """
    results: list[T] = []
    errors: list[BaseException] = []

    def run() -> None:
        try:
            results.append(call())
        except BaseException as error:  # noqa: BLE001 - raised again where it is waited for
            errors.append(error)

    thread = threading.Thread(target=run, name="nsphere-meeting", daemon=True)
    thread.start()
    thread.join(seconds)
    if errors:
        raise errors[0]
    if not results:
        raise TimeoutError(f"no answer for {seconds:g} s")
    return results[0]


def meet(
    store: Store, rank: int, world_size: int, timeout_s: float, prefix: str = "nsphere"
) -> PrefixStore:
    """A part of `store` that these living ranks share and nobody has used before.

    Every rank says hello with a word of its own. Rank 0 answers with a name and the words it has
    seen; who finds its own word there agrees, and when all have agreed the name holds. A word of a
    dead rank is overwritten by the living one's, and rank 0 answers anew. Raises RuntimeError when
    ranks do not come in time.
    """
    until = time.monotonic() + timeout_s
    word = uuid.uuid4().hex
    store.set(f"{prefix}/hello/{rank}", word)
    if rank == 0:
        return PrefixStore(_gather(store, world_size, until, prefix), store)
    agreed = ""
    while True:
        name, words, final = _offer(store, prefix)
        if len(words) == world_size and words[rank] == word:
            if final:
                return PrefixStore(name, store)
            if name != agreed:
                store.set(f"{name}/agreed/{rank}", word)
                agreed = name
        if time.monotonic() > until:
            raise RuntimeError(
                f"rank {rank} of {world_size}: rank 0 did not answer within {timeout_s:.0f} s: "
                "connection timed out"
            )
        time.sleep(_POLL_S)


def _gather(store: Store, world_size: int, until: float, prefix: str) -> str:
    name, offered = "", [""]
    keys = [f"{prefix}/hello/{rank}" for rank in range(world_size)]
    while True:
        words = [_get(store, key) for key in keys]
        if words != offered and all(words):
            name, offered = f"{prefix}/{uuid.uuid4().hex}", words
            store.set(f"{prefix}/offer", json.dumps([name, words, False]))
        here = [
            bool(name) and bool(_get(store, f"{name}/agreed/{r}")) for r in range(1, world_size)
        ]
        if name and words == offered and all(here):
            store.set(f"{prefix}/offer", json.dumps([name, words, True]))
            return name
        if time.monotonic() > until:
            missing = [r for r, agrees in enumerate(here, start=1) if not agrees]
            raise RuntimeError(
                f"ranks {missing} of {world_size} did not come: connection timed out"
            )
        time.sleep(_POLL_S)


def _offer(store: Store, prefix: str) -> tuple[str, list[str], bool]:
    text = _get(store, f"{prefix}/offer")
    if not text:
        return "", [], False
    name, words, final = json.loads(text)
    return name, words, final


def _get(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
