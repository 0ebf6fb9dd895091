"""What this rank's collectives are doing, from torch's own flight recorder; works on gloo and NCCL.

The recorder is a ring of the last entries in C++, filled whoever calls: DeepSpeed's reductions
stand in it as ours do. It must be switched on before the process group is made. Point-to-point
calls are not in it on gloo: those are told by the frame that waits for them.
"""

import json
import sys
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
import torch.distributed as dist

RING_ENTRIES = 256
_WAITING_IN = ("distributed_c10d.py", "trainer/collectives.py", "deepspeed/comm/torch.py")
# How gloo, NCCL and the kernel say that a peer or the way to it is gone.
_GONE = (
    "closed by peer", "reset by peer", "Broken pipe", "Connection refused", "timed out",
    "Timed out", "No route to host", "Network is unreachable", "connection abort", "pair closure",
    "remote process exited", "NCCL communicator was aborted", "Connect", "Socket",
)  # fmt: skip


@dataclass(frozen=True)
class Collective:
    """One collective as it was called here."""

    name: str  # e.g. gloo:all_reduce
    sizes: list[list[int]]
    number: int  # of this group's collectives
    ago_s: float
    done: bool

    def __str__(self) -> str:
        state = "done" if self.done else "not done"
        sizes = "x".join(str(size) for size in self.sizes) or "[]"
        return f"{self.name} of {sizes}, number {self.number}, {self.ago_s:.1f} s ago, {state}"

    def to_json(self) -> dict[str, Any]:
        """As an event tells it."""
        return {**asdict(self), "ago_s": round(self.ago_s, 1)}


def record_collectives(environment: MutableMapping[str, str]) -> None:
    """Switch the recorder on; before the process group is made."""
    environment.setdefault("TORCH_FR_BUFFER_SIZE", str(RING_ENTRIES))


def recent_collectives() -> list[Collective]:
    """The last collectives of this process, oldest first; none where nothing was recorded."""
    nccl = torch.cuda.is_available()
    dump = getattr(torch._C._distributed_c10d, f"_dump_{'nccl' if nccl else 'fr'}_trace_json", None)
    if dump is None:
        return []
    try:
        entries = json.loads(dump(includeCollectives=True)).get("entries", [])
    except (ValueError, TypeError, RuntimeError):
        return []
    return [_parse(entry) for entry in entries]


def _parse(entry: Mapping[str, Any]) -> Collective:
    return Collective(
        name=entry["profiling_name"],
        sizes=entry["input_sizes"],
        number=entry["collective_seq_id"],
        ago_s=max(0.0, time.time() - entry["time_created_ns"] / 1e9),
        done=bool(entry["retired"]),
    )


def is_waiting(recent: list[Collective]) -> bool:
    """Whether some thread of this process waits for other ranks."""
    if any(not collective.done for collective in recent):
        return True
    return any(
        frame.f_code.co_filename.endswith(_WAITING_IN) for frame in sys._current_frames().values()
    )


def is_lost_peer(error: BaseException) -> bool:
    """Whether `error` is a collective's complaint about a peer or the network."""
    from_torch = type(error) is RuntimeError or isinstance(error, dist.DistError)
    return from_torch and any(words in str(error) for words in _GONE)


def shorten(error: BaseException) -> str:
    """What a collective's error says, without the place in gloo's sources and its advice."""
    text = str(error).split("\n")[0].split(". This is typically")[0]
    return text.partition("] ")[2][:300] if text.startswith("[/") else text[:300]
