"""Runs as a user starts them: real launchers, ranks found by their environment, killed and stopped.

Every process is in a session of its own, so that a test leaves nothing behind.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from tiny_runs import MODEL, write_shards

from trainer.events import read_events

TOML = """
[data]
shards = "{shards}"
workers = 1
chunk = 4
[model]
name = "model.json"
[optim]
lr = 1e-2
[train]
duration = "30 steps"
global_batch_size = 16
precision = "fp32"
[checkpoint]
every = "5 steps"
[launch]
timeout = 5
[log]
every = "1 steps"
samples = true
trackers = []
"""
NSPHERE = [sys.executable, "-P", "-m", "launch.cli"]
TORCHRUN = [sys.executable, "-P", "-m", "torch.distributed.run"]
PATIENCE_S = 200.0  # with a machine that others use too
_OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")


def write_project(folder: Path) -> Path:
    """A folder with shards, a model and run.toml: 30 steps of 16 samples."""
    shards = write_shards(folder / "x")
    (folder / "model.json").write_text(json.dumps(MODEL))
    (folder / "run.toml").write_text(TOML.format(shards=shards))
    for name in ("deepspeed_shm_comm", "cpu_adam", "fused_adam", "utils"):  # of killed compilers
        (folder / "extensions" / name).mkdir(parents=True)
        (folder / "extensions" / name / "lock").touch()
    return folder


class Launched:
    """One launcher and its ranks; what it says goes to a file."""

    def __init__(self, project: Path, run: str, *command: str) -> None:
        self.run = project / run
        self._said = project / f"{run}-{os.urandom(3).hex()}.txt"
        clean = {name: value for name, value in os.environ.items() if name not in _OF_RANKS}
        with self._said.open("wb") as out:
            self._process = subprocess.Popen(
                command,
                cwd=project,
                env={
                    **clean,
                    "OMP_NUM_THREADS": "1",
                    "TORCH_EXTENSIONS_DIR": str(project / "extensions"),
                },
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        """Everything on its stdout and stderr, and its ranks'."""
        return self._said.read_text()

    def wait_for_step(self, step: int) -> None:
        """Return when so many steps are done; files of earlier lives count too."""
        self.wait_for(lambda: (self.run / "samples" / f"step-{step:08d}.json").exists())

    def wait_for_event(self, event: str, number: int = 1) -> dict[str, Any]:
        """Return the run's `number`th event of this kind, once it is recorded."""
        self.wait_for(lambda: len(self.events(event)) >= number)
        return self.events(event)[number - 1]

    def wait_for(self, condition: Any) -> None:
        """Return when `condition()` is true; fails when the launcher ends before."""
        until = time.monotonic() + PATIENCE_S
        while not condition():
            code = self._process.poll()
            assert code is None or condition(), f"ended with {code}:\n{self.said}"
            assert time.monotonic() < until, f"in vain:\n{self.said}"
            time.sleep(0.02)

    def events(self, event: str) -> list[dict[str, Any]]:
        """The run's events of this kind, oldest first."""
        return [found for found in read_events(self.run) if found["event"] == event]

    def signal(self, number: int) -> None:
        """To the launcher alone."""
        self._process.send_signal(number)

    def signal_rank(self, rank: int, number: int) -> None:
        """To one rank alone."""
        os.kill(self.ranks()[rank], number)

    def ranks(self) -> dict[int, int]:
        """Rank -> process, of the launcher's children that live."""
        found = {}
        for folder in Path("/proc").iterdir():
            try:
                parent = (folder / "stat").read_text().rpartition(")")[2].split()[1]
                if not folder.name.isdigit() or int(parent) != self._process.pid:
                    continue
                words = (folder / "environ").read_bytes().split(b"\0")
            except OSError:
                continue
            ranks = [int(word[5:]) for word in words if word.startswith(b"RANK=")]
            found.update(dict.fromkeys(ranks, int(folder.name)))
        return found

    def end(self, code: int | None = None) -> int:
        """Wait for the launcher's end; its exit code, which must be `code` if that is given."""
        try:
            found = self._process.wait(timeout=PATIENCE_S)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"does not end:\n{self.said}") from None
        assert code is None or found == code, f"exit {found}:\n{self.said}"
        return found

    def close(self) -> None:
        """Kill what is left; ranks die with their launcher."""
        self._process.kill()
        self._process.wait()


def kill_leftovers(processes: list[int]) -> list[int]:
    """Those of `processes` that live on a second later; they are killed."""
    until = time.monotonic() + 5.0
    alive = processes
    while alive and time.monotonic() < until:
        time.sleep(0.05)
        alive = [pid for pid in alive if _lives(pid)]
    for pid in alive:
        os.kill(pid, signal.SIGKILL)
    return alive


def _lives(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False
