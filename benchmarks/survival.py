"""`python -m benchmarks.survival [--kills 50]`: runs that are killed again and again and end alike.

`nsphere train` on two ranks, CLIP and faces, ZeRO 0 to 3: SIGKILL hits a random rank, or the
launcher with all ranks, at random moments: while a rank starts, in a step, and (at least `--saves`
times) inside a save, which is proven by the unfinished folder that is left behind. Where a rank was
killed the launcher starts all again; where all were, the same command is given again. At its end
the losses of every step must be bit for bit those of a run that nobody touched, and the sample ids
of every batch the same. A second part starts each run again on 1 to 4 ranks, at random.
"""

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from benchmarks.machine import commit, load, machine, print_table

ROOT = Path(__file__).parent.parent
STEPS, BATCH = 150, 32
COMMON = [
    f"--train.duration={STEPS} steps",
    f"--train.global_batch_size={BATCH}",
    "--train.precision=fp32",
    "--schedule.warmup=4 steps",
    "--checkpoint.every=5 steps",
    "--log.every=1 steps",
    "--log.samples=true",
    "--log.trackers=[]",
    "--data.workers=1",
    "--launch.max_restarts=1000",
]
# Rates at which a run does not blow up what another number of ranks rounds otherwise: with AdamW at
# 1e-3 the faces' losses differ by 1e-3 after 40 steps on one rank and on two, nobody being killed.
TASKS = {
    "CLIP": [f"--model.name={ROOT}/configs/models/tiny_vit_32.json", "--optim.lr=1e-3"],
    "faces": [
        "--loss.name=cosface",
        "--loss.scale=8",
        "--loss.margin=0.1",
        "--model.name=timm:test_vit",
        "--model.image_size=32",
        "--model.embedding_dim=32",
        "--optim.name=sgd",
        "--optim.lr=3e-3",
        "--optim.clip_norm=1",
    ],
}
IN_SAVE_S = 0.1  # up to so long after a save has begun
AT_ANY_TIME_S = 2.5  # up to so long after training has begun
STARTING_S = 8.0  # up to so long after the command was given
LONGEST_S = 600.0


@dataclass
class Row:
    """What befell one configuration."""

    task: str
    stage: int
    kills: int = 0
    in_save: int = 0
    of_all: int = 0
    survived: int = 0
    runs: int = 0
    worst: float = 0.0
    failures: list[str] = field(default_factory=list)


@dataclass
class Job:
    """`nsphere train` in a folder, as a process with children."""

    words: Sequence[str]
    run: Path
    process: subprocess.Popen[bytes] | None = None

    def start(self, ranks: int) -> None:
        """Give the command."""
        command = [sys.executable, "-P", "-m", "launch.cli", "train", *self.words]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        with (self.run.parent / f"{self.run.name}.log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, f"--nproc={ranks}", f"--run={self.run}"],
                env=environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def is_running(self) -> bool:
        """Whether the launcher is."""
        return self.process is not None and self.process.poll() is None

    def wait(self) -> int:
        """Exit code of the launcher."""
        if self.process is None:
            raise RuntimeError(f"{self.run} was never started")
        return self.process.wait(LONGEST_S)

    def ranks(self) -> list[psutil.Process]:
        """Its ranks that live."""
        if self.process is None:
            return []
        with contextlib.suppress(psutil.Error):
            children = psutil.Process(self.process.pid).children()
            return [child for child in children if "launch.cli" in " ".join(child.cmdline())]
        return []

    def num_starts(self) -> int:
        """How often training has begun."""
        with contextlib.suppress(OSError):
            return (self.run / "events.jsonl").read_text().count('"event": "start"')
        return 0

    def is_saving(self) -> bool:
        """Whether an unfinished checkpoint is there."""
        return any((self.run / "checkpoints").glob(".saving-*"))

    def kill(self, rng: random.Random, *, everyone: bool) -> bool:
        """SIGKILL a rank, or the launcher and all its ranks; False where there was nobody."""
        victims = self.ranks()
        if not victims or not self.is_running():
            return False
        if everyone and self.process is not None:
            victims = [psutil.Process(self.process.pid), *victims]
        else:
            victims = [rng.choice(victims)]
        for victim in victims:
            with contextlib.suppress(psutil.Error):
                victim.kill()
        return True


def wait_for_moment(job: Job, rng: random.Random, before: int, kind: str) -> bool:
    """Until it is time to strike; False if the run has ended meanwhile."""
    if kind == "starting":
        time.sleep(rng.uniform(0.5, STARTING_S))
        return job.is_running()
    while job.num_starts() <= before:
        if not job.is_running():
            return False
        time.sleep(0.01)
    if kind == "any":
        time.sleep(rng.uniform(0, AT_ANY_TIME_S))
        return job.is_running()
    time.sleep(rng.uniform(0, 1))
    while not job.is_saving():
        if not job.is_running():
            return False
        time.sleep(0.0005)
    time.sleep(rng.uniform(0, IN_SAVE_S))
    return True


def torment(job: Job, rng: random.Random, row: Row, wanted: int, saves: int, ranks: int) -> int:
    """One run from its start to its end, killed up to `wanted` times; how often it was."""
    job.start(ranks)
    kills = seen = 0  # seen: starts of training before the last kill
    while kills < wanted:
        kind = "save" if row.in_save < saves else rng.choice(["any", "any", "starting"])
        everyone = rng.random() < 0.3
        if not wait_for_moment(job, rng, seen, kind):
            break
        inside = kind == "save" and job.is_saving()
        if (kind == "save" and not inside) or not job.kill(rng, everyone=everyone):
            continue
        seen = job.num_starts()
        time.sleep(0.02)
        kills += 1
        row.kills += 1
        row.of_all += everyone
        row.in_save += inside and job.is_saving()  # what was not finished is still there
        if everyone:
            job.wait()
            job.start(ranks)
    return kills


def read_run(run: Path) -> tuple[dict[int, float], dict[int, list[str]]]:
    """Losses and sample keys by step."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    losses = {line["step"]: line["loss"] for line in lines if "loss" in line}
    batches = [json.loads(path.read_text()) for path in (run / "samples").glob("*.json")]
    return losses, {batch["step"]: batch["keys"] for batch in batches}


def compare(run: Path, other: Path, tolerance: float) -> tuple[float, str]:
    """Largest difference of two runs' losses, and what is wrong, "" if nothing."""
    losses, batches = read_run(run)
    others, other_batches = read_run(other)
    if losses.keys() != others.keys() or len(losses) != STEPS:
        return float("inf"), f"{len(losses)} and {len(others)} steps"
    if batches != other_batches:
        return float("inf"), "other samples"
    worst = max(abs(losses[step] - others[step]) for step in losses)
    return worst, "" if worst <= tolerance else f"losses differ by {worst}"


def finish(job: Job, row: Row, whole: Path, tolerance: float, kills: int) -> None:
    """Wait for the end and judge the run."""
    code = job.wait()
    problem = f"exit code {code}"
    if code == 0:
        worst, problem = compare(whole, job.run, tolerance)
        row.worst = max(row.worst, worst)
    row.runs += 1
    if problem:
        row.failures.append(f"{job.run}: {problem}")
    else:
        row.survived += kills


def quotas(total: int, parts: int) -> list[int]:
    """`total` in nearly equal parts."""
    return [(total * (k + 1)) // parts - (total * k) // parts for k in range(parts)]


def iter_rows(
    folder: Path, shards: str, kills: int, saves: int, changes: int, seed: int
) -> Iterator[tuple[str, Row]]:
    """Both parts of each configuration, as they are done."""
    cases = [(task, stage) for stage in range(4) for task in TASKS]
    shares = zip(quotas(kills, len(cases)), quotas(saves, len(cases)), strict=True)
    for (task, stage), (num_kills, num_saves) in zip(cases, shares, strict=True):
        rng = random.Random(f"{seed} {task} {stage}")
        name = f"{task}-{stage}"
        config = folder / f"{name}.toml"
        config.write_text("")
        words = [str(config), *COMMON, *TASKS[task], f"--zero.stage={stage}"]
        words.append(f"--data.shards={shards}")
        whole = Job(words, folder / f"{name}-whole")
        whole.start(2)
        if whole.wait():
            raise SystemExit((folder / f"{name}-whole.log").read_text())
        row = Row(task, stage)
        while row.kills < num_kills or row.in_save < num_saves:
            job = Job(words, folder / f"{name}-{row.runs}")
            done = torment(job, rng, row, max(1, num_kills - row.kills), num_saves, 2)
            finish(job, row, whole.run, 0.0, done)
        yield "same ranks", row
        row = Row(task, stage)
        job = Job(words, folder / f"{name}-ranks")
        job.start(rng.randint(1, 4))
        for _ in range(changes):
            if wait_for_moment(job, rng, job.num_starts(), "any") and job.kill(rng, everyone=True):
                row.kills += 1
                row.of_all += 1
                job.wait()
                job.start(rng.randint(1, 4))
        finish(job, row, whole.run, 1e-4, row.kills)
        yield "other ranks", row


def main() -> None:
    """Parse, run, print; exit code 1 if a run did not survive."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=50, help="of runs that go on with two ranks")
    parser.add_argument("--saves", type=int, default=16, help="of these inside a save, at least")
    parser.add_argument("--changes", type=int, default=3, help="of ranks, in each configuration")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    facts: dict[str, Any] = {"machine": machine(), "commit": commit(), "load": load()}
    found: dict[str, list[Row]] = {"same ranks": [], "other ranks": []}
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        pack = [sys.executable, "-P", "-m", "launch.cli", "pack", "scenes"]
        subprocess.run(
            [*pack, f"{folder}/x.tar", "--count", "512", "--max-samples", "128"],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            check=True,
            stderr=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
        )
        todo = 2 * 4 * len(TASKS)
        rows = iter_rows(
            folder, f"{folder}/x-*.tar", given.kills, given.saves, given.changes, given.seed
        )
        for number, (part, row) in enumerate(rows, 1):
            found[part].append(row)
            left = (time.monotonic() - began) / number * (todo - number)
            sys.stderr.write(
                f"{row.task}, ZeRO {row.stage}, {part}: {row.survived} of {row.kills} kills "
                f"survived; about {left:.0f} s left\n"
            )
            for failure in row.failures:
                sys.stderr.write(f"{failure}\n{tail(failure)}\n")
    report(found, facts, given.json)
    sys.exit(any(row.failures for rows in found.values() for row in rows))


def tail(failure: str) -> str:
    """Last lines of a failed run's log."""
    log = Path(failure.split(": ")[0] + ".log")
    return "\n".join(log.read_text().splitlines()[-15:]) if log.exists() else ""


def report(found: dict[str, list[Row]], facts: dict[str, Any], as_json: bool) -> None:  # noqa: FBT001
    """Print everything."""
    if as_json:
        print(json.dumps(facts | {part: [vars(r) for r in rows] for part, rows in found.items()}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    titles = {
        "same ranks": f"SIGKILL, two ranks, {STEPS} steps, a save every 5: ends bit-identical",
        "other ranks": "SIGKILL of all, then 1 to 4 ranks at random: same samples, losses to 1e-4",
    }
    for part, rows in found.items():
        total = Row("all", -1)
        cells = []
        for row in [*rows, total]:
            name = "all" if row is total else f"{row.task}, ZeRO {row.stage}"
            cells.append(
                (name, row.kills, row.in_save, row.of_all, row.runs,
                 f"{row.survived} of {row.kills}", f"{row.worst:.1g}")
            )  # fmt: skip
            for key in ("kills", "in_save", "of_all", "survived", "runs"):
                setattr(total, key, getattr(total, key) + getattr(row, key))
            total.worst = max(total.worst, row.worst)
        header = ("", "kills", "in a save", "of all", "runs", "survived", "worst difference")
        print_table(titles[part], header, cells)


if __name__ == "__main__":
    main()
