"""What takes all ranks together: how fast they exchange, and whether their clocks agree."""

import time
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.ranks import Ranks

SIZES = {"cpu": (2**16, 2**20, 2**24), "cuda": (2**20, 2**24, 2**28)}
REPEATS = 5
CLOCK_ROUNDS = 5


def measure_links(ranks: Ranks) -> list[dict[str, float]]:
    """All-reduce at several sizes: seconds, and bytes a second that each rank had to send.

    The best of a few rounds; the bytes are a ring's, 2 (W - 1) / W of the tensor, so that figures
    of any number of ranks stand beside the link.
    """
    found = []
    for size in SIZES[ranks.device.type]:
        tensor = torch.zeros(size // 4, device=ranks.device)
        best = float("inf")
        for _ in range(REPEATS):
            dist.barrier(group=ranks.group)
            start = time.perf_counter()
            dist.all_reduce(tensor, group=ranks.group)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize(ranks.device)
            best = min(best, time.perf_counter() - start)
        sent = 2 * (ranks.world_size - 1) / ranks.world_size * size
        found.append({"bytes": float(size), "seconds": best, "rate": sent / best})
    return found


def network_speed(root: Path = Path("/sys/class/net")) -> float:
    """Bytes a second of the fastest interface that says so; 0: none does."""
    fastest = 0.0
    for path in root.glob("*/speed"):
        try:
            fastest = max(fastest, float(path.read_text()) * 1e6 / 8)
        except (OSError, ValueError):
            continue
    return fastest


def read_clocks(ranks: Ranks) -> list[list[float]]:
    """Wall clocks of all ranks, each round right after a barrier: (rounds, ranks)."""
    rounds = []
    for _ in range(CLOCK_ROUNDS):
        dist.barrier(group=ranks.group)
        times: list[float] = [0.0] * ranks.world_size
        dist.all_gather_object(times, time.time(), group=ranks.group)
        rounds.append(times)
    return rounds


def clock_skew(rounds: list[list[float]]) -> float:
    """Seconds between the fastest and the slowest clock, in the round least disturbed by waiting.

    What a rank waited before it read its clock counts too, so this is a bound from above.
    """
    return min(max(times) - min(times) for times in rounds)
