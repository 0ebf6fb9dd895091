"""What the batch script of a SLURM job does when its ranks have ended; imports nothing heavy.

`python -P -m launch.job RUN CODE ...` prints one of

  done 0        the run is at its end
  restart CODE  a rank was lost: all ranks again, in the same allocation
  requeue CODE  saved and stopped, or cut off: the job goes into the queue again
  fail CODE     its own error, or no progress: the job fails with this code
  leave CODE    SLURM has decided already (scancel, requeue from outside)

and says why on stderr and in RUN/events.jsonl. srun alone cannot tell: it gives the largest code of
all ranks, and when one fails it ends the others, which then save and stop as if they were asked to.
So the first rank that fails by its own error leaves its code in the file NSPHERE_FAILURE.
"""

import argparse
import os
import re
import socket
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from launch.signals import BAD_INPUT, OWN_ERROR, RANK_LOST, STOPPED, say
from trainer.events import read_events, record_event

FAILURE_VARIABLE = "NSPHERE_FAILURE"
OWN_CODES = (OWN_ERROR, BAD_INPUT)


@dataclass(frozen=True)
class Decision:
    """The word for the batch script, the job's exit code, and the reason."""

    word: str
    code: int
    why: str = ""


@dataclass(frozen=True)
class Ending:
    """How the ranks ended and what SLURM has to do with it."""

    code: int  # srun's
    finished: bool = False  # the run has said that it is done, after this job was submitted
    failure: str = ""  # "CODE text" of the first rank that failed by itself
    asked: bool = False  # the time is nearly over
    ended: bool = False  # SLURM has told the batch script to end
    preempted: bool = False
    over_time: bool = False


def tell_failure(code: object) -> None:
    """Called by a rank that ends: the first of a step's own errors is kept for the batch script."""
    path = os.environ.get(FAILURE_VARIABLE)
    if not path or code not in OWN_CODES:
        return
    rank = os.environ.get("RANK", os.environ.get("SLURM_PROCID", "0"))
    text = f"{code} rank {rank} on {socket.gethostname()} ended with exit code {code}\n"
    try:
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o644)
    except OSError:
        return
    os.write(file, text.encode())
    os.close(file)


def decide(ending: Ending) -> Decision:
    """What follows from how the ranks ended, but for the number of restarts."""
    if ending.code == 0 or ending.finished:  # a rank may be killed while it leaves
        return Decision("done", 0)
    own, _, why = ending.failure.partition(" ")
    if own.isdigit():
        return Decision("fail", int(own), why)
    if ending.ended:
        if ending.over_time:
            return Decision("requeue", STOPPED, "time limit")
        return Decision("leave", ending.code, "ended by SLURM")
    for reason, holds in (
        ("preempted", ending.preempted),
        ("time limit near", ending.asked),
        ("asked to stop", ending.code == STOPPED),
    ):
        if holds:
            return Decision("requeue", STOPPED, reason)
    if ending.code in OWN_CODES:
        return Decision("fail", ending.code, "srun, or every rank, failed")
    return Decision("restart", ending.code, explain_code(ending.code))


def is_finished(run: Path) -> bool:
    """Whether the last that befell the run is that it ended and is done."""
    names = ("submit", "start", "end", "restart", "requeue")
    lives = [event for event in read_events(run) if event["event"] in names]
    return bool(lives) and (lives[-1]["event"], lives[-1].get("how")) == ("end", "done")


def explain_code(code: int) -> str:
    """One phrase on srun's exit code."""
    if code == RANK_LOST:
        return "a rank was lost"
    hint = " (out of memory?)" if code == 128 + 9 else ""
    return f"a rank was killed by signal {code - 128}{hint}" if code > 128 else f"exit code {code}"


def limit(decision: Decision, run: Path, job: str, most: int) -> Decision:
    """The decision, or "fail" where `most` starts in a row have brought no newer checkpoint."""
    if decision.word not in ("restart", "requeue") or decision.why == "preempted":
        return decision
    step, in_row = newest_step(run), 0
    for event in reversed(read_events(run)):
        if event["event"] not in ("restart", "requeue") or event.get("job") != job:
            continue
        if event.get("step") != step or event.get("why") == "preempted":
            break
        in_row += 1
    if in_row < most:
        return decision
    place = f"step {step}" if step else "the start"
    why = (
        f"{decision.why}; {in_row} starts in a row from {place} brought no newer checkpoint "
        f"(launch.max_restarts = {most})"
    )
    return Decision("fail", decision.code, why)


def newest_step(run: Path) -> int:
    """Step of the newest checkpoint folder, 0 where there is none."""
    names = (path.name.removeprefix("step-") for path in run.glob("checkpoints/step-*"))
    return max((int(name) for name in names if name.isdigit()), default=0)


def ask_slurm(job: str) -> dict[str, str]:
    """What `scontrol show job` says, as NAME -> value; empty where it does not answer."""
    try:
        text = subprocess.run(
            ["scontrol", "show", "job", "--oneliner", job],
            capture_output=True,
            text=True,
            check=True,
            timeout=60,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    first = text.splitlines()[0] if text else ""
    return dict(re.findall(r"(\w+)=(\S*)", first))


def is_over_time(job: Mapping[str, str]) -> bool:
    """Whether a job has run for as long as it may."""
    limit_s = parse_time(job.get("TimeLimit", ""))
    run_s = parse_time(job.get("RunTime", ""))
    return limit_s is not None and run_s is not None and run_s >= limit_s


def parse_time(text: str) -> int | None:
    """Seconds of a time as SLURM writes it: MIN, MIN:SEC, H:MIN:SEC, DAYS-H[:MIN[:SEC]]."""
    match = re.fullmatch(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?", text)
    if match is None:
        return None
    days, *fields = match.groups()
    numbers = [int(field) for field in fields if field is not None]
    if days is not None:
        numbers += [0] * (3 - len(numbers))
    elif len(numbers) < 3:  # the first is minutes
        numbers = [0, *numbers, 0][:3]
    hours, minutes, seconds = numbers
    return int(days or 0) * 86400 + hours * 3600 + minutes * 60 + seconds


def main() -> None:
    """`python -P -m launch.job RUN CODE`: decide, say, record, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path)
    parser.add_argument("code", type=int)
    parser.add_argument("--max-restarts", type=int, default=3)
    parser.add_argument("--asked", action="store_true", help="the time is nearly over")
    parser.add_argument("--ended", action="store_true", help="SLURM sent SIGTERM to the script")
    given = parser.parse_args()
    job = os.environ.get("SLURM_JOB_ID", "")
    facts = ask_slurm(job) if given.code else {}
    file = Path(os.environ.get(FAILURE_VARIABLE, "/nonexistent"))
    ending = Ending(
        given.code,
        finished=is_finished(given.run),
        failure=file.read_text().strip() if file.exists() else "",
        asked=given.asked,
        ended=given.ended,
        preempted=facts.get("PreemptTime", "None") not in ("None", "Unknown"),
        over_time=is_over_time(facts),
    )
    decision = limit(decide(ending), given.run, job, given.max_restarts)
    if decision.why:
        say(f"nsphere: {decision.word} ({decision.why})")
    if decision.word in ("restart", "requeue"):
        details = {"code": given.code, "why": decision.why, "job": job}
        record_event(given.run, decision.word, {**details, "step": newest_step(given.run)})
    sys.stdout.write(f"{decision.word} {decision.code}\n")


if __name__ == "__main__":
    main()
