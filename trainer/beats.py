"""How ranks tell each other that they live: one small file, RUN/log/.beats/TOKEN.

A page a rank, and one more in which the first to give up calls the others. A file, because the
store of the process group lies on one host, which may be the one that is cut off.
"""

import json
import os
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

import torch.distributed as dist

from trainer.ranks import Ranks

PAGE = 4096  # hosts that write other pages do not disturb each other


@dataclass(frozen=True)
class Beat:
    """What a rank says of itself, in its page of the file."""

    rank: int
    node: str
    pid: int
    count: int = 0  # of beats
    part: str = "start"  # that was done last
    step: int = 0
    idle_s: float = 0.0  # since then
    silent: bool = False  # too long, by its own judgement
    waiting: bool = False  # for others, in a collective
    left: str = ""  # "done", "lost", "failed: why"

    def __str__(self) -> str:
        return f"rank {self.rank} ({self.node}, process {self.pid})"

    @property
    def place(self) -> str:
        """The last it told."""
        late = f"{self.idle_s:.1f} s " if self.idle_s > 1 else ""
        return f"{late}after {self.part!r} of step {self.step}"


class BeatFile:
    """The pages of all ranks; a missing file means that the run has been started anew."""

    def __init__(self, path: Path, world_size: int) -> None:
        self._path, self._world_size = path, world_size

    @classmethod
    def open_together(cls, folder: Path, ranks: Ranks) -> Self:
        """A new file for these ranks; those of earlier lives of the run go."""
        words: list[str] = [uuid.uuid4().hex]
        if ranks.is_first:
            folder.mkdir(parents=True, exist_ok=True)
            for old in folder.iterdir():
                old.unlink(missing_ok=True)
            (folder / words[0]).touch()
        if ranks.world_size > 1:
            dist.broadcast_object_list(words, group=ranks.group, group_src=0)
        return cls(folder / words[0], ranks.world_size)

    def write(self, beat: Beat) -> None:
        """Put a rank's page; FileNotFoundError when the file is gone."""
        self._put(beat.rank, asdict(beat))

    def read(self) -> list[Beat]:
        """Every rank's page that has been written."""
        pages = self._path.read_bytes()
        found = (_parse(pages[rank * PAGE : (rank + 1) * PAGE]) for rank in range(self._world_size))
        return [Beat(**page) for page in found if page]

    def call(self, rank: int, why: str) -> bool:
        """Call all ranks to leave; True for the one that calls first, which tells people."""
        if self.called():
            return False
        self._put(self._world_size, {"rank": rank, "why": why})
        time.sleep(0.05)  # another rank may have found it empty in the same moment
        call = self.called()
        return call is None or call["rank"] == rank

    def called(self) -> dict[str, Any] | None:
        """Who called and why; None while all is well."""
        file = os.open(self._path, os.O_RDONLY)
        try:
            return _parse(os.pread(file, PAGE, self._world_size * PAGE))
        finally:
            os.close(file)

    def _put(self, page: int, content: dict[str, Any]) -> None:
        file = os.open(self._path, os.O_WRONLY)
        try:
            os.pwrite(file, json.dumps(content).encode()[:PAGE].ljust(PAGE, b"\0"), page * PAGE)
        finally:
            os.close(file)


def _parse(page: bytes) -> dict[str, Any] | None:
    try:
        content = json.loads(page.rstrip(b"\0"))
    except ValueError:  # empty, or seen half written
        return None
    return content if isinstance(content, dict) else None
