"""Where a run is, from its folder and SLURM: reads the last of metrics.jsonl, and small files."""

import json
import os
import re
import socket
import statistics
import time
from pathlib import Path
from typing import Any

from launch.job import ask_slurm, newest_step
from trainer.config import ConfigError, load_config
from trainer.events import EVENTS_FILE, read_events

TAIL_BYTES = 1 << 20
LOG_TAIL_BYTES = 1 << 16
SILENT_S = 30.0  # trainer/lock.py: the owner of a run writes a heartbeat every 5 s
RECENT_STEPS = 20
MOST_WHYS = 3
_OF_A_RUN = ("config.toml", "metrics.jsonl", "checkpoints", EVENTS_FILE)
_ERROR_LINE = re.compile(
    r"^(nsphere(, rank \d+)?: |\w*(Error|Exception)\b|srun: error|slurmstepd.*error)|Traceback"
)


def find_runs(folders: list[Path]) -> list[Path]:
    """The run folders among `folders` and directly inside those that hold runs.

    Raises ConfigError for a folder that is neither.
    """
    found: list[Path] = []
    for folder in folders:
        inside = sorted(path for path in folder.glob("*/") if _is_run(path))
        if _is_run(folder):
            found.append(folder)
        elif inside:
            found += inside
        else:
            raise ConfigError(
                f"{folder}: no run: no config.toml or {EVENTS_FILE} in it, or in a folder in it"
            )
    return found


def _is_run(folder: Path) -> bool:
    return any((folder / name).exists() for name in _OF_A_RUN)


def read_status(run: Path) -> dict[str, Any]:
    """All that is known of a run, ready for JSON; what is not known is None."""
    events = read_events(run)
    metrics = _read_tail(run / "metrics.jsonl")
    steps = [line for line in metrics if "loss" in line]
    evaluations = [line for line in metrics if "evaluation" in line]
    last = steps[-1] if steps else {}
    job = _job_of(events)
    owner = _owner_of(run)
    facts: dict[str, Any] = {
        "run": str(run),
        "job": job or None,
        "queue": _queue_state(job),
        "alive": owner is not None,
        "owner": owner,
        "step": last.get("step", newest_step(run) or None),
        "total_steps": _total_steps(run, last),
        "loss": last.get("loss"),
        "samples_per_s": _median(steps, "samples_per_s"),
        "eta_s": None,
        "last_metrics_age_s": _age(run / "metrics.jsonl"),
        "checkpoint": _newest_checkpoint(run),
        "evaluation": None,
        **_history(events),
        "error": None,
    }
    step_s = _median(steps, "step_s")
    if facts["total_steps"] and step_s and facts["step"] is not None:
        facts["eta_s"] = max(0, facts["total_steps"] - facts["step"]) * step_s
    if evaluations:
        newest = evaluations[-1]
        facts["evaluation"] = {"step": newest["step"], **newest["evaluation"]}
    facts["state"] = _state(facts)
    if facts["state"] in ("failed", "dead"):
        facts["error"] = facts["why"] or _last_error(run, events)
    return facts


def _state(facts: dict[str, Any]) -> str:
    """running, queued, done, stopped, failed, dead (ended without a word), or new."""
    if facts["alive"]:
        return "running"
    if facts["how"] == "done" or facts["step"] == facts["total_steps"] is not None:
        return "done"
    word = ((facts["queue"] or {}).get("state") or "").split("+")[0]
    if word in ("PENDING", "CONFIGURING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED"):
        return "queued"
    if word in ("RUNNING", "COMPLETING"):
        return "starting" if word == "RUNNING" else "ending"
    if facts["how"] in ("failed", "stopped"):
        return str(facts["how"])
    if word in ("FAILED", "TIMEOUT", "NODE_FAIL", "OUT_OF_MEMORY", "BOOT_FAIL", "DEADLINE"):
        return "failed"
    if word == "CANCELLED":
        return "stopped"
    return "dead" if facts["starts"] else "new"


def _history(events: list[dict[str, Any]]) -> dict[str, Any]:
    """Starts and restarts so far and why; how the last life ended, if it did with a word."""
    starts = [event for event in events if event["event"] == "start"]
    lives = [event for event in events if event["event"] in ("start", "end", "failed", "submit")]
    again = [event for event in events if event["event"] in ("restart", "requeue")]
    ended = lives[-1] if lives and lives[-1]["event"] in ("end", "failed") else {}
    return {
        "starts": len(starts),
        "restarts": max(len(starts) - 1, 0),
        "ranks": starts[-1].get("world_size") if starts else None,
        "nodes": starts[-1].get("nodes") if starts else None,
        "whys": [
            {"time": event["time"], "event": event["event"], "why": event.get("why", "")}
            for event in again
        ],
        "lost": [event.get("why", "") for event in events if event["event"] == "lost"][-MOST_WHYS:],
        "how": "failed" if ended.get("event") == "failed" else ended.get("how"),
        "why": ended.get("why", ""),
    }


def _job_of(events: list[dict[str, Any]]) -> str:
    jobs = [str(e.get("job") or "") for e in events if e["event"] in ("submit", "start")]
    return next((job for job in reversed(jobs) if job), "")


def _queue_state(job: str) -> dict[str, Any] | None:
    """What SLURM says of the job; None where there is no job, or no SLURM that knows it."""
    facts = ask_slurm(job) if job else {}
    if not facts:
        return None
    return {
        "state": facts.get("JobState"),
        "reason": facts.get("Reason"),
        "nodes": facts.get("NodeList"),
        "run_time": facts.get("RunTime"),
        "time_limit": facts.get("TimeLimit"),
        "restarts": int(facts.get("Restarts", 0)),
        "start_time": facts.get("StartTime"),
        "exit_code": facts.get("ExitCode"),
    }


def _owner_of(run: Path) -> str | None:
    """Who holds the run now. Reads only: to try the lock could make a start fail."""
    path = run / ".lock"
    try:
        owner = json.loads(path.read_text())
        age = time.time() - path.stat().st_mtime
    except (OSError, ValueError):
        return None
    if not isinstance(owner, dict) or "pid" not in owner:
        return None
    if owner.get("host") == socket.gethostname():
        if not Path(f"/proc/{owner['pid']}").exists():
            return None
    elif age > SILENT_S:
        return None
    return f"process {owner['pid']} on {owner.get('host')}, since {owner.get('since')}"


def _total_steps(run: Path, last: dict[str, Any]) -> int | None:
    """Steps of the whole run; its epoch's length is what the last line's `epoch` says."""
    try:
        train = load_config(run / "config.toml", commands="keep").train
    except ConfigError:
        return None
    samples = round(last["samples_seen"] / last["epoch"]) if last.get("epoch") else 0
    if train.duration.unit == "epochs" and not samples:
        return None
    return train.duration.to_steps(train.global_batch_size, samples)


def _newest_checkpoint(run: Path) -> dict[str, Any] | None:
    paths = (run / "checkpoints").glob("step-*")
    steps = {path.name.removeprefix("step-"): path for path in paths}
    for name in sorted(filter(str.isdecimal, steps), key=int, reverse=True):
        path, step = steps[name], int(name)
        age = _age(path / "manifest.json")
        if age is None:
            continue
        try:
            size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        except OSError:  # it goes while it is looked at
            continue
        return {"path": str(path), "step": step, "age_s": age, "bytes": size}
    return None


def _read_tail(path: Path) -> list[dict[str, Any]]:
    """The last lines of a metrics.jsonl, oldest first."""
    lines = []
    for text in _tail(path, TAIL_BYTES):
        try:
            line = json.loads(text)
        except ValueError:  # cut off at the front, or torn at the end
            continue
        if isinstance(line, dict) and isinstance(line.get("step"), int):
            lines.append(line)
    return lines


def _tail(path: Path, size: int) -> list[str]:
    try:
        with path.open("rb") as file:
            file.seek(max(0, os.fstat(file.fileno()).st_size - size))
            return file.read().decode(errors="replace").splitlines()
    except OSError:
        return []


def _median(steps: list[dict[str, Any]], name: str) -> float | None:
    values = [line[name] for line in steps[-RECENT_STEPS:] if line.get(name) is not None]
    return statistics.median(values) if values else None


def _age(path: Path) -> float | None:
    try:
        return max(0.0, time.time() - path.stat().st_mtime)
    except OSError:
        return None


def _last_error(run: Path, events: list[dict[str, Any]]) -> str | None:
    """The last line of the job's log, or of a rank's, that looks like an error."""
    submitted = [event for event in events if event["event"] == "submit"]
    logs = [Path(submitted[-1]["log"])] if submitted and submitted[-1].get("log") else []
    logs += sorted((run / "log").glob("slurm-*.out"), reverse=True)[:1]
    logs += sorted((run / "log").glob("rank-*.log"))[:8]
    for path in logs:
        for line in reversed(_tail(path, LOG_TAIL_BYTES)):
            if _ERROR_LINE.search(line):
                return f"{path.name}: {line.strip()}"
    return None


def describe(facts: dict[str, Any]) -> str:
    """A few lines for people."""
    parts = [f"{facts['run']}: {facts['state']}"]
    if facts["owner"]:
        parts.append(facts["owner"])
    lines = [", ".join(parts)]
    if facts["job"]:
        lines.append(f"  job         {facts['job']}{_describe_queue(facts['queue'])}")
    if facts["step"] is not None:
        lines.append(f"  step        {_describe_step(facts)}")
    if facts["checkpoint"]:
        saved = facts["checkpoint"]
        lines.append(
            f"  checkpoint  step {saved['step']:,}, {_duration(saved['age_s'])} old, "
            f"{_size(saved['bytes'])}"
        )
    if facts["evaluation"]:
        shown = list(facts["evaluation"].items())[:7]
        lines.append("  evaluation  " + "  ".join(f"{k} {_short(v)}" for k, v in shown))
    if facts["restarts"] or facts["whys"]:
        whys = [why["why"] or why["event"] for why in facts["whys"][-MOST_WHYS:]]
        told = f": {'; '.join(whys)}" if whys else ""
        lines.append(f"  restarts    {facts['restarts']}{told}")
    lines += [f"  lost        {why}" for why in facts["lost"]]
    if facts["error"]:
        lines.append(f"  error       {facts['error']}")
    return "\n".join(lines)


def _describe_queue(queue: dict[str, Any] | None) -> str:
    if queue is None:
        return ", not known to SLURM here"
    text = f", {queue['state']}"
    if queue["reason"] not in (None, "None"):
        text += f" ({queue['reason']})"
    if queue["nodes"] not in (None, "", "(null)"):
        text += f" on {queue['nodes']}"
    text += f", {queue['run_time']} of {queue['time_limit']}"
    return text + (f", queued again {queue['restarts']} times" if queue["restarts"] else "")


def _describe_step(facts: dict[str, Any]) -> str:
    total = facts["total_steps"]
    text = f"{facts['step']:,}" + (f" of {total:,} ({facts['step'] / total:.0%})" if total else "")
    if facts["loss"] is not None:
        text += f", loss {facts['loss']:.4g}"
    if facts["samples_per_s"]:
        text += f", {facts['samples_per_s']:,.0f} samples/s"
    if facts["eta_s"] and facts["alive"]:
        text += f", {_duration(facts['eta_s'])} left"
    if facts["last_metrics_age_s"] is not None:
        text += f", last line {_duration(facts['last_metrics_age_s'])} ago"
    return text


def _duration(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours}:{rest // 60:02d}:{rest % 60:02d}"


def _size(size: float) -> str:
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
            return f"{size:.3g} {unit}"
        size /= 1024
    return f"{size:.3g} TiB"


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
