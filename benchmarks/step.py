"""`python -m benchmarks.step [--json]`: where the time of a training step goes, on 1 and 2 ranks.

Whole runs of the real trainer (drawn scenes, a small ViT, checkpoints every ten steps) in float32;
medians of the steps after the first ten. `reduction` is part of `backward`: it is the time of one
all-reduce of as many bytes, alone, between the same ranks.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.machine import commit, load, machine, print_table
from data.pack.scenes import iter_scenes
from data.pack.writer import pack_iterable
from launch.ranks import open_ranks
from trainer.config import Config, parse_config
from trainer.metrics import read_metrics
from trainer.models import build_model
from trainer.train import train

STEPS, WARMUP = 40, 10
PARTS = ("data_wait", "towers", "loss", "backward", "optimizer", "log", "checkpoint")
WANTED_DATA_WAIT = 0.05
MODEL = Path(__file__).parents[1] / "configs" / "models" / "demo.json"


def build_config(folder: Path) -> Config:
    """The run that is timed."""
    tree = {
        "data": {"shards": str(folder / "x-*.tar"), "workers": 1},
        "model": {"name": str(MODEL)},
        "train": {
            "duration": f"{STEPS} steps",
            "global_batch_size": 256,
            "precision": "bf16" if torch.cuda.is_available() else "fp32",
        },
        "checkpoint": {"every": "10 steps"},
        "log": {"every": "1 steps", "trackers": []},
    }
    return parse_config(tree, "benchmarks.step")


def run_rank(folder: Path) -> None:
    """One rank of a timed run; the first one leaves the time of a bare all-reduce."""
    config = build_config(folder)
    with open_ranks(os.environ) as ranks:
        train(config, folder / f"run-{ranks.world_size}", ranks)
        model = build_model(config.model, loss_name="clip", device="meta")
        numel = sum(parameter.numel() for parameter in model.parameters())
        gradients = torch.zeros(numel, device=ranks.device)
        seconds = []
        for _ in range(10):
            dist.barrier()
            start = time.perf_counter()
            dist.all_reduce(gradients)
            if ranks.device.type == "cuda":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        if ranks.is_first:
            text = json.dumps({"s": statistics.median(seconds), "bytes": 4 * numel})
            (folder / f"reduction-{ranks.world_size}.json").write_text(text)


def measure(folder: Path, world_size: int) -> dict[str, float]:
    """Median seconds of each part of a step, in a run of `world_size` ranks."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    subprocess.run(
        [
            *(*torchrun, "--nproc-per-node", str(world_size), "-m", "benchmarks.step"),
            *("--rank-of", str(folder)),
        ],
        env=environment,
        cwd=Path(__file__).parents[1],
        check=True,
        stderr=subprocess.DEVNULL,
    )
    lines = read_metrics(folder / f"run-{world_size}" / "metrics.jsonl")
    steps = [line for line in lines if "loss" in line and line["step"] > WARMUP]
    parts = {
        part: statistics.median(line.get(f"{part}_s", 0.0) for line in steps) for part in PARTS
    }
    saves = [line["checkpoint_s"] for line in steps if "checkpoint_s" in line]
    parts["checkpoint"] = statistics.median(saves) if saves else 0.0
    parts["reduction"] = json.loads((folder / f"reduction-{world_size}.json").read_text())["s"]
    parts["step"] = statistics.median(
        line["step_s"] - line.get("checkpoint_s", 0) for line in steps
    )
    return parts


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    parser.add_argument("--rank-of", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of:
        run_rank(options.rank_of)
        return
    worlds = [1, 2] if torch.cuda.device_count() in (0, 2) else [1]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        pack_iterable(iter_scenes(2048, seed=0), folder / "x.tar", max_samples=256)
        found = {world_size: measure(folder, world_size) for world_size in worlds}
    shares = {w: parts["data_wait"] / parts["step"] for w, parts in found.items()}
    if options.json:
        print(json.dumps({"machine": machine(), "commit": commit(), "seconds": found}))
        return
    names = ("step", *PARTS[:4], "reduction", *PARTS[4:])
    print(f"{machine()}, load {load()}, commit {commit()}")
    print_table(
        "ms of a step of 256 samples, ViT 32 px width 96 and a text tower; checkpoint: of a save",
        ("ranks", *names, "data wait", f"wanted < {WANTED_DATA_WAIT:.0%}"),
        [
            (
                str(world_size),
                *(f"{1000 * parts[name]:.1f}" for name in names),
                f"{shares[world_size]:.1%}",
                "yes" if shares[world_size] < WANTED_DATA_WAIT else "NO",
            )
            for world_size, parts in found.items()
        ],
    )


if __name__ == "__main__":
    main()
