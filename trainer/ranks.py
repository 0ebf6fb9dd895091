"""What a process knows of its peers: a plain value, made once at the start and handed down."""

from dataclasses import dataclass, field

import torch
from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Ranks:
    """This process among `world_size`; `group` is None when there is one process and no group."""

    group: ProcessGroup | None = None
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))

    @property
    def is_first(self) -> bool:
        """True on the one rank that prints, logs and commits checkpoints."""
        return self.rank == 0
