"""Begin and end of one life of a run, as RUN/events.jsonl tells them; rank 0 writes."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch.distributed as dist

from trainer.events import read_events, record_event
from trainer.ranks import Ranks


def record_start(run: Path, ranks: Ranks, from_step: int) -> None:
    """ "start": training begins, or goes on; every rank calls it together."""
    nodes: list[Any] = [os.uname().nodename] * ranks.world_size
    if ranks.world_size > 1:
        dist.all_gather_object(nodes, os.uname().nodename, group=ranks.group)
    if not ranks.is_first:
        return
    before = sum(event["event"] == "start" for event in read_events(run))
    details = {
        "world_size": ranks.world_size,
        "nodes": len(set(nodes)),
        "from_step": from_step,
        "job": os.environ.get("SLURM_JOB_ID", ""),
        "restart": before,
    }
    record_event(run, "start", details)


def record_end(run: Path, ranks: Ranks, step: int, *, finished: bool) -> None:
    """ "end" of a life that saved: the run is done, or was asked to stop."""
    if ranks.is_first:
        how, why = ("done", "") if finished else ("stopped", "asked to stop")
        record_event(run, "end", {"step": step, "how": how, "why": why})


@contextmanager
def failure_recorded(run: Path, ranks: Ranks) -> Iterator[None]:
    """Inside, an error that ends rank 0 is recorded as the run's "end"."""
    try:
        yield
    except Exception as error:
        if ranks.is_first:
            why = f"{type(error).__name__}: {error}"[:1000]
            record_event(run, "end", {"step": None, "how": "failed", "why": why})
        raise
