"""`python -m benchmarks.saving [--json]`: what a checkpoint every ten steps costs, ZeRO 0-3.

Whole runs of the real trainer on 1 and 2 ranks, each three times over: without saves, with saves
that training waits for, and with saves in the background, in turns, so that a busy machine is busy
for all. A step's time is the mean over the steps after the first ten, saves included; of several
rounds the median counts. `held` is what one save keeps training from its next step.
"""

import argparse
import hashlib
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks.machine import commit, load, machine, print_table
from data.pack.scenes import iter_scenes
from data.pack.writer import pack_iterable
from launch.ranks import open_ranks
from trainer.config import Config, parse_config
from trainer.metrics import read_metrics
from trainer.train import train

STEPS, EVERY, WARMUP, BATCH = 40, 10, 10, 16
STAGES = (0, 1, 2, 3)
KINDS = ("none", "waited for", "background")
MODEL = {  # 17 million parameters, most of them rows of the text tower's table
    "embed_dim": 128,
    "vision_cfg": {"image_size": 32, "layers": 4, "width": 192, "head_width": 32, "patch_size": 8},
    "text_cfg": {
        "context_length": 16,
        "vocab_size": 49408,
        "width": 256,
        "heads": 4,
        "layers": 4,
    },
}


def build_config(folder: Path, stage: int, kind: str) -> Config:
    """One of the runs that are timed."""
    tree = {
        "data": {"shards": str(folder / "x-*.tar"), "workers": 1},
        "model": {"name": str(folder / "model.json")},
        "zero": {"stage": stage},
        "train": {
            "duration": f"{STEPS} steps",
            "global_batch_size": BATCH,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
        "checkpoint": {
            "every": f"{EVERY if kind != 'none' else STEPS} steps",
            "background": kind == "background",
            "keep_last": 1,
        },
        "log": {"every": "1 steps", "trackers": []},
    }
    return parse_config(tree, "benchmarks.saving")


def run_rank(folder: Path, stage: int, rounds: int) -> None:
    """One rank of all runs of a stage."""
    with open_ranks(os.environ) as ranks:
        for number in range(rounds):
            for kind in KINDS:
                run = folder / f"{ranks.world_size}-{stage}-{kind}-{number}"
                train(build_config(folder, stage, kind), run, ranks)


def read_run(run: Path) -> dict[str, float]:
    """Seconds of a step, of a save, and held by one; bytes of a checkpoint."""
    lines = [
        line
        for line in read_metrics(run / "metrics.jsonl")
        if "loss" in line and line["step"] > WARMUP
    ]
    text = (run / "log" / "rank-0000.log").read_text()
    saves = re.findall(r"saved: (\d+) bytes in ([\d.]+) s", text)[: STEPS // EVERY]
    return {
        "step": statistics.mean(line["step_s"] for line in lines),
        "held": sum(line.get("checkpoint_s", 0.0) for line in lines) / ((STEPS - WARMUP) / EVERY),
        "save": statistics.median(float(seconds) for _, seconds in saves),
        "bytes": float(saves[0][0]),
    }


def measure(folder: Path, world_size: int, stage: int, rounds: int) -> dict[str, dict[str, float]]:
    """Medians over the rounds, by kind."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    rank = ["-m", "benchmarks.saving", "--rank-of", str(folder), "--stage", str(stage)]
    subprocess.run(
        [*torchrun, "--nproc-per-node", str(world_size), *rank, "--rounds", str(rounds)],
        env={**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        cwd=Path(__file__).parents[1],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    found = {}
    for kind in KINDS:
        runs = [read_run(folder / f"{world_size}-{stage}-{kind}-{n}") for n in range(rounds)]
        found[kind] = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return found


def disk_speed(folder: Path, size: int) -> tuple[float, float]:
    """Bytes a second of one flushed file of `size` bytes, and of SHA-256, in one thread."""
    piece, speeds = os.urandom(2**22), []
    for _ in range(3):
        started = time.perf_counter()
        with (folder / "speed").open("wb", buffering=0) as file:
            for _ in range(max(1, size // len(piece))):
                file.write(piece)
            os.fsync(file.fileno())
        speeds.append(size / (time.perf_counter() - started))
        (folder / "speed").unlink()
    started = time.perf_counter()
    for _ in range(16):
        hashlib.sha256(piece).digest()
    return statistics.median(speeds), 16 * len(piece) / (time.perf_counter() - started)


def row(world_size: int, stage: int, found: dict[str, dict[str, float]], disk: float) -> list[str]:
    """A line of the table."""
    none, waited, behind = (found[kind] for kind in KINDS)
    speed = waited["bytes"] / waited["save"]
    return [
        str(world_size),
        str(stage),
        f"{1000 * none['step']:.0f}",
        f"{1000 * waited['step']:.0f}",
        f"{waited['step'] / none['step']:.2f}x",
        f"{1000 * behind['step']:.0f}",
        f"{behind['step'] / none['step']:.2f}x",
        f"{1000 * waited['held']:.0f}",
        f"{1000 * behind['held']:.0f}",
        f"{waited['save']:.2f}",
        f"{behind['save']:.2f}",
        f"{waited['bytes'] / 1e6:.0f}",
        f"{speed / 1e6:.0f}",
        f"{speed / disk:.2f}x",
    ]


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each kind")
    parser.add_argument("--folder", help="where checkpoints are written; default: temporary files")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--stage", type=int, default=0, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of, options.stage, options.rounds)
        return
    worlds = [1, 2] if torch.cuda.device_count() in (0, 2) else [1]
    with tempfile.TemporaryDirectory(dir=options.folder) as name:
        folder = Path(name)
        (folder / "model.json").write_text(json.dumps(MODEL))
        pack_iterable(iter_scenes(1024, seed=0), folder / "x.tar", max_samples=256)
        found = {
            (world_size, stage): measure(folder, world_size, stage, options.rounds)
            for world_size in worlds
            for stage in STAGES
        }
        disk, hashing = disk_speed(folder, int(found[worlds[0], 0]["none"]["bytes"]))
    if options.json:
        seconds = [{"ranks": w, "stage": s, **kinds} for (w, s), kinds in found.items()]
        speeds = {"disk_bytes_per_s": disk, "sha256_bytes_per_s": hashing}
        print(json.dumps({"machine": machine(), "commit": commit(), **speeds, "runs": seconds}))
        return
    print(f"{machine()}, load {load()}, commit {commit()}")
    print(f"one file, flushed: {disk / 1e6:.0f} MB/s; SHA-256: {hashing / 1e6:.0f} MB/s a thread")
    print_table(
        f"ms of a step of {BATCH} samples with a save every {EVERY}; s of a save, MB of all ranks",
        (
            *("ranks", "ZeRO", "no saves", "waited for", "", "background", ""),
            *("held ms", "held, background ms", "save s", "background s", "MB", "MB/s", "/disk"),
        ),
        [row(world_size, stage, kinds, disk) for (world_size, stage), kinds in found.items()],
    )


if __name__ == "__main__":
    main()
