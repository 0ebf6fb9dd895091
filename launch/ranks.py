"""Environment -> Ranks: the one reader of what torchrun, accelerate, SLURM or nobody has set."""

import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

from launch.meeting import meet
from trainer.flight import record_collectives
from trainer.ranks import Ranks

MEETING_S = 1800.0
COLLECTIVE_S = 1800.0


class LaunchError(RuntimeError):
    """The environment does not describe a usable set of ranks; the text says what to set."""


@dataclass(frozen=True)
class Place:
    """Where this process stands, before any process group exists."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    source: str = "plain"


def find_place(environment: Mapping[str, str]) -> Place:
    """Read torchrun's and accelerate's variables, else a SLURM step's, else one plain process.

    Raises LaunchError where variables are missing or are not numbers.
    """
    if "RANK" in environment or "WORLD_SIZE" in environment:
        names, source = ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun"
    elif int(environment.get("SLURM_STEP_NUM_TASKS", "1")) > 1:
        names, source = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID"), "slurm"
    else:
        return Place()
    missing = [name for name in names if not environment.get(name, "").isdigit()]
    if missing:
        raise LaunchError(
            f"{source} set some of {', '.join(names)} but not {', '.join(missing)} (as a number): "
            "start ranks with torchrun, accelerate launch or srun, or unset them all"
        )
    rank, world_size, local_rank = (int(environment[name]) for name in names)
    return Place(rank, world_size, local_rank, source)


def is_rank(environment: Mapping[str, str]) -> bool:
    """True in a process that something else has started as one of several ranks."""
    return find_place(environment).source != "plain"


@contextmanager
def open_ranks(
    environment: Mapping[str, str],
    *,
    meeting_s: float = MEETING_S,
    collective_s: float = COLLECTIVE_S,
) -> Iterator[Ranks]:
    """Make the process group of this job, and take it down again.

    `meeting_s`: for the ranks to come together. `collective_s`: the most that a collective waits;
    the watcher of a training run (`trainer/watch.py`) is quicker.

    NCCL where there is a GPU for this rank, else gloo. A single process gets a group of one, so
    that nothing downstream need know the difference.
    """
    place = find_place(environment)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        if place.local_rank >= torch.cuda.device_count():
            raise LaunchError(
                f"local rank {place.local_rank} has no GPU ({torch.cuda.device_count()} visible): "
                "start fewer ranks a node, or set CUDA_VISIBLE_DEVICES="
            )
        device = torch.device("cuda", place.local_rank)
        torch.cuda.set_device(device)
    record_collectives(os.environ)
    _init_group(place, environment, device, meeting_s, collective_s)
    try:
        yield Ranks(dist.group.WORLD, place.rank, place.world_size, place.local_rank, device)
    finally:
        dist.destroy_process_group()


def _init_group(
    place: Place,
    environment: Mapping[str, str],
    device: torch.device,
    meeting_s: float,
    collective_s: float,
) -> None:
    backend = "nccl" if device.type == "cuda" else "gloo"
    if place.source == "plain":
        os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0")  # DeepSpeed reads them
        alone = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=alone, rank=0, world_size=1)
        return
    if place.source == "slurm":
        address, port = slurm_master(environment)
        os.environ.update(
            RANK=str(place.rank),
            WORLD_SIZE=str(place.world_size),
            LOCAL_RANK=str(place.local_rank),
            MASTER_ADDR=address,
            MASTER_PORT=str(port),
        )
    elif not environment.get("MASTER_ADDR") or not environment.get("MASTER_PORT"):
        raise LaunchError(
            "RANK and WORLD_SIZE are set but MASTER_ADDR or MASTER_PORT is not: set both to the "
            "address and a free port of rank 0's host, or start with torchrun"
        )
    store, rank, world_size = next(
        dist.rendezvous(  # type: ignore[attr-defined]
            "env://", place.rank, place.world_size, timeout=timedelta(seconds=meeting_s)
        )
    )
    if environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = meet(store, rank, world_size, meeting_s)
    dist.init_process_group(
        backend,
        store=store,
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=collective_s),
    )


def slurm_master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of a SLURM step's first node; the port follows from job and restart."""
    port = (
        20000
        + (
            int(environment.get("SLURM_JOB_ID", "0")) * 7
            + int(environment.get("SLURM_RESTART_COUNT", "0"))
        )
        % 20000
    )
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"], int(environment.get("MASTER_PORT", port))
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", ""))
    first = _scontrol("show", "hostnames", nodes).split("\n")[0].strip()
    try:
        return socket.gethostbyname(first), port
    except OSError:  # a node's name need not be known to DNS: SLURM has its address
        words = _scontrol("show", "node", first).split()
        found = [word.removeprefix("NodeAddr=") for word in words if word.startswith("NodeAddr=")]
    if not found:
        raise LaunchError(f"node {first!r} of {nodes!r} has no address: set MASTER_ADDR")
    return found[0], port


def _scontrol(*arguments: str) -> str:
    try:
        return subprocess.run(
            ["scontrol", *arguments], capture_output=True, text=True, check=True, timeout=30
        ).stdout
    except (OSError, subprocess.SubprocessError) as error:
        raise LaunchError(
            f"scontrol {' '.join(arguments)} failed ({error}): set MASTER_ADDR by hand"
        ) from None
