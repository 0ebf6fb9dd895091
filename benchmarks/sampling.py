"""`python -m benchmarks.sampling --shards PATTERN [--json]`: does the sample rate move the loss?

The same run several times: all centers in every step; a tenth of them with the correction, also
with the exact mode of the optimizer, where momentum goes on while a center is not touched; such a
tenth, half of it the nearest centers, which stand for themselves, so that the weighed sum is as
right and less noisy; and a tenth without the correction. The loss of each is the mean over the last
quarter of its steps; the offset without the correction is also told at the first step, where all
have the same weights and it should be the logarithm of the share of classes that take part.
"""

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.machine import commit, load, machine, print_table

CONFIG = """
[data]
workers = 0
[data.augment]
crop = false
shift = 0.05
[model]
name = "resnet10"
width = 16
image_size = 32
embedding_dim = 128
[loss]
name = "cosface"
scale = 16.0
margin = 0.1
[centers]
norm_bounds = [1.0, 1.0]
[optim]
name = "sgd"
lr = 0.05
weight_decay = 5e-4
[schedule]
warmup = "50 steps"
[train]
global_batch_size = 32
precision = "fp32"
[checkpoint]
every = "1 epochs"
[log]
every = "1 steps"
trackers = []
"""
RUNS = {
    "all": ["--centers.sample_rate=1.0"],
    "0.1, corrected": ["--centers.sample_rate=0.1"],
    "0.1, corrected, exact": ["--centers.sample_rate=0.1", "--centers.mode=exact"],
    "0.1, half nearest": [
        "--centers.sample_rate=0.1",
        "--centers.mode=exact",
        "--centers.hard_share=0.5",
        "--centers.hard_every=20",
    ],
    "0.1, not corrected": ["--centers.sample_rate=0.1", "--centers.correction=false"],
}


def train(folder: Path, name: str, words: Sequence[str], ranks: int) -> list[float]:
    """Losses of every step."""
    run = folder / str(list(RUNS).index(name))
    config = folder / "sampling.toml"
    config.write_text(CONFIG)
    command = [sys.executable, "-m", "launch.cli", "train", str(config), f"--nproc={ranks}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONSAFEPATH": "1"}
    done = subprocess.run(
        [*command, f"--run={run}", *RUNS[name], *words],
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    if done.returncode:
        raise SystemExit(f"exit code {done.returncode}\n{done.stderr}")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


def main() -> None:
    """Parse, run, print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shards", required=True)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--json", action="store_true", help="one JSON object instead of a table")
    given = parser.parse_args()
    facts = {"machine": machine(), "commit": commit(), "load": load()}
    words = [f"--data.shards={given.shards}", f"--train.duration={given.steps} steps"]
    with tempfile.TemporaryDirectory() as folder:
        losses = {name: train(Path(folder), name, words, given.ranks) for name in RUNS}
    ends = {name: statistics.mean(found[-len(found) // 4 :]) for name, found in losses.items()}
    lines = [
        {
            "run": name,
            "first": losses[name][0],
            "first_offset": losses[name][0] - losses["all"][0],
            "end": ends[name],
            "end_ratio": ends[name] / ends["all"],
        }
        for name in RUNS
    ]
    if given.json:
        print(json.dumps(facts | {"ln_rate": math.log(0.1), "runs": lines}))
        return
    print(" | ".join(f"{name}: {value}" for name, value in facts.items()))
    rows = [
        (x["run"], f"{x['first']:.3f}", f"{x['first_offset']:+.3f}", f"{x['end']:.3f}",
         f"{x['end_ratio']:.3f}")
        for x in lines
    ]  # fmt: skip
    header = ("centers in a step", "first loss", "offset", "last quarter", "/ all")
    print_table(f"{given.steps} steps of 32; ln 0.1 = {math.log(0.1):.3f}", header, rows)


if __name__ == "__main__":
    main()
