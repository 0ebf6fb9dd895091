"""Environment -> Ranks: the one reader of what torchrun, accelerate, SLURM or nobody has set."""

import errno
import os
import socket
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from launch.hosts import MOST_PORT
from launch.meeting import ANSWER_S, meet, within
from trainer.flight import record_collectives
from trainer.ranks import Ranks

MEETING_S = 1800.0
COLLECTIVE_S = 1800.0

_OF_SLURM = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID")
_INTERACTIVE_STEP = "4294967290"  # salloc's own shell, where the site has use_interactive_step


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

    torchrun inside a SLURM step counts, whatever the step's tasks are: they are its agents.
    Raises LaunchError where variables are missing, are no numbers or contradict each other, and in
    a shell of a SLURM job with several nodes, where one process would train alone.
    """
    num_tasks = environment.get("SLURM_STEP_NUM_TASKS", "")
    in_step = _is_number(num_tasks) and int(num_tasks) > 1
    if "RANK" in environment or "WORLD_SIZE" in environment:
        place = _read_place(environment, ("RANK", "WORLD_SIZE", "LOCAL_RANK"), "torchrun")
        if in_step and "TORCHELASTIC_RUN_ID" not in environment:
            _check_same(place, _read_place(environment, _OF_SLURM, "slurm"))
        return place
    if in_step:
        return _read_place(environment, _OF_SLURM, "slurm")
    num_nodes = environment.get("SLURM_JOB_NUM_NODES", "1")
    in_shell = environment.get("SLURM_STEP_ID", _INTERACTIVE_STEP) == _INTERACTIVE_STEP
    if in_shell and num_nodes != "1":
        raise LaunchError(
            f"this is a shell of SLURM job {environment.get('SLURM_JOB_ID')} with {num_nodes} "
            "nodes, and one process would train here alone: start the ranks with `srun python -P "
            "-m launch.cli train ...`, or unset SLURM_JOB_NUM_NODES to use this node only"
        )
    return Place()


def _read_place(environment: Mapping[str, str], names: tuple[str, str, str], source: str) -> Place:
    missing = [name for name in names if not _is_number(environment.get(name, ""))]
    if missing:
        raise LaunchError(
            f"{source} set some of {', '.join(names)} but not {', '.join(missing)} (as a number): "
            "start ranks with torchrun, accelerate launch or srun, or unset them all"
        )
    rank, world_size, local_rank = (int(environment[name]) for name in names)
    if rank >= world_size:
        raise LaunchError(
            f"{names[0]}={rank} with {names[1]}={world_size}: ranks count from 0 to "
            f"{max(world_size - 1, 0)}; start ranks with torchrun, accelerate launch or srun"
        )
    local_size = environment.get("LOCAL_WORLD_SIZE", "") if source == "torchrun" else ""
    if local_rank >= (int(local_size) if _is_number(local_size) else world_size):
        raise LaunchError(
            f"{names[2]}={local_rank} with {local_size or world_size} ranks on this node: local "
            "ranks count from 0; start ranks with torchrun, accelerate launch or srun"
        )
    return Place(rank, world_size, local_rank, source)


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdigit()


def _read_port(text: str) -> int:
    if not _is_number(text) or not 0 < int(text) <= MOST_PORT:
        raise LaunchError(
            f"MASTER_PORT={text} is no port: set it to a free one of rank 0's host, 1 to "
            f"{MOST_PORT}"
        )
    return int(text)


def _check_same(place: Place, slurm: Place) -> None:
    if (place.rank, place.world_size) != (slurm.rank, slurm.world_size):
        raise LaunchError(
            f"RANK={place.rank}, WORLD_SIZE={place.world_size} contradict srun, which started this "
            f"as task {slurm.rank} of {slurm.world_size}: unset RANK, WORLD_SIZE and LOCAL_RANK "
            "(from the job's script or an earlier shell?), or start one torchrun a node"
        )


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
        # Nobody leaves while rank 0 still writes: srun would end the others' slower peers.
        dist.barrier()
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
    dist.init_process_group(
        backend,
        store=_open_store(place, os.environ, meeting_s),
        rank=place.rank,
        world_size=place.world_size,
        timeout=timedelta(seconds=collective_s),
    )


def _open_store(place: Place, environment: Mapping[str, str], meeting_s: float) -> Store:
    """Where the ranks find each other: MASTER_ADDR:MASTER_PORT, kept by rank 0 or by torchrun.

    Raises LaunchError for an address that is missing or unknown, and a port that is none or taken.
    """
    address, port = environment.get("MASTER_ADDR", ""), environment.get("MASTER_PORT", "")
    if not address or not port:
        raise LaunchError(
            f"RANK and WORLD_SIZE are set but MASTER_ADDR ({address!r}) or MASTER_PORT ({port!r}) "
            "is not: set both to the address and a free port of rank 0's host, or start with "
            "torchrun"
        )
    number = _read_port(port)
    try:
        found = socket.getaddrinfo(address, number, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise LaunchError(
            f"MASTER_ADDR={address} cannot be found ({error}): set it to the address of rank 0's "
            "host as the other hosts know it"
        ) from None
    agents = environment.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    listening = None
    if place.rank == 0 and not agents:
        listening = _listen(found, is_alone=_is_one_host(place, environment))
    kept = None if listening is None else listening.detach()

    def open_store() -> Store:
        return TCPStore(
            address,
            number,
            None if agents else place.world_size,
            kept is not None,
            timeout=timedelta(seconds=meeting_s),
            master_listen_fd=kept,
        )

    try:
        store = within(meeting_s + ANSWER_S, open_store)
    except TimeoutError:
        raise LaunchError(
            f"MASTER_ADDR={address}, MASTER_PORT={port}: what listens there is not rank 0, it does "
            "not answer: set MASTER_PORT to a free one"
        ) from None
    return meet(store, place.rank, place.world_size, meeting_s) if agents else store


def _listen(found: tuple[Any, ...], *, is_alone: bool) -> socket.socket:
    """Listen on the master's address alone; torch by itself would on every interface.

    On all of them only where that is no way for the others: an address that is not of this host
    (behind NAT), or a name that means loopback here (Debian's /etc/hosts) while others come from
    outside.
    """
    family, _, _, _, address = found
    everywhere = ("::" if family == socket.AF_INET6 else "0.0.0.0", *address[1:])
    loopback = address[0].startswith("127.") or address[0] == "::1"
    places = [everywhere] if loopback and not is_alone else [address, everywhere]
    for place in places:
        listening = socket.socket(family, socket.SOCK_STREAM)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind(place)
            listening.listen(4096)
        except OSError as error:
            listening.close()
            if error.errno == errno.EADDRNOTAVAIL and place is not everywhere:
                continue
            if error.errno == errno.EADDRINUSE:
                raise LaunchError(
                    f"MASTER_PORT={place[1]} is taken on {socket.gethostname()} by another "
                    f"program (which: ss -ltnp 'sport = :{place[1]}'): set it to a free one"
                ) from None
            raise LaunchError(
                f"MASTER_ADDR={place[0]}, MASTER_PORT={place[1]}: rank 0 cannot listen: {error}"
            ) from None
        break
    return listening


def _is_one_host(place: Place, environment: Mapping[str, str]) -> bool:
    if place.source == "slurm":
        return environment.get("SLURM_STEP_NUM_NODES") == "1"
    return environment.get("LOCAL_WORLD_SIZE") == str(place.world_size)


def slurm_master(environment: Mapping[str, str]) -> tuple[str, int]:
    """Address and port of a SLURM step's first node; the port follows from job, restart and step.

    Another step has another port: what is left of a lost rank does not get in the way.
    """
    words = [environment.get(f"SLURM_{n}", "0") for n in ("JOB_ID", "RESTART_COUNT", "STEP_ID")]
    job, restart, step = (int(word) if _is_number(word) else 0 for word in words)
    port = 20000 + (7 * job + restart + 131 * step) % 12000  # Linux gives clients 32768 and up
    if environment.get("MASTER_ADDR"):
        return environment["MASTER_ADDR"], _read_port(environment.get("MASTER_PORT") or str(port))
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
