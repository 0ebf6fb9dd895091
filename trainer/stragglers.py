"""Which rank the others wait for, and in which part of the step.

In a synchronous step every rank takes the same time, most of them waiting. What a rank does alone
tells them apart: waiting for its own data, and its towers' forward pass. A rank that takes much
longer there than the middle one costs every other rank the difference.
"""

import logging
import socket
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.distributed as dist

from trainer.collectives import max_over_ranks
from trainer.events import record_event
from trainer.ranks import Ranks

ALONE = ("data_wait", "towers")
"""Parts of a step (`StepClock`) that wait for no other rank."""
TIMES_SLOWER = 1.5
SHARE_OF_STEP = 0.05  # of a step that is lost: less is not worth a word

logger = logging.getLogger("nsphere.train")


@dataclass(frozen=True)
class Straggler:
    """A rank that holds the others up."""

    rank: int
    part: str  # of ALONE
    lost_s: float  # a step, beyond the middle rank
    times_slower: float  # than the middle rank


def find_straggler(
    seconds: Sequence[Mapping[str, float]],  # of each rank: part -> mean seconds a step
    step_s: float,
) -> Straggler | None:
    """The rank that costs most, if it costs enough to be told."""
    worst: Straggler | None = None
    for part in ALONE:
        of_ranks = [each[part] for each in seconds]
        middle = statistics.median_low(of_ranks)
        slowest = max(range(len(of_ranks)), key=of_ranks.__getitem__)
        lost = of_ranks[slowest] - middle
        times = of_ranks[slowest] / max(middle, 1e-9)
        if times >= TIMES_SLOWER and lost >= SHARE_OF_STEP * step_s:
            if worst is None or lost > worst.lost_s:
                worst = Straggler(slowest, part, lost, times)
    return worst


@dataclass
class StragglerWatch:
    """Compares the ranks over some time; every rank holds one and calls it at every logged step."""

    run: Path
    ranks: Ranks
    window_s: float  # time over which ranks are compared: single steps differ by chance
    _sums: dict[str, float] = field(default_factory=dict)
    _num_steps: int = 0
    _nodes: list[str] = field(default_factory=list)
    _told: tuple[int, str] | None = None

    def observe(self, step: int, seconds: Mapping[str, float], num_steps: int) -> dict[str, float]:
        """`seconds` a step as of `StepClock.drain` over `num_steps`; what metrics.jsonl is told.

        Collective whenever a window is over, which every rank finds at the same step.
        """
        if self.ranks.world_size == 1:
            return {}
        for name in ("step_s", *(f"{part}_s" for part in ALONE)):
            self._sums[name] = self._sums.get(name, 0.0) + seconds.get(name, 0.0) * num_steps
        self._num_steps += num_steps
        longest = max_over_ranks(
            torch.tensor(self._sums["step_s"], dtype=torch.float64).to(self.ranks.device),
            self.ranks.group,
        )
        if float(longest) < self.window_s:
            return {}
        means = {name: total / self._num_steps for name, total in self._sums.items()}
        self._sums, self._num_steps = {}, 0
        found = find_straggler(self._gather(means), means["step_s"])
        if found is None:
            self._told = None
            return {"straggler_lost_s": 0.0}
        if self._told != (found.rank, found.part):  # once, until it changes
            self._told = (found.rank, found.part)
            self._tell(step, found)
        return {"straggler_lost_s": found.lost_s, "straggler_rank": found.rank}

    def _gather(self, seconds: Mapping[str, float]) -> list[dict[str, float]]:
        group, device = self.ranks.group, self.ranks.device
        if not self._nodes:
            self._nodes = [""] * self.ranks.world_size
            dist.all_gather_object(self._nodes, socket.gethostname(), group=group)
        own = torch.tensor([seconds.get(f"{part}_s", 0.0) for part in ALONE], device=device)
        everyone = own.new_empty(self.ranks.world_size * len(ALONE))
        dist.all_gather_into_tensor(everyone, own, group=group)
        rows = everyone.view(-1, len(ALONE)).tolist()
        return [dict(zip(ALONE, row, strict=True)) for row in rows]

    def _tell(self, step: int, found: Straggler) -> None:
        if not self.ranks.is_first:
            return
        node = self._nodes[found.rank]
        logger.warning(
            "step %d: rank %d on %s is %.1f times as slow as the middle rank in %s: every rank "
            "waits %.3f s a step for it",
            step,
            found.rank,
            node,
            found.times_slower,
            found.part,
            found.lost_s,
        )
        details = {"step": step, "rank": found.rank, "node": node, "part": found.part}
        details |= {"times_slower": found.times_slower, "lost_s": found.lost_s}
        record_event(self.run, "straggler", details)
